"""Tasks to a cluster through a bounded window.

A scheduler that holds every task of a long run needs gigabytes; one that always holds a few per
worker stays flat, and keeps every worker busy all the same. What fails is tried again, and set
aside if it keeps failing, while the rest goes on.
"""

from __future__ import annotations

import logging
import math
import queue
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from distributed import Client, Future
from distributed.scheduler import KilledWorker

from daskcurv.errors import DaskcurvError, StoreWriteError

log = logging.getLogger(__name__)

TASKS_PER_WORKER = 3
ATTEMPTS = 3
POLL_SECONDS = 1.0

Task = TypeVar("Task")
Report = TypeVar("Report")


@dataclass(frozen=True)
class Done(Generic[Task, Report]):
    """A task finished."""

    task: Task
    report: Report


@dataclass(frozen=True)
class SetAside(Generic[Task]):
    """A task failed `ATTEMPTS` times."""

    task: Task
    reason: str


@dataclass(frozen=True)
class Waiting:
    """Nothing happened for a while; `workers` are connected."""

    workers: int


def feed(
    client: Client,
    function: Callable[[Task], Report],
    tasks: Iterable[Task],
) -> Iterator[Done[Task, Report] | SetAside[Task] | Waiting]:
    """Run tasks on a cluster, a few per worker at a time, and yield what becomes of them.

    Parameters
    ----------
    client : distributed.Client
    function : callable
        Run on a worker with a task as its argument.
    tasks : iterable
        Consumed lazily, in order.

    Yields
    ------
    Done, SetAside or Waiting
        In the order in which things happen; `Waiting` about once a second while they do not.

    Raises
    ------
    StoreWriteError
        As soon as a task reports that nothing more can be written.
    DaskcurvError
        If the cluster is lost.
    """
    finished: queue.SimpleQueue[Future[Any]] = queue.SimpleQueue()
    running: dict[Future[Any], Task] = {}
    failures: Counter[Task] = Counter()

    def submit(task: Task) -> None:
        # Keys are left to Dask but never shared: a retried task is a new one.
        future = client.submit(function, task, pure=False)
        running[future] = task
        future.add_done_callback(finished.put)

    remaining = iter(tasks)
    exhausted = False
    workers = window = 0
    counted = -math.inf
    while True:
        if time.monotonic() - counted >= POLL_SECONDS:
            workers = _count_workers(client)
            window = TASKS_PER_WORKER * max(1, workers)
            counted = time.monotonic()
        while not exhausted and len(running) < window:
            task = next(remaining, None)
            if task is None:
                exhausted = True
            else:
                submit(task)
        if exhausted and not running:
            return
        try:
            future = finished.get(timeout=POLL_SECONDS)
        except queue.Empty:
            yield Waiting(workers)
            continue
        task = running.pop(future)
        error = _error_of(future)
        if error is None:
            yield Done(task, future.result())
            continue
        if isinstance(error, StoreWriteError):
            raise error
        failures[task] += 1
        if failures[task] < ATTEMPTS:
            log.warning("trying again: %s: %s", task, _reason(error))
            submit(task)
        else:
            yield SetAside(task, _reason(error))


def _count_workers(client: Client) -> int:
    if client.status != "running":
        raise DaskcurvError("the connection to the Dask scheduler is lost; launch again to go on")
    return len(client.nthreads())


def _error_of(future: Future[Any]) -> BaseException | None:
    """Return why a future did not succeed, with the worker's traceback in the log."""
    if future.status == "finished":
        return None
    if future.status != "error":
        return DaskcurvError(f"the scheduler forgot the task ({future.status})")
    error: BaseException = future.exception()
    if not isinstance(error, DaskcurvError | KilledWorker):
        lines = traceback.format_exception(type(error), error, future.traceback())
        log.debug("on a worker:\n%s", "".join(lines))
    return error


def _reason(error: BaseException) -> str:
    if isinstance(error, KilledWorker):
        return "every worker that took it died (killed, or out of memory)"
    if isinstance(error, DaskcurvError):
        return str(error)
    return f"{type(error).__name__}: {error}"
