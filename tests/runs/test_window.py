"""Feeding a real cluster: failing tasks, dying workers, and a bounded number of tasks in flight."""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import dask
import psutil
import pytest
from distributed import get_worker

from daskcurv.clusters import local
from daskcurv.clusters.base import Workers
from daskcurv.clusters.environment import WORKER_ENVIRONMENT
from daskcurv.clusters.local import local_cluster
from daskcurv.errors import ClusterError, ConfigError, DataError, StoreWriteError
from daskcurv.runs import window as feeding
from daskcurv.runs.events import Done, Failed, Polled, SetAside
from daskcurv.runs.tasks import Declined
from daskcurv.runs.window import feed
from tests.support.minislurm import wait_for


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patch:
        # The first death of a worker condemns the task, so that the test does not take minutes.
        patch.setattr(local, "ALLOWED_FAILURES", 0)
        with local_cluster(2) as cluster:
            yield cluster


def double(task):
    return 2 * task


def fail_on_three(task):
    if task == 3:
        raise DataError("three is broken")
    return task


def die_on_three(task):
    if task == 3:
        os._exit(1)
    return task


def fail_twice(task: tuple[str, int]):
    """Fail at the first two attempts at each task, counted in files."""
    directory, number = task
    attempts = Path(directory) / str(number)
    with open(attempts, "a") as file:
        file.write("x")
    if attempts.stat().st_size <= 2:
        raise ValueError("not yet")
    return number


def fill_the_disk(task):
    raise StoreWriteError("disk full")


def slowly(task):
    time.sleep(0.05)
    return time.time()


def test_every_task_is_done_once(cluster):
    events = [event for event in feed(cluster, double, range(40)) if isinstance(event, Done)]
    assert {event.task: event.result for event in events} == {n: 2 * n for n in range(40)}
    assert len(events) == 40


def test_a_task_that_keeps_failing_is_set_aside_while_the_rest_goes_on(cluster):
    events = list(feed(cluster, fail_on_three, range(8)))
    done = [event.task for event in events if isinstance(event, Done)]
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7]
    assert [e for e in events if isinstance(e, SetAside)] == [SetAside(3, "three is broken")]


def test_a_task_that_kills_its_workers_is_set_aside_while_the_rest_goes_on(cluster):
    events = list(feed(cluster, die_on_three, range(8)))
    done = [event.task for event in events if isinstance(event, Done)]
    assert sorted(done) == [0, 1, 2, 4, 5, 6, 7]
    (set_aside,) = (event for event in events if isinstance(event, SetAside))
    assert set_aside.task == 3
    assert "every worker that took it died" in set_aside.reason


def test_a_task_that_fails_now_and_then_is_tried_again(cluster, tmp_path):
    tasks = [(str(tmp_path), number) for number in range(4)]
    events = list(feed(cluster, fail_twice, tasks))
    kinds = Counter(type(event) for event in events if not isinstance(event, Polled))
    assert kinds == {Failed: 4 * 2, Done: 4}
    assert {e.reason for e in events if isinstance(e, Failed)} == {"ValueError: not yet"}


def fail_on_one_worker(task: tuple[str, int]):
    """Fail at once on the worker that has the first task, and take a while on the other."""
    directory, number = task
    bad = Path(directory) / "bad"
    me = str(os.getpid())
    with contextlib.suppress(FileExistsError), open(bad, "x") as file:
        file.write(me)
    if bad.read_text() == me:
        raise RuntimeError("CUDA error: device-side assert triggered")
    time.sleep(0.05)
    return number


def test_a_worker_that_fails_every_task_sets_none_aside_while_there_is_another(cluster, tmp_path):
    cluster.client.wait_for_workers(2, timeout=60)
    tasks = [(str(tmp_path), number) for number in range(20)]
    events = list(feed(cluster, fail_on_one_worker, tasks))
    assert not [event for event in events if isinstance(event, SetAside)]
    assert sorted(event.result for event in events if isinstance(event, Done)) == [*range(20)]


def test_a_full_disk_stops_everything_at_once(cluster):
    with pytest.raises(StoreWriteError, match="disk full"):
        list(feed(cluster, fill_the_disk, range(1000)))


class DiesWhenFetched:
    """Takes its worker down when it is first sent to the launcher."""

    def __init__(self, died: Path):
        self.died = died

    def __reduce__(self):
        if not self.died.exists():
            self.died.touch()
            os._exit(1)
        return str, ("fetched",)


def give_away(directory: str):
    """Return a result that is lost at first; compute it again once the cluster was polled."""
    died, polled = Path(directory) / "died", Path(directory) / "polled"
    if died.exists():
        wait_for(polled.exists, 60)
    return DiesWhenFetched(died)


class Watched(local.LocalWorkers):
    """Notes when it is polled after a worker has died."""

    def __init__(self, workers: local.LocalWorkers, directory: Path):
        super().__init__(workers.client, workers._cluster)
        self._directory = directory

    def poll(self) -> Workers:
        if (self._directory / "died").exists():
            (self._directory / "polled").touch()
        return super().poll()


def test_a_cluster_is_polled_while_a_lost_result_is_computed_again(cluster, tmp_path):
    polled = Watched(cluster, tmp_path)
    events = [e for e in feed(polled, give_away, [str(tmp_path)]) if isinstance(e, Done)]
    assert [event.result for event in events] == ["fetched"]


def test_a_worker_that_takes_long_to_come_back_is_waited_for(tmp_path):
    # Dask's own patience is 15 s by default, which a busy machine can exceed.
    with (
        dask.config.set({"distributed.deploy.lost-worker-timeout": "10ms"}),
        local_cluster(1) as cluster,
    ):
        events = list(feed(Watched(cluster, tmp_path), give_away, [str(tmp_path)]))
        assert [event.result for event in events if isinstance(event, Done)] == ["fetched"]


def poll_until(cluster: local.LocalWorkers, running: int) -> None:
    deadline = time.monotonic() + 60
    while cluster.poll().running != running:
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def as_for_users() -> Iterator[None]:
    """Workers are processes that import all by themselves, not forked as elsewhere in tests."""
    with dask.config.set({"distributed.worker.multiprocessing-method": "spawn"}):
        yield


def test_a_worker_that_dies_while_it_starts_is_started_anew(as_for_users):
    others = worker_processes()
    with local_cluster(2) as cluster:
        wait_for(lambda: worker_processes() - others, 60).pop().kill()
        poll_until(cluster, 2)
        # The same when one comes back.
        mine = worker_processes() - others
        others |= mine
        mine.pop().kill()
        # Polled meanwhile, as a launcher does: its nanny may not have been done starting it.
        wait_for(lambda: cluster.poll() and worker_processes() - others, 60).pop().kill()
        poll_until(cluster, 1)
        poll_until(cluster, 2)


def worker_processes() -> set[psutil.Process]:
    found = set()
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if "spawn_main" in " ".join(process.cmdline()):
                found.add(process)
    return found


def test_workers_that_never_start_are_given_up(monkeypatch, as_for_users):
    monkeypatch.setenv("PYTHONHOME", "/nonexistent")
    monkeypatch.setitem(WORKER_ENVIRONMENT, "PYTHONHOME", "/nonexistent")
    with (
        local_cluster(1) as cluster,
        pytest.raises(ClusterError, match="worker processes end while they start"),
    ):
        poll_until(cluster, 1)


def test_a_machine_on_which_no_worker_comes_up_is_not_waited_for_for_ever(cluster, monkeypatch):
    monkeypatch.setattr(cluster.client, "nthreads", dict)
    assert cluster.poll() == Workers("local", running=0, starting=2, wanted=2)
    monkeypatch.setattr(local, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(ClusterError, match="no worker process for"):
        cluster.poll()


def decline_at_first(task: tuple[str, int]):
    """Decline the first task that any worker is given."""
    directory, number = task
    try:
        (Path(directory) / "declined").touch(exist_ok=False)
    except FileExistsError:
        return number
    return Declined(get_worker().address, "its time is up")


def test_a_worker_that_declines_leaves_and_another_does_its_task(tmp_path):
    with local_cluster(2) as cluster:
        tasks = [(str(tmp_path), number) for number in range(12)]
        events = list(feed(cluster, decline_at_first, tasks))
        assert cluster.poll().running == 1
    done = sorted(event.result for event in events if isinstance(event, Done))
    assert done == list(range(12))


def decline(task):
    return Declined(get_worker().address, "its time is up")


def test_a_worker_that_declines_leaves_even_if_there_is_no_other():
    with local_cluster(1) as cluster:
        deadline = time.monotonic() + 60
        for event in feed(cluster, decline, range(5), may_wait=lambda: not left(cluster)):
            assert isinstance(event, Polled)
            assert time.monotonic() < deadline
        assert cluster.poll().running == 0


def left(cluster: local.LocalWorkers) -> bool:
    return not cluster.client.nthreads()


def test_when_there_is_no_time_to_wait_what_runs_is_left(cluster):
    done: list[int] = []
    for event in feed(cluster, slowly, range(10_000), may_wait=lambda: len(done) < 5):
        if isinstance(event, Done):
            done.append(event.task)
    assert len(done) == 5


def test_when_time_is_up_what_runs_is_awaited_and_the_rest_is_left(cluster):
    drawn = []

    def tasks() -> Iterator[int]:
        for number in range(1000):
            drawn.append(number)
            yield number

    done: list[int] = []
    for event in feed(cluster, slowly, tasks(), lambda: len(done) < 5):
        if isinstance(event, Done):
            done.append(event.task)
    assert sorted(done) == drawn
    assert 5 <= len(done) <= 5 + 2 * feeding.TASKS_PER_WORKER


def test_tasks_are_drawn_only_a_few_per_worker_ahead(cluster):
    drawn = 0

    def tasks() -> Iterator[int]:
        nonlocal drawn
        for number in range(60):
            drawn += 1
            yield number

    finished = 0
    for event in feed(cluster, slowly, tasks()):
        if isinstance(event, Done):
            finished += 1
            assert drawn - finished <= 2 * feeding.TASKS_PER_WORKER


def test_workers_are_one_thread_each_on_loopback_with_tls(cluster):
    workers = cluster.client.scheduler_info(n_workers=-1)["workers"]
    assert len(workers) == 2
    assert all(worker["nthreads"] == 1 for worker in workers.values())
    assert all(address.startswith("tls://127.0.0.1:") for address in workers)
    threads = cluster.client.run(lambda: os.environ["OMP_NUM_THREADS"])
    assert set(threads.values()) == {"1"}


def test_each_visible_gpu_gets_one_worker_pinned_to_it(monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", lambda: ["2", "GPU-5ab"])
    with local_cluster() as cluster:
        cluster.client.wait_for_workers(2, timeout=60)
        pinned = cluster.client.run(lambda: os.environ["CUDA_VISIBLE_DEVICES"])
    assert sorted(pinned.values()) == ["2", "GPU-5ab"]


@pytest.mark.parametrize(
    ("variable", "count", "expected"),
    [(None, 2, ["0", "1"]), ("3,1", 2, ["3", "1"]), ("", 0, []), (None, 0, [])],
)
def test_visible_gpus_are_those_the_environment_allows(monkeypatch, variable, count, expected):
    if variable is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", variable)
    monkeypatch.setattr("torch.cuda.device_count", lambda: count)
    assert local.visible_gpus() == expected


def test_more_workers_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(local, "visible_gpus", lambda: ["0"])
    with pytest.raises(ConfigError, match="workers is 2, but 1 GPU"), local_cluster(2):
        pass
