"""A run from start to finish.

Check every input → create or open the store → list missing blocks → feed them to the cluster →
finish and export epochs as their blocks complete. What is done is recorded by the blocks
themselves, so a run can be stopped at any time and continued with the same command.
"""

from __future__ import annotations

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial

from daskcurv import surroundings
from daskcurv.atomic import discard_drafts
from daskcurv.clusters import open_cluster
from daskcurv.clusters.local import gpus_for
from daskcurv.clusters.time_limit import TimeLimit
from daskcurv.errors import CheckpointChangedError, ConfigError, DaskcurvError, ExportError
from daskcurv.experiment.data.prepared import prepare
from daskcurv.experiment.experiment import Experiment
from daskcurv.places import place_for
from daskcurv.runs.accounts.progress import Progress
from daskcurv.runs.accounts.record import RunRecord, recording
from daskcurv.runs.block import BlockReport, BlockTask, RunContext, score_block
from daskcurv.runs.cost import dry_run, warn_of_full_disk
from daskcurv.runs.extend import change_places, larger_store, probes_of, recover, smaller_store
from daskcurv.runs.inputs import check_places, experiment_of
from daskcurv.runs.opening import ready_store
from daskcurv.runs.options import LaunchOptions
from daskcurv.runs.plan import Plan, make_plan
from daskcurv.runs.window import TASKS_PER_WORKER, Done, SetAside, Waiting, feed
from daskcurv.runs.wording import workers_in_words
from daskcurv.storage import ResultsStore, export_epoch, launcher_lock
from daskcurv.storage.finite import count_not_finite, note_epochs, noted_epochs, told
from daskcurv.storage.lock import LauncherLock, beside
from daskcurv.storage.npy.write import is_exported

log = logging.getLogger(__name__)

ACCOUNT_SECONDS = 5.0
HOPELESS = 10
DRAIN_SECONDS = 60.0
"""Time that a launcher with a time limit reserves for ending, besides the running blocks."""
LAST_SECONDS = 25.0
"""Time before its limit at which it ends in any case, because its job would be killed then."""


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes
    ----------
    set_aside : int
        Blocks that failed repeatedly.
    left : int
        Blocks not computed because the launcher ran out of time.
    not_finite : int
        Results that are not finite numbers.
    """

    set_aside: int = 0
    left: int = 0
    not_finite: int = 0

    @property
    def complete(self) -> bool:
        """Whether every block has been computed."""
        return not (self.set_aside or self.left)

    @property
    def exit_code(self) -> int:
        """0 all done; 3 out of time; 1 blocks were set aside, or results are not finite."""
        return 3 if self.left else int(bool(self.set_aside or self.not_finite))

    @property
    def state(self) -> str:
        """The outcome in words."""
        if self.left:
            return "out of time"
        if self.set_aside:
            return "finished, some blocks failed"
        return "finished, with results that are not finite" if self.not_finite else "finished"


def launch(options: LaunchOptions) -> Outcome:
    """Compute what is missing of the experiment that the options name; see `launch_experiment`."""
    _check_surroundings(options)
    return _launch(experiment_of(options), options)


def launch_experiment(experiment: Experiment, options: LaunchOptions) -> Outcome:
    """Compute what is missing and export what is finished.

    Parameters
    ----------
    experiment : Experiment
    options : LaunchOptions
        Where results go and what computes them; the other options are not looked at.

    Returns
    -------
    Outcome

    Raises
    ------
    DaskcurvError
        If an input cannot be used, the store belongs to another configuration or launcher, or
        nothing more can be written.
    """
    _check_surroundings(options)
    check_places(options)
    experiment.check()
    return _launch(experiment, options)


def _check_surroundings(options: LaunchOptions) -> None:
    surroundings.remove_from(os.environ)
    for sentence in surroundings.neutralised():
        log.info("%s", sentence)
    for sentence in surroundings.remaining():
        log.warning("%s", sentence)
    if options.cluster.cluster == "local":
        gpus_for(options.cluster.workers, options.cluster.device)


def _launch(experiment: Experiment, options: LaunchOptions) -> Outcome:
    if options.dry_run:
        dry_run(options, experiment)
        return Outcome()
    with launcher_lock(options.store) as lock, recording(options.store, lock) as record:
        discard_drafts(options.store)
        recover(options.store)
        base = smaller_store(options.store, experiment.identity(), lock)
        if base is None:
            outcome = _run(options, experiment, record, lock)
        else:
            path = larger_store(base, experiment.estimator.n_probes, experiment.checkpoints)
            outcome = _run(replace(options, store=path), experiment, record, lock, base)
            if outcome.complete:
                change_places(options.store, path, lock)
        record.update(state=outcome.state)
        return outcome


def _run(
    options: LaunchOptions,
    experiment: Experiment,
    record: RunRecord,
    lock: LauncherLock,
    base: ResultsStore | None = None,
) -> Outcome:
    """Fill a store; `base` is one from which it takes the probes that are there."""
    store, checkpoints = ready_store(options, experiment, base, lock)
    plan = make_plan(options, experiment, checkpoints, store)
    log.info("store %s: %s", store.path, plan.summary())
    warn_of_full_disk(options, experiment.dataset, plan)
    epochs = [checkpoint.epoch for checkpoint in checkpoints]
    unexported = _unexported(options, store, epochs, base)
    record.update(store=str(store.root))
    run = _Run(options, store, plan, record)
    run.finish_epochs(epochs, export=unexported)
    if plan.missing.any():
        shared = beside(base.path if base else options.store, ".inputs")
        context = RunContext(
            experiment=experiment.travelling(prepare(experiment.dataset, shared)),
            store=store.root,
            shared=shared,
            device=options.device.type,
            batch_size=options.batch_size,
            base=base.root if base else None,
            base_probes=probes_of(base) if base else 0,
        )
        run.compute(context)
    return run.conclude()


class _Run:
    """The changing part of a run: what finished, what failed, time spent."""

    def __init__(self, options: LaunchOptions, store: ResultsStore, plan: Plan, record: RunRecord):
        self._options = options
        self._record = record
        self._store = store
        self._plan = plan
        self._left = {
            checkpoint.epoch: int(count)
            for checkpoint, count in zip(plan.checkpoints, plan.missing.sum(axis=1), strict=True)
        }
        self._set_aside: list[SetAside[BlockTask]] = []
        self._computed = 0
        self._time_limit = TimeLimit.of_job()
        self._seconds = dict(enumerate(store.read("compute_seconds").tolist()))
        self._sharers = dict(enumerate(store.read("num_workers").tolist()))
        self._methods = [{*text.split("; ")} - {""} for text in map(str, store.read("method"))]
        self._workers: defaultdict[int, set[str]] = defaultdict(set)
        self._unaccounted: set[int] = set()
        self._not_finite = set(noted_epochs(store))
        self._accounted = time.monotonic()

    def compute(self, context: RunContext) -> None:
        """Feed the missing blocks to a cluster."""
        missing = self._plan.missing
        todo = int(missing.any(axis=1).sum()), int(missing.sum())
        samples = int(self._plan.samples[missing].sum())
        if not self._has_time():
            raise ConfigError(
                f"the time limit of job {os.environ.get('SLURM_JOB_ID')} leaves no time to compute "
                "anything; set at least several minutes (--time)"
            )
        try:
            with (
                open_cluster(self._options.cluster, beside(context.store, ".cluster")) as cluster,
                Progress(*todo, samples) as progress,
            ):
                if cluster.dashboard:
                    log.info("dashboard: %s", cluster.dashboard)
                self._record.update(
                    cluster=self._options.cluster.cluster, dashboard=cluster.dashboard
                )
                score = partial(score_block, context)
                try:
                    tasks = self._plan.tasks()
                    for event in feed(cluster, score, tasks, self._has_time, self._can_wait):
                        self._handle(event, progress)
                finally:
                    self._record.update(running=0, **progress.state())
                    log.info("%s", progress.summary())
        finally:
            self._account()

    def _handle(
        self,
        event: Done[BlockTask, BlockReport] | SetAside[BlockTask] | Waiting,
        progress: Progress,
    ) -> None:
        match event:
            case Done(task, report):
                self._note(task, report)
                progress.block_done(task.samples)
                self._left[task.epoch] -= 1
                if self._left[task.epoch] == 0:
                    self.finish_epochs([task.epoch], export=[task.epoch])
                    progress.epoch_done()
            case SetAside(task, reason, error):
                self._set_aside.append(event)
                if isinstance(error, CheckpointChangedError):
                    # The record's size and time stand for another file, so they vouch for nothing.
                    self._store.set_epoch(task.row, checkpoint_size=-1, checkpoint_mtime_ns=-1)
                self._record.failed(str(task), reason)
                log.error("set aside: %s: %s", task, reason)
                if not self._computed and len(self._set_aside) >= HOPELESS:
                    raise DaskcurvError(
                        f"the first {HOPELESS} blocks all failed; the last error: {reason}. "
                        "Nothing was computed; see the log for details"
                    )
            case Waiting(workers, running, connected):
                progress.tick(workers_in_words(workers), running)
                self._record.update(running=running, fleet=asdict(workers))
                self._record.connected = connected
        if self._record.due:
            self._record.update(**progress.state())
            self._record.write()
        if time.monotonic() - self._accounted > ACCOUNT_SECONDS:
            self._account()

    def _has_time(self) -> bool:
        """Whether all that may be in a worker's hands would end before this process has to."""
        return self._time_limit.allows(blocks=TASKS_PER_WORKER + 1, seconds=DRAIN_SECONDS)

    def _can_wait(self) -> bool:
        return self._time_limit.allows(blocks=0, seconds=LAST_SECONDS)

    def _note(self, task: BlockTask, report: BlockReport) -> None:
        self._computed += 1
        self._time_limit.block_took(report.seconds)
        self._seconds[task.row] += report.seconds
        self._workers[task.row].add(report.worker)
        self._methods[task.row] |= {report.method} - {""}
        self._unaccounted.add(task.row)
        if report.not_finite and task.epoch not in self._not_finite:
            self._not_finite.add(task.epoch)
            note_epochs(self._store, self._not_finite)
            log.warning(
                "%s: %d of %d results are not finite numbers; the network overflows or its "
                "weights are invalid",
                task,
                report.not_finite,
                task.samples,
            )
        self._record.block_done(
            report.worker, report.device, str(task), report.seconds, report.address, report.job
        )
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

    def _count_not_finite(self) -> dict[int, int]:
        """Count the results that are not finite of the epochs that are known to have some."""
        counts = {
            epoch: count_not_finite(self._store, self._store.rows[epoch])
            for epoch in self._not_finite.intersection(self._store.rows)
        }
        counts = {epoch: count for epoch, count in counts.items() if count}
        if counts.keys() != self._not_finite:
            note_epochs(self._store, counts)  # some have been computed again
        return {epoch: count for epoch, count in counts.items() if epoch in self._left}

    def conclude(self) -> Outcome:
        """Say how the run ended."""
        finished = sum(not left for left in self._left.values())
        log.info("%d of %d epochs complete in %s", finished, len(self._left), self._store.path)
        if self._options.export:
            log.info("exported to %s", self._options.save_base_dir)
        if self._store.done_blocks().all():
            log.info("for faster queries: daskcurv compact %s OUT", self._store.path)
        if self._set_aside:
            log.error(
                "%d blocks failed repeatedly and were set aside; run the same command again to "
                "retry them:",
                len(self._set_aside),
            )
            for failure in self._set_aside:
                log.error("  %s: %s", failure.task, failure.reason)
        if not_finite := self._count_not_finite():
            log.error(
                "%d results are not finite numbers, at epochs %s: the network overflows or its "
                "weights are invalid. Check these checkpoints, or exclude them (--epochs)",
                sum(not_finite.values()),
                told(not_finite),
            )
        left = sum(self._left.values()) - len(self._set_aside)
        if left:
            log.warning(
                "the time limit of job %s is near: %d blocks are left; run the same command again "
                "to continue",
                os.environ.get("SLURM_JOB_ID"),
                left,
            )
        return Outcome(len(self._set_aside), left, sum(not_finite.values()))


def _unexported(
    options: LaunchOptions, store: ResultsStore, epochs: list[int], base: ResultsStore | None
) -> list[int]:
    """Return the epochs without an export, before hours are spent on one that cannot be made."""
    if not options.export:
        return []
    out = options.save_base_dir
    try:
        place_for(out).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ExportError(
            f"cannot export to {out}: {error.strerror}; choose another --save_base_dir, or add "
            "--no_export"
        ) from error
    return [epoch for epoch in epochs if not is_exported(store, out, epoch, supersedes=base)]
