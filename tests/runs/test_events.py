"""The loop's events, and observers that know nothing of each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from daskcurv.clusters.base import Workers
from daskcurv.clusters.options import ClusterOptions
from daskcurv.config import EstimatorConfig
from daskcurv.errors import DaskcurvError, ExportError, StoreWriteError
from daskcurv.experiment.checkpoints import Checkpoint
from daskcurv.experiment.curriculum import Schedule
from daskcurv.runs import loop
from daskcurv.runs.accounts.export import Export
from daskcurv.runs.accounts.store import StoreAccount
from daskcurv.runs.events import (
    Done,
    Ended,
    EpochComplete,
    Event,
    Failed,
    Opened,
    Polled,
    SetAside,
    Started,
    tell,
    watched,
)
from daskcurv.runs.launch import launch
from daskcurv.runs.options import LaunchOptions
from daskcurv.runs.plan import Plan
from daskcurv.storage import ResultsStore
from tests.support.events import done, task
from tests.support.launches import results
from tests.support.project import Project
from tests.support.stores import finish, make_store


def test_an_observer_from_python_counts_the_blocks_of_a_run(project: Project):
    seen: list[Event] = []
    options = LaunchOptions(
        epochs="all",
        data_path=project.data,
        model_dir=project.models,
        schedule=Schedule(4, 4, 2),
        estimator=EstimatorConfig(n_probes=1),
        store=project.store,
        save_base_dir=project.tree,
        batch_size=8,
        block_size=20,
        cluster=ClusterOptions(workers=1, device="cpu"),
    )
    outcome = launch(options, observers=[seen.append])
    assert outcome.complete
    count = Counter(type(event) for event in seen)
    status = results(project.store)["status"].values
    epochs = len(status)
    blocks = 3 * epochs
    assert (count[Done], count[EpochComplete], count[Failed], count[SetAside]) == (
        blocks, epochs, 0, 0,
    )  # fmt: skip
    assert seen[0] == Opened(project.store)
    assert seen[1] == Started("local", "", epochs, blocks, int((status == 1).sum()))
    assert seen[-1] == Ended()
    # Each epoch is complete right after its last block.
    left = dict.fromkeys(range(epochs), 3)
    for event in seen:
        if isinstance(event, Done):
            left[event.task.row] -= 1
        if isinstance(event, EpochComplete):
            assert event.computed
            assert left.pop(event.row) == 0
    assert not left


def test_every_observer_is_told_of_the_end_even_if_another_fails():
    told: list[str] = []

    def full_disk(event: Event) -> None:
        told.append("disk")
        raise StoreWriteError("disk full")

    with (
        pytest.raises(StoreWriteError, match="disk full"),
        watched([full_disk, lambda event: told.append(type(event).__name__)]),
    ):
        pass
    assert told == ["disk", "Ended"]


def test_an_observer_that_fails_ends_the_run():
    told: list[Event] = []

    def full_disk(event: Event) -> None:
        if isinstance(event, Done):
            raise StoreWriteError("disk full")

    with (
        pytest.raises(StoreWriteError, match="disk full"),
        watched([full_disk, told.append]) as all_of_them,
    ):
        all_of_them(done())
    assert told == [Ended()]


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """One epoch whose blocks are all there, not yet marked as complete."""
    store = finish(make_store(tmp_path / "curvature.zarr", 0))
    store.set_epoch(0, complete=False)
    return ResultsStore.open(store.path)


def test_an_epoch_is_complete_in_the_store_before_it_is_exported(store, tmp_path, monkeypatch):
    export = Export(store, tmp_path / "tree", [0])

    def fail(*_: object) -> None:
        assert ResultsStore.open(store.path).read("complete")[0]
        raise ExportError("disk full")

    monkeypatch.setattr("daskcurv.runs.accounts.export.export_epoch", fail)
    with pytest.raises(ExportError, match="disk full"):
        tell([StoreAccount(store), export], EpochComplete(0, 0))
    # The next launch finds what the export lacks.
    monkeypatch.undo()
    tell([Export(store, tmp_path / "tree", [0])], EpochComplete(0, 0, computed=False))
    assert (tmp_path / "tree/epoch_0000/metadata.json").exists()


def test_an_epoch_that_was_exported_before_is_exported_again_only_if_computed(store, tmp_path):
    tell([Export(store, tmp_path / "tree", [0])], EpochComplete(0, 0, computed=False))
    exported = tmp_path / "tree/epoch_0000"
    first = exported.stat().st_ino
    export = Export(store, tmp_path / "tree", [0])
    export(EpochComplete(0, 0, computed=False))
    assert exported.stat().st_ino == first
    export(EpochComplete(0, 0))
    assert exported.stat().st_ino != first


def test_time_workers_and_methods_are_in_the_store_before_an_epoch_is_complete(store):
    account = StoreAccount(store)
    before = float(store.read("compute_seconds")[0])
    account(done(worker="a:1"))
    account(done(worker="a:2"))
    account(EpochComplete(0, 0))
    opened = ResultsStore.open(store.path)
    assert opened.read("compute_seconds")[0] == pytest.approx(before + 20)
    assert opened.read("num_workers")[0] == 2
    assert opened.read("complete")[0]


def test_what_is_not_written_yet_is_written_at_the_end(store):
    account = StoreAccount(store)
    account(done(worker="a:1"))
    assert ResultsStore.open(store.path).read("compute_seconds")[0] == 0
    account(Ended())
    assert ResultsStore.open(store.path).read("compute_seconds")[0] == 10


def events_of(monkeypatch: pytest.MonkeyPatch, *fed: Event) -> tuple[list[Event], str]:
    """Run the loop on what the cluster gives; return the events, and the error if there was one."""

    @contextmanager
    def open_cluster(*_: object) -> Iterator[Any]:
        yield SimpleNamespace(dashboard="")

    monkeypatch.setattr(loop, "open_cluster", open_cluster)
    monkeypatch.setattr(loop, "feed", lambda *_, **__: iter(fed))
    # Epoch 7 is done, epoch 0 lacks both its blocks.
    done = np.array([[False, False], [True, True]])
    checkpoints = [Checkpoint(epoch, Path(), "", 0, 0) for epoch in (0, 7)]
    plan = Plan(checkpoints, {0: 0, 7: 1}, done, np.full(done.shape, 100))
    context: Any = SimpleNamespace(store=Path("store"))
    assert list(loop.complete_epochs(plan)) == [EpochComplete(7, 1, computed=False)]
    seen: list[Event] = []
    error = ""
    try:
        loop.compute(plan, context, ClusterOptions(), [seen.append])
    except DaskcurvError as raised:
        error = str(raised)
    return seen, error


def test_an_epoch_is_complete_after_its_last_block(monkeypatch):
    polled = Polled(Workers("local", 2), 2)
    first, second = done(block=1), done(block=0)
    seen, error = events_of(monkeypatch, polled, first, polled, second, polled)
    started = Started("local", "", epochs=1, blocks=2, samples=200)
    complete = EpochComplete(0, 0)
    assert seen == [started, polled, first, polled, second, complete, polled, Ended()]
    assert not error


def test_if_the_first_blocks_all_fail_the_run_ends_with_the_last_error(monkeypatch):
    failures = [SetAside(task(block=n), f"reason {n}") for n in range(loop.HOPELESS + 1)]
    seen, error = events_of(monkeypatch, *failures)
    # All of them are on record before it ends.
    assert seen[1:] == [*failures[:-1], Ended()]
    assert f"the first {loop.HOPELESS} blocks all failed" in error
    assert f"reason {loop.HOPELESS - 1}" in error


def test_after_a_block_that_was_computed_failures_do_not_end_the_run(monkeypatch):
    failures = [SetAside(task(block=n), "reason") for n in range(20)]
    seen, error = events_of(monkeypatch, done(), *failures)
    assert len(seen) == 1 + 1 + 20 + 1
    assert not error


def test_a_job_without_time_for_a_block_is_refused_before_any_worker_is_started(monkeypatch):
    monkeypatch.setattr("daskcurv.clusters.time_limit.seconds_left", lambda job: 30.0)
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    seen, error = events_of(monkeypatch)
    assert not seen
    assert "the time limit of job 17 leaves no time to compute anything" in error
