"""Feeds tasks to a cluster, a bounded number at a time.

A scheduler that holds all tasks of a long run needs gigabytes; a few tasks per worker keep its
memory constant and every worker busy. A failed task is tried again, on another worker if there is
one. A task that fails repeatedly is set aside, and the run continues.
"""

from __future__ import annotations

import asyncio
import logging
import math
import queue
import time
import traceback
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed import Client, Future, Scheduler
from distributed.scheduler import KilledWorker

from daskcurv.clusters import Cluster
from daskcurv.errors import ClusterError, DaskcurvError, StoreWriteError
from daskcurv.runs.events import Done, Failed, Polled, Result, SetAside, Task
from daskcurv.runs.tasks import Declined

log = logging.getLogger(__name__)

TASKS_PER_WORKER = 3
ATTEMPTS = 3
POLL_SECONDS = 1.0


def feed(
    cluster: Cluster,
    function: Callable[[Task], Result | Declined],
    tasks: Iterable[Task],
    may_start: Callable[[], bool] = lambda: True,
    may_wait: Callable[[], bool] = lambda: True,
) -> Iterator[Done[Task, Result] | Failed[Task] | SetAside[Task] | Polled]:
    """Run tasks on a cluster, a few per worker at a time, and yield events.

    Parameters
    ----------
    cluster : Cluster
    function : callable
        Run on a worker with a task as its argument.
    tasks : iterable
        Consumed lazily, in order.
    may_start : callable, optional
        Called before each task is submitted. After it returns False, running tasks are awaited and
        no others are submitted.
    may_wait : callable, optional
        Called about once a second. After it returns False, running tasks are not awaited either.

    Yields
    ------
    Done, Failed, SetAside or Polled
        In the order of events; `Polled` about once a second.

    Raises
    ------
    StoreWriteError
        As soon as a task reports that nothing more can be written.
    DaskcurvError
        If the cluster is lost.
    """
    client, loop = cluster.client, cluster.client.loop
    assert loop is not None, "the client is not asynchronous"
    finished: queue.SimpleQueue[tuple[Future[Any], Any, Exception | None]] = queue.SimpleQueue()
    running: dict[Future[Any], Task] = {}
    failures: Counter[Task] = Counter()
    failed_on: defaultdict[Task, set[str]] = defaultdict(set)
    again: deque[Task] = deque()
    remaining = iter(tasks)
    workers: frozenset[str] = frozenset()
    window = 0
    polled = -math.inf

    async def follow(future: Future[Any]) -> None:
        # Results are fetched beside the loop below, and not in it: if a worker dies with one, only
        # another worker can give it, and polling the cluster starts that one.
        try:
            finished.put((future, await client.gather(future, asynchronous=True), None))
        except asyncio.CancelledError:
            finished.put((future, None, ClusterError("the scheduler lost the task")))
        except Exception as error:
            finished.put((future, None, error))

    def next_task() -> Task | None:
        if not may_start():
            return None
        return again.popleft() if again else next(remaining, None)

    def elsewhere(task: Task) -> dict[str, Any]:
        # A worker whose device is broken fails within a second and asks for the next task: it
        # would be given all three attempts at every task while others are at their first.
        others = workers - failed_on[task] if task in failed_on else None
        return {"workers": [*others], "allow_other_workers": True} if others else {}

    while True:
        if time.monotonic() - polled >= POLL_SECONDS:
            workers = _connected_workers(client)
            window = TASKS_PER_WORKER * max(1, len(workers))
            # A worker is given one at a time; the others wait at the scheduler.
            yield Polled(cluster.poll(), min(len(running), len(workers)), workers)
            polled = time.monotonic()
        while len(running) < window and (task := next_task()) is not None:
            # Keys are left to Dask but never shared: a retried task is a new one.
            future = client.submit(function, task, pure=False, **elsewhere(task))
            running[future] = task
            loop.add_callback(follow, future)
        if not running or not may_wait():
            return
        try:
            future, result, error = finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        task = running.pop(future)
        if error is None:
            if isinstance(result, Declined):
                log.info("%s stops: %s", result.worker, result.reason)
                client.run_on_scheduler(_dismiss, result.worker)
                again.append(task)
            else:
                cluster.block_done()
                yield Done(task, result)
            continue
        if isinstance(error, StoreWriteError):
            raise error
        if not isinstance(error, DaskcurvError | KilledWorker):
            lines = traceback.format_exception(type(error), error, error.__traceback__)
            log.debug("on a worker:\n%s", "".join(lines))
        failures[task] += 1
        failed_on[task].update(client.run_on_scheduler(_where_it_failed, future.key))
        if failures[task] < ATTEMPTS:
            again.append(task)
            yield Failed(task, _reason(error))
        else:
            yield SetAside(task, _reason(error), error)


def _where_it_failed(key: str, dask_scheduler: Scheduler) -> list[str]:
    """Return the workers on which a task failed, on the scheduler."""
    state = dask_scheduler.tasks.get(key)
    return [*state.erred_on] if state is not None and state.erred_on else []


async def _dismiss(worker: str, dask_scheduler: Scheduler) -> None:
    """Have a worker close, on the scheduler.

    Not by retiring it: that waits for another worker to take over its results, and if there is no
    other it waits for ever. What is lost with it is computed again, or found in the store.
    """
    await dask_scheduler.remove_worker(worker, stimulus_id="daskcurv-declined", expected=True)


def _connected_workers(client: Client) -> frozenset[str]:
    if client.status != "running":
        raise ClusterError(
            "the connection to the Dask scheduler is lost; run the same command again to continue"
        )
    return frozenset(client.nthreads())


def _reason(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return "every worker that took it died (killed, or out of memory)"
    if isinstance(error, DaskcurvError):
        return str(error)
    return f"{type(error).__name__}: {error}"
