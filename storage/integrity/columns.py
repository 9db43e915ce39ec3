"""The one-dimensional variables of a results store, when they are damaged.

Whatever they say can be had again from the inputs of the run and from the blocks, except what only
the run itself knew: the time spent, the workers, and the methods used.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np

from daskcurv.errors import StoreError
from daskcurv.storage import schema
from daskcurv.storage.group import numpy_dtype
from daskcurv.storage.working import Columns, ResultsStore

log = logging.getLogger(__name__)


def damaged_columns(store: ResultsStore) -> list[schema.Variable]:
    """Return the one-dimensional variables that cannot be read, or have lost a file."""
    damaged = []
    for variable in store.columns:
        try:
            store.read(variable.name)
            whole = _has_files(store, variable)
        except StoreError:
            whole = False
        if not whole:
            damaged.append(variable)
    return damaged


def refuse_damaged_columns(store: ResultsStore, *, lost_only: bool = False) -> None:
    """Stop if a column cannot be read or has lost a file.

    Parameters
    ----------
    store : ResultsStore
    lost_only : bool
        Only look for lost files, which takes no reading.

    Raises
    ------
    StoreError
    """
    if lost_only:
        damaged = [variable for variable in store.columns if not _has_files(store, variable)]
    else:
        damaged = damaged_columns(store)
    if damaged:
        raise StoreError(
            f"{', '.join(variable.name for variable in damaged)} of results store {store.path} "
            f"cannot be read, or has lost its file. {store.column_remedy}"
        )


def restore_columns(store: ResultsStore, samples: Columns, epochs: Columns) -> None:
    """Write damaged columns anew; only the launcher calls this.

    Parameters
    ----------
    store : ResultsStore
    samples : mapping
        As for `ResultsStore.create`.
    epochs : mapping
        The same; rows of epochs that it does not have become empty.
    """
    known: dict[str, dict[int, Any]] = {
        variable.name: dict(zip(epochs["epoch"], epochs[variable.name], strict=True))
        for variable in schema.EPOCH_VARIABLES
    }
    known["epoch"] = {epoch: epoch for epoch in store.epochs}
    done = store.done_blocks()
    known["complete"] = {epoch: bool(done[row].all()) for epoch, row in store.rows.items()}
    for variable in damaged_columns(store):
        values = samples.get(variable.name)
        if values is None:
            found = known.get(variable.name, {})
            values = [found.get(epoch, variable.fill) for epoch in store.epochs]
        with store.changing():
            discard_column(store, variable)
            store.array(variable.name)[:] = np.asarray(values, dtype=numpy_dtype(variable))
        log.warning("%s of results store %s was damaged; restored", variable.name, store.path)


def discard_column(store: ResultsStore, variable: schema.Variable) -> None:
    """Make a one-dimensional variable missing, so that the next launch restores it."""
    with store.changing():
        for path in column_files(store, variable):
            path.unlink(missing_ok=True)


def _has_files(store: ResultsStore, variable: schema.Variable) -> bool:
    return all(path.exists() for path in column_files(store, variable))


def column_files(store: ResultsStore, variable: schema.Variable) -> list[Path]:
    """Return the files of a one-dimensional variable."""
    array = store.array(variable.name)
    count = -(-array.shape[0] // array.chunks[0])
    return [store.root / variable.name / "c" / str(chunk) for chunk in range(count)]
