"""A run from start to finish.

Check every input → create or open the store → list missing blocks → feed them to the cluster →
finish and export epochs as their blocks complete. What is done is recorded by the blocks
themselves, so a run can be stopped at any instant and the same command goes on.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

import daskcurv
from daskcurv.checkpoints import Checkpoint, check_all
from daskcurv.clusters import open_cluster
from daskcurv.clusters.slurm_commands import seconds_left
from daskcurv.dataset import prepare
from daskcurv.errors import CheckpointError, ConfigError, DaskcurvError, ExportError
from daskcurv.pipeline.feed import TASKS_PER_WORKER, Done, SetAside, Waiting, feed
from daskcurv.pipeline.inputs import Inputs, LaunchOptions, gather, sample_columns
from daskcurv.pipeline.more_probes import change_places, larger_store, recover, smaller_store
from daskcurv.pipeline.plan import Plan, active_samples
from daskcurv.pipeline.progress import Progress
from daskcurv.pipeline.task import BlockReport, BlockTask, RunContext, score_block
from daskcurv.storage import ResultsStore, export_epoch, launcher_lock, schema
from daskcurv.storage.export import is_exported
from daskcurv.storage.lock import beside
from daskcurv.storage.schema import DEFAULT_BLOCK_SIZE

log = logging.getLogger(__name__)

ACCOUNT_SECONDS = 5.0
HOPELESS = 10
DRAIN_SECONDS = 60.0
"""What a launcher with a time limit keeps of it for ending, beyond the blocks that are running."""
LAST_SECONDS = 25.0
"""So long before its limit it ends whatever happens, as its job would be ended otherwise."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes
    ----------
    set_aside : int
        Blocks that kept failing.
    left : int
        Blocks for which the launcher had no time left.
    """

    set_aside: int = 0
    left: int = 0

    @property
    def exit_code(self) -> int:
        """0 all done; 3 out of time; 1 some blocks were set aside."""
        return 3 if self.left else int(self.set_aside > 0)


def launch(options: LaunchOptions) -> Outcome:
    """Compute what is missing and export what is finished.

    Parameters
    ----------
    options : LaunchOptions

    Returns
    -------
    Outcome

    Raises
    ------
    DaskcurvError
        If an input cannot be used, the store belongs to another configuration or launcher, or
        nothing more can be written.
    """
    inputs = gather(options)
    if options.dry_run:
        _dry_run(options, inputs)
        return Outcome()
    with launcher_lock(options.store):
        recover(options.store)
        base = smaller_store(options.store, inputs.identity)
        if base is None:
            return _run(options, inputs)
        path = larger_store(base, options.estimator.n_probes, inputs.checkpoints)
        outcome = _run(replace(options, store=path), inputs, base)
        if not outcome.exit_code:
            change_places(options.store, path)
        return outcome


def _dry_run(options: LaunchOptions, inputs: Inputs) -> None:
    if base := smaller_store(options.store, inputs.identity):
        options = replace(
            options, store=larger_store(base, options.estimator.n_probes, inputs.checkpoints)
        )
    store = _open_existing(options, inputs)
    checkpoints = _check_weights(inputs, store)
    plan = _plan(options, inputs, checkpoints, store)
    log.info("store %s: %s", options.store, "exists" if store else "would be created")
    log.info("%s", plan.summary())


def _run(options: LaunchOptions, inputs: Inputs, base: ResultsStore | None = None) -> Outcome:
    """Fill a store; `base` is one from which it takes the probes that are there."""
    store, checkpoints = _ready_store(options, inputs, base)
    plan = _plan(options, inputs, checkpoints, store)
    log.info("store %s: %s", store.path, plan.summary())
    epochs = [checkpoint.epoch for checkpoint in checkpoints]
    unexported = _unexported(options, store, epochs, base)
    run = _Run(options, store, plan)
    run.finish_epochs(epochs, export=unexported)
    if plan.missing.any():
        context = RunContext(
            store=store.path.absolute(),
            prepared=prepare(
                inputs.dataset, beside(base.path if base else options.store, ".inputs")
            ),
            estimator=inputs.estimator,
            head=options.head,
            model=inputs.model,
            schedule=options.schedule,
            class_order=tuple(inputs.class_order.tolist()),
            device=options.device.type,
            batch_size=options.batch_size,
            base=base.path.absolute() if base else None,
            base_probes=base.identity["estimator"]["n_probes"] if base else 0,
        )
        run.compute(context)
    return run.conclude()


class _Run:
    """The changing part of a run: what finished, what failed, time spent."""

    def __init__(self, options: LaunchOptions, store: ResultsStore, plan: Plan):
        self._options = options
        self._store = store
        self._plan = plan
        self._left = {
            checkpoint.epoch: int(count)
            for checkpoint, count in zip(plan.checkpoints, plan.missing.sum(axis=1), strict=True)
        }
        self._set_aside: list[SetAside[BlockTask]] = []
        self._computed = 0
        self._deadline = _deadline()
        self._longest = 0.0
        self._seconds = dict(enumerate(store.read("compute_seconds").tolist()))
        self._sharers = dict(enumerate(store.read("num_workers").tolist()))
        self._methods = [{*text.split("; ")} - {""} for text in map(str, store.read("method"))]
        self._workers: defaultdict[int, set[str]] = defaultdict(set)
        self._unaccounted: set[int] = set()
        self._accounted = time.monotonic()

    def compute(self, context: RunContext) -> None:
        """Feed the missing blocks to a cluster."""
        missing = self._plan.missing
        todo = int(missing.any(axis=1).sum()), int(missing.sum())
        samples = int(self._plan.samples[missing].sum())
        if not self._has_time():
            raise ConfigError(
                f"the time limit of job {os.environ.get('SLURM_JOB_ID')} leaves no time to compute "
                "anything; give it several minutes at least (--time)"
            )
        try:
            with (
                open_cluster(self._options.cluster, beside(context.store, ".cluster")) as cluster,
                Progress(*todo, samples) as progress,
            ):
                score = partial(score_block, context)
                try:
                    tasks = self._plan.tasks()
                    for event in feed(cluster, score, tasks, self._has_time, self._can_wait):
                        self._handle(event, progress)
                finally:
                    log.info("%s", progress.line())
        finally:
            self._account()

    def _handle(
        self,
        event: Done[BlockTask, BlockReport] | SetAside[BlockTask] | Waiting,
        progress: Progress,
    ) -> None:
        match event:
            case Done(task, report):
                self._record(task, report)
                progress.block_done(task.samples)
                self._left[task.epoch] -= 1
                if self._left[task.epoch] == 0:
                    self.finish_epochs([task.epoch], export=[task.epoch])
                    progress.epoch_done()
            case SetAside(task, reason):
                self._set_aside.append(event)
                log.error("set aside: %s: %s", task, reason)
                if not self._computed and len(self._set_aside) >= HOPELESS:
                    raise DaskcurvError(
                        f"the first {HOPELESS} blocks all failed, the last with: {reason}. Nothing "
                        "was computed; the log has details"
                    )
            case Waiting(workers):
                progress.tick(workers)
        if time.monotonic() - self._accounted > ACCOUNT_SECONDS:
            self._account()

    def _has_time(self) -> bool:
        """Whether all that may be in a worker's hands would end before this process has to."""
        needed = (TASKS_PER_WORKER + 1) * self._longest + DRAIN_SECONDS
        return time.monotonic() + needed < self._deadline

    def _can_wait(self) -> bool:
        return time.monotonic() + LAST_SECONDS < self._deadline

    def _record(self, task: BlockTask, report: BlockReport) -> None:
        self._computed += 1
        self._longest = max(self._longest, report.seconds)
        self._seconds[task.row] += report.seconds
        self._workers[task.row].add(report.worker)
        self._methods[task.row] |= {report.method} - {""}
        self._unaccounted.add(task.row)
        log.debug("%s %s", task, report)

    def _account(self) -> None:
        """Write the time spent; at most a few seconds' worth is lost if the launcher is killed."""
        for row in sorted(self._unaccounted):
            self._sharers[row] = max(self._sharers[row], len(self._workers[row]))
            self._store.set_epoch(
                row,
                compute_seconds=self._seconds[row],
                num_workers=self._sharers[row],
                method="; ".join(sorted(self._methods[row])),
            )
        self._unaccounted.clear()
        self._accounted = time.monotonic()

    def finish_epochs(self, epochs: Iterable[int], export: Iterable[int]) -> None:
        """Mark those of `epochs` that have all blocks as complete; export them if they are due."""
        due = set(export) if self._options.export else set()
        complete = self._store.read("complete")
        for epoch in epochs:
            if self._left[epoch]:
                continue
            row = self._store.rows[epoch]
            if not complete[row]:
                self._account()
                self._store.set_epoch(row, complete=True)
            if epoch in due:
                export_epoch(self._store, self._options.save_base_dir, epoch)
                log.debug("exported epoch %d", epoch)

    def conclude(self) -> Outcome:
        """Say how the run ended."""
        finished = sum(not left for left in self._left.values())
        log.info("%d of %d epochs complete in %s", finished, len(self._left), self._store.path)
        if self._options.export:
            log.info("exported to %s", self._options.save_base_dir)
        if self._set_aside:
            log.error(
                "%d blocks kept failing and were set aside; the same command tries them again:",
                len(self._set_aside),
            )
            for failure in self._set_aside:
                log.error("  %s: %s", failure.task, failure.reason)
        left = sum(self._left.values()) - len(self._set_aside)
        if left:
            log.warning(
                "the time limit of job %s is near: %d blocks are left, the same command goes on",
                os.environ.get("SLURM_JOB_ID"),
                left,
            )
        return Outcome(len(self._set_aside), left)


def _deadline() -> float:
    """Return when this process has to end, by the monotonic clock, if SLURM has set it a limit."""
    job = os.environ.get("SLURM_JOB_ID")
    left = seconds_left(job) if job else None
    return math.inf if left is None else time.monotonic() + left


def _ready_store(
    options: LaunchOptions, inputs: Inputs, base: ResultsStore | None
) -> tuple[ResultsStore, list[Checkpoint]]:
    """Check the weights, and create the store or add to it what it lacks."""
    store = _open_existing(options, inputs)
    checkpoints = _check_weights(inputs, store or base)
    if base is not None:
        _note_changed_checkpoints(base, checkpoints)
    if store is None:
        store = ResultsStore.create(
            options.store,
            identity=inputs.identity,
            samples=sample_columns(inputs, options),
            epochs=_epoch_columns(checkpoints, inputs, options),
            block_size=base.block_size if base else options.block_size or DEFAULT_BLOCK_SIZE,
            attrs={
                "title": "curvature of the loss around training samples",
                "daskcurv_version": daskcurv.__version__,
                "class_names": list(inputs.dataset.class_names),
                "class_order_source": inputs.class_order_source,
            },
        )
        return store, checkpoints
    if options.block_size and options.block_size != store.block_size:
        log.info("the store's block size, %d, is kept", store.block_size)
    _note_changed_checkpoints(store, checkpoints)
    added = [checkpoint for checkpoint in checkpoints if checkpoint.epoch not in store.rows]
    if added:
        store.add_epochs(_epoch_columns(added, inputs, options))
    return store, checkpoints


def _open_existing(options: LaunchOptions, inputs: Inputs) -> ResultsStore | None:
    if not options.store.exists():
        return None
    return ResultsStore.open(options.store, identity=inputs.identity)


def _check_weights(inputs: Inputs, store: ResultsStore | None) -> list[Checkpoint]:
    known = {}
    if store is not None:
        sha256, size, mtime_ns = map(
            store.read, ("checkpoint_sha256", "checkpoint_size", "checkpoint_mtime_ns")
        )
        known = {
            epoch: Checkpoint(epoch, Path(), str(sha256[row]), int(size[row]), int(mtime_ns[row]))
            for epoch, row in store.rows.items()
        }
    with tqdm(
        total=len(inputs.checkpoints), desc="checking weights", unit=" files", disable=None
    ) as bar:
        return check_all(inputs.checkpoints, inputs.model, known, on_done=lambda _: bar.update())


def _note_changed_checkpoints(store: ResultsStore, checkpoints: list[Checkpoint]) -> None:
    """Refuse files that differ from those already scored; take over those not scored yet."""
    done = store.done_blocks()
    recorded = store.read("checkpoint_sha256")
    changed = []
    for checkpoint in checkpoints:
        row = store.rows.get(checkpoint.epoch)
        if row is None or checkpoint.sha256 == recorded[row]:
            continue
        if done[row].any():
            changed.append(str(checkpoint.epoch))
        else:
            store.set_epoch(row, **_checkpoint_columns(checkpoint))
    if changed:
        raise CheckpointError(
            f"the checkpoints of epochs {', '.join(changed)} have changed since {store.path} was "
            "filled from them; put the old files back, leave these epochs out, or choose another "
            "--store"
        )


def _checkpoint_columns(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.path.name,
        "checkpoint_sha256": checkpoint.sha256,
        "checkpoint_size": checkpoint.size,
        "checkpoint_mtime_ns": checkpoint.mtime_ns,
    }


def _epoch_columns(
    checkpoints: list[Checkpoint], inputs: Inputs, options: LaunchOptions
) -> dict[str, list[Any]]:
    schedule, num_classes = options.schedule, len(inputs.class_order)
    rows = [
        {
            "epoch": checkpoint.epoch,
            "task": schedule.task(checkpoint.epoch, num_classes),
            "num_active_classes": schedule.num_active(checkpoint.epoch, num_classes),
            **_checkpoint_columns(checkpoint),
        }
        for checkpoint in checkpoints
    ]
    return {v.name: [row[v.name] for row in rows] for v in schema.EPOCH_VARIABLES}


def _plan(
    options: LaunchOptions,
    inputs: Inputs,
    checkpoints: list[Checkpoint],
    store: ResultsStore | None,
) -> Plan:
    """Plan the work; epochs that the store lacks are planned as if it had them."""
    num_samples = len(inputs.dataset)
    block_size = store.block_size if store else options.block_size or DEFAULT_BLOCK_SIZE
    block_size = min(block_size, num_samples)
    rows = dict(store.rows) if store else {}
    for checkpoint in checkpoints:
        rows.setdefault(checkpoint.epoch, len(rows))
    done = np.zeros((len(rows), -(-num_samples // block_size)), dtype=bool)
    if store:
        done[: len(store.rows)] = store.done_blocks()
    first_active = np.asarray(sample_columns(inputs, options)["first_epoch_active"], np.int64)
    epochs = [checkpoint.epoch for checkpoint in checkpoints]
    return Plan(checkpoints, rows, done, active_samples(first_active, epochs, block_size))


def _unexported(
    options: LaunchOptions, store: ResultsStore, epochs: list[int], base: ResultsStore | None
) -> list[int]:
    """Return the epochs without an export, before hours are spent on one that cannot be made."""
    if not options.export:
        return []
    out = options.save_base_dir
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"cannot export to {out}: {error.strerror}; choose another --save_base_dir, or add "
            "--no_export"
        ) from error
    return [epoch for epoch in epochs if not is_exported(store, out, epoch, supersedes=base)]
