"""Files that a results store has on record and that are gone.

Such a file reads as if it had never been written: sums would be finite and too small. So whoever
answers from a store looks here first, by listing directories, and stops unless told otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import StoreError
from daskcurv.storage import schema
from daskcurv.storage.chunks import Files, shown
from daskcurv.storage.integrity.columns import refuse_damaged_columns
from daskcurv.storage.working import ResultsStore


@dataclass(frozen=True)
class Lost:
    """A file that is on record and gone.

    Attributes
    ----------
    where : str
        For example ``"epoch 200 block 3"``.
    name : str
        The variable.
    row : int
        The first, or only, row of the store that it holds.
    """

    where: str
    name: str
    row: int

    def __str__(self) -> str:
        return f"{self.where}: {self.name}"


def lost_files(store: ResultsStore, epochs: Iterable[int] | None = None) -> list[Lost]:
    """Return the files of finished blocks that are gone, by epoch.

    Parameters
    ----------
    store : ResultsStore
    epochs : iterable of int, optional
        By default all of the store.
    """
    rows = range(len(store.rows)) if epochs is None else [store.rows[epoch] for epoch in epochs]
    recorded = dict(zip(rows, store.recorded_blocks(rows), strict=True))
    lost: list[Lost] = []
    for files in store.files.values():
        lost += _lost(files, recorded)
    return sorted(lost, key=lambda one: one.row)


def _lost(files: Files, recorded: dict[int, NDArray[np.bool_]]) -> Iterator[Lost]:
    # A row of files, unless it is one of blocks, holds several epochs, all of them on record.
    for number in sorted({row // files.shape[0] for row in recorded}):
        # A status without contents is what a power cut leaves of one.
        empty_too = files.of_blocks and files.name == schema.STATUS.name
        missing = ~files.there(number, with_content=empty_too)
        if files.of_blocks:
            missing &= recorded[number]
        for place in np.flatnonzero(missing).tolist():
            yield Lost(files.where((number, place)), files.name, number * files.shape[0])


def refuse_lost(store: ResultsStore, epochs: Iterable[int] | None = None) -> None:
    """Stop if a store has lost something that it has on record.

    Parameters
    ----------
    store : ResultsStore
    epochs : iterable of int, optional
        By default all of the store.

    Raises
    ------
    StoreError
        The text names blocks and variables.
    """
    refuse_damaged_columns(store)
    refuse_lost_blocks(store, epochs)


def refuse_lost_blocks(store: ResultsStore, epochs: Iterable[int] | None = None) -> None:
    """Stop if a store has lost blocks, as `refuse_lost` does; its columns are not looked at."""
    if lost := lost_files(store, epochs):
        raise StoreError(
            f"results store {store.path} has lost {count_of(lost)} that it has on record: "
            f"{shown(map(str, lost))}. {store.remedy}"
        )


def count_of(lost: list[Lost]) -> str:
    """Return a number of files in words."""
    return f"{len(lost)} file{'s' if len(lost) > 1 else ''}"
