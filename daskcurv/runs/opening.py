"""The store that a run fills: opened or created, checked against the checkpoints, and repaired."""

from __future__ import annotations

import logging
from pathlib import Path

from tqdm import tqdm

import daskcurv
from daskcurv.errors import CheckpointError
from daskcurv.experiment.checkpoints import Checkpoint, check_all
from daskcurv.experiment.experiment import Experiment
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage import ResultsStore
from daskcurv.storage.chunks import shown
from daskcurv.storage.integrity.columns import damaged_columns, restore_columns
from daskcurv.storage.integrity.lost import count_of, lost_files
from daskcurv.storage.lock import LauncherLock
from daskcurv.storage.schema import DEFAULT_BLOCK_SIZE

log = logging.getLogger(__name__)

_FILE_COLUMNS = Checkpoint.COLUMNS[1:]


def ready_store(
    options: LaunchOptions,
    experiment: Experiment,
    base: ResultsStore | None,
    lock: LauncherLock | None = None,
) -> tuple[ResultsStore, list[Checkpoint]]:
    """Check the weights, and create the store or add to it and restore what it lacks.

    Parameters
    ----------
    options : LaunchOptions
    experiment : Experiment
    base : ResultsStore or None
        The store of fewer probes that the results are to build on.
    lock : LauncherLock, optional
        Held over the store; it stops whoever has lost it from changing the store.

    Returns
    -------
    store : ResultsStore
    checkpoints : list of Checkpoint
        By epoch.

    Raises
    ------
    CheckpointError
        If weights cannot be used, or are not those that the store was filled from.
    StoreError
    """
    store = open_existing(options, experiment, lock)
    checkpoints = check_checkpoints(experiment, store or base)
    if base is not None:
        say_what_is_lost(base)
        _note_changed_checkpoints(base, checkpoints)
    if store is None:
        store = ResultsStore.create(
            options.store,
            identity=experiment.identity(),
            samples={**experiment.sample_columns(), **experiment.sample_texts()},
            epochs=experiment.epoch_columns(checkpoints),
            block_size=base.block_size if base else options.block_size or DEFAULT_BLOCK_SIZE,
            attrs={
                "title": "curvature of the loss around training samples",
                "daskcurv_version": daskcurv.__version__,
                "class_names": list(experiment.dataset.class_names),
                "class_order_source": experiment.class_order_source,
            },
            lock=lock,
        )
        return store, checkpoints
    if options.block_size and options.block_size != store.block_size:
        log.info("the store's block size, %d, is kept", store.block_size)
    if damaged_columns(store):
        samples = {**experiment.sample_columns(), **experiment.sample_texts()}
        restore_columns(store, samples, experiment.epoch_columns(checkpoints))
    for row in sorted({one.row for one in lost_files(store)}):
        store.set_epoch(row, complete=False)
    _note_changed_checkpoints(store, checkpoints)
    added = [checkpoint for checkpoint in checkpoints if checkpoint.epoch not in store.rows]
    if added:
        store.add_epochs(experiment.epoch_columns(added))
    return store, checkpoints


def open_existing(
    options: LaunchOptions, experiment: Experiment, lock: LauncherLock | None = None
) -> ResultsStore | None:
    """Open the store if there is one; it has to be one that can be added to."""
    if not options.store.exists():
        return None
    store = ResultsStore.open(options.store, identity=experiment.identity(), lock=lock)
    store.refuse_if_compact()
    say_what_is_lost(store)
    return store


def say_what_is_lost(store: ResultsStore) -> None:
    """Warn of finished blocks with a missing file; they are computed again."""
    if lost := lost_files(store):
        log.warning(
            "results store %s lacks %s that it has recorded; these blocks will be "
            "computed again: %s",
            store.path,
            count_of(lost),
            shown(map(str, lost)),
        )


def check_checkpoints(experiment: Experiment, store: ResultsStore | None) -> list[Checkpoint]:
    """Read all weights completely, except files that match the store's record."""
    with tqdm(
        total=len(experiment.checkpoints), desc="checking weights", unit=" files", disable=None
    ) as bar:
        return check_all(
            experiment.checkpoints,
            experiment.network,
            _recorded(store) if store else {},
            on_done=lambda _: bar.update(),
            payload=experiment.payload,
            completed=experiment.with_all_outputs,
        )


def _recorded(store: ResultsStore) -> dict[int, Checkpoint]:
    if any(variable.name in _FILE_COLUMNS for variable in damaged_columns(store)):
        return {}
    sha256, size, mtime_ns = map(store.read, _FILE_COLUMNS)
    return {
        epoch: Checkpoint(epoch, Path(), str(sha256[row]), int(size[row]), int(mtime_ns[row]))
        for epoch, row in store.rows.items()
    }


def _note_changed_checkpoints(store: ResultsStore, checkpoints: list[Checkpoint]) -> None:
    """Refuse files that differ from those already scored; take over what is not on record."""
    done = store.done_blocks()
    recorded = store.read("checkpoint_sha256")
    changed = []
    for checkpoint in checkpoints:
        row = store.rows.get(checkpoint.epoch)
        if row is None or checkpoint.sha256 == recorded[row]:
            continue
        # The record is empty where its column was damaged and this epoch not in that launch.
        if recorded[row] and done[row].any():
            changed.append(str(checkpoint.epoch))
        else:
            store.set_epoch(row, **checkpoint.columns())
    if changed:
        raise CheckpointError(
            f"the checkpoints of epochs {', '.join(changed)} have changed since {store.path} was "
            "filled from them; restore the old files, exclude these epochs, or choose another "
            "--store"
        )
