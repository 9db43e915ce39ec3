"""Exports epochs as they become complete."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from daskcurv.errors import ExportError
from daskcurv.places import place_for
from daskcurv.runs.events import EpochComplete, Event
from daskcurv.storage import ResultsStore, export_epoch
from daskcurv.storage.npy.write import is_exported

log = logging.getLogger(__name__)


class Export:
    """Observer that exports each complete epoch, unless there is an export of these results.

    Parameters
    ----------
    store : ResultsStore
    directory : Path
    epochs : iterable of int
        Epochs of the run.
    supersedes : ResultsStore, optional
        A store of which exports are replaced.

    Raises
    ------
    ExportError
        If nothing can be written there, before hours are spent.
    """

    def __init__(
        self,
        store: ResultsStore,
        directory: Path,
        epochs: Iterable[int],
        supersedes: ResultsStore | None = None,
    ):
        try:
            place_for(directory).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ExportError(
                f"cannot export to {directory}: {error.strerror}; choose another --save_base_dir, "
                "or add --no_export"
            ) from error
        self._store, self._directory = store, directory
        self._due = {
            epoch
            for epoch in epochs
            if not is_exported(store, directory, epoch, supersedes=supersedes)
        }

    def __call__(self, event: Event) -> None:
        """Export an epoch if it is complete."""
        match event:
            case EpochComplete(epoch, _, computed) if computed or epoch in self._due:
                export_epoch(self._store, self._directory, epoch)
                log.debug("exported epoch %d", epoch)
