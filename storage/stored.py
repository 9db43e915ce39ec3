"""Per-sample variables on disk, read where they are asked for."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.storage.chunks import Files, Key


class Stored:
    """A variable on disk, in one layout or in two.

    Parameters
    ----------
    by_epoch : Files
        Of an array of shape (E, N), in chunks that hold one epoch.
    by_sample : Files, optional
        The same values in chunks that hold all epochs of a few samples, in an order of their own.
    places : ndarray of int, shape (N,), optional
        Where each sample is in `by_sample`.
    """

    def __init__(
        self,
        by_epoch: Files,
        by_sample: Files | None = None,
        places: NDArray[np.integer[Any]] | None = None,
    ):
        self._by_epoch, self._by_sample, self._places = by_epoch, by_sample, places
        self.shape: tuple[int, ...] = by_epoch.array.shape
        self.dtype: np.dtype[Any] = by_epoch.array.dtype

    def read(self, key: Key) -> NDArray[Any]:
        """Return a selection.

        Raises
        ------
        StoreError
            If a file is damaged.
        """
        files, there = self.located(key)
        return files.read(there)

    def located(self, key: Key) -> tuple[Files, Key]:
        """Return the layout that has to be read least for a selection, and the selection in it."""
        if self._by_sample is not None and self._places is not None:
            there = key[0], _as_slice(self._places[key[1]])
            if _cost(self._by_sample, there) < _cost(self._by_epoch, key):
                return self._by_sample, there
        return self._by_epoch, key


def _as_slice(places: Any) -> Any:
    """Return consecutive places as a slice, which is quicker to read, and others as they are."""
    if not isinstance(places, np.ndarray):
        return int(places)
    if len(places) and (np.diff(places) == 1).all():
        return slice(int(places[0]), int(places[-1]) + 1)
    return places


def _cost(files: Files, key: Key) -> int:
    """Return about how many values are in the chunks that a selection touches."""
    cost = 1
    for selected, length, size in zip(key, files.array.shape, files.array.chunks, strict=True):
        if isinstance(selected, slice):
            chosen = range(*selected.indices(length))
            chunks = min(len(chosen), abs(chosen[-1] - chosen[0]) // size + 1) if chosen else 0
        else:
            chunks = len(np.unique(np.atleast_1d(selected) // size))
        cost *= chunks * size
    return cost
