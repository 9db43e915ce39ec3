"""A run from start to finish.

Check every input → create or open the store → list missing blocks → feed them to the cluster →
finish and export epochs as their blocks complete. What is done is recorded by the blocks
themselves, so a run can be stopped at any time and continued with the same command.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from daskcurv import surroundings
from daskcurv.atomic import discard_drafts
from daskcurv.clusters.local import gpus_for
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.preparation import prepare_encoded
from daskcurv.experiment.data.prepared import prepare
from daskcurv.experiment.experiment import Experiment
from daskcurv.runs.accounts.export import Export
from daskcurv.runs.accounts.progress import Progress
from daskcurv.runs.accounts.record import RunRecord, recording
from daskcurv.runs.accounts.run_file import RunFile
from daskcurv.runs.accounts.store import StoreAccount
from daskcurv.runs.accuracy import say_accuracy
from daskcurv.runs.block import RunContext
from daskcurv.runs.cost import dry_run, warn_of_full_disk
from daskcurv.runs.events import Observer, Opened, tell
from daskcurv.runs.extend import change_places, larger_store, probes_of, recover, smaller_store
from daskcurv.runs.inputs import as_used, check_places, experiment_of
from daskcurv.runs.loop import complete_epochs, compute
from daskcurv.runs.opening import check_checkpoints, ready_store
from daskcurv.runs.options import LaunchOptions
from daskcurv.runs.outcome import Conclusion, Outcome
from daskcurv.runs.plan import make_plan
from daskcurv.storage import ResultsStore, launcher_lock
from daskcurv.storage.lock import LauncherLock, beside

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)


def launch(options: LaunchOptions, observers: Sequence[Observer] = ()) -> Outcome:
    """Compute what is missing of the experiment that the options name; see `launch_experiment`."""
    _check_surroundings(options)
    experiment = experiment_of(options)
    return _launch(experiment, options, [RunFile(as_used(options, experiment)), *observers])


def launch_experiment(
    experiment: Experiment,
    options: LaunchOptions,
    observers: Sequence[Observer] = (),
    client: Client | None = None,
) -> Outcome:
    """Compute what is missing and export what is finished.

    Parameters
    ----------
    experiment : Experiment
    options : LaunchOptions
        Where results go and what computes them; the other options are not looked at.
    observers : sequence of callable, optional
        Each is called with every event of the run, `daskcurv.runs.events.Event`.
    client : distributed.Client, optional
        Of the workers to use; by default the options say where workers come from.

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
    return _launch(experiment, options, observers, client)


def _check_surroundings(options: LaunchOptions) -> None:
    surroundings.remove_from(os.environ)
    for sentence in surroundings.neutralised():
        log.info("%s", sentence)
    for sentence in surroundings.remaining():
        log.warning("%s", sentence)
    if options.cluster.cluster == "local":
        gpus_for(options.cluster.workers, options.cluster.device)


def _launch(
    experiment: Experiment,
    options: LaunchOptions,
    observers: Sequence[Observer],
    client: Client | None = None,
) -> Outcome:
    if options.dry_run:
        dry_run(options, experiment)
        return Outcome()
    with launcher_lock(options.store) as lock, recording(options.store, lock) as record:
        discard_drafts(options.store)
        recover(options.store)
        dataset = experiment.dataset
        if isinstance(dataset, Encoded):
            # Before hours are spent on decoding.
            check_checkpoints(experiment, None)
            say_accuracy(experiment)
            dataset = prepare_encoded(dataset, beside(options.store, ".inputs"))
            experiment = replace(experiment, dataset=dataset)
        base = smaller_store(options.store, experiment.identity(), lock)
        if base is None:
            outcome = _fill(options, experiment, record, lock, observers, client)
        else:
            path = larger_store(base, experiment.estimator.n_probes, experiment.checkpoints)
            larger = replace(options, store=path)
            outcome = _fill(larger, experiment, record, lock, observers, client, base)
            if outcome.complete:
                change_places(options.store, path, lock)
        record.end(outcome.state)
        return outcome


def _fill(
    options: LaunchOptions,
    experiment: Experiment,
    record: RunRecord,
    lock: LauncherLock,
    observers: Sequence[Observer],
    client: Client | None,
    base: ResultsStore | None = None,
) -> Outcome:
    """Fill a store; `base` is one from which it takes the probes that are there."""
    store, checkpoints = ready_store(options, experiment, base, lock)
    if not store.done_blocks().any():
        record.update(accuracy=say_accuracy(experiment))
    plan = make_plan(options, experiment, checkpoints, store)
    log.info("store %s: %s", store.path, plan.summary())
    warn_of_full_disk(options, experiment.dataset, plan)
    account, conclusion = StoreAccount(store), Conclusion(plan.left)
    # In this order: an epoch is marked as complete before it is exported. A launcher killed in
    # between finds, the next time, a complete epoch without an export.
    watching: list[Observer] = [account]
    if options.export:
        epochs = [checkpoint.epoch for checkpoint in checkpoints]
        watching.append(Export(store, options.save_base_dir, epochs, supersedes=base))
    watching += [Progress(), record, conclusion, *observers]
    tell(watching, Opened(store.root))
    for event in complete_epochs(plan):
        tell(watching, event)
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
        compute(plan, context, options.cluster, watching, client)
    log.info("%d of %d epochs complete in %s", *conclusion.epochs, store.path)
    if options.export:
        log.info("exported to %s", options.save_base_dir)
    if store.done_blocks().all():
        log.info("for faster queries: daskcurv compact %s OUT", store.path)
    return conclusion.outcome(account.count_not_finite())
