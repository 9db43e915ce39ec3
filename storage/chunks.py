"""The files of a per-sample variable: which are there, and what is in them.

File systems lose single files: scratch space is purged, a copy breaks off. Zarr takes a chunk
without a file for one that was never written, and fills it in. So whoever reads asks here which
files are there.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from daskcurv.errors import StoreError

Key = tuple[Any, ...]
"""For each dimension an integer, a slice, or an array of integers: an orthogonal selection."""

File = tuple[int, int]
"""Place of a file in the grid of a variable's files."""

UNREADABLE = (OSError, RuntimeError, ValueError)
"""What Zarr and its codecs raise for a file that is cut, or whose checksum is wrong."""

_SHOWN = 5


@dataclass(frozen=True)
class Files:
    """The files of a per-sample variable, in one of its layouts.

    Attributes
    ----------
    store : Path
    array : zarr.Array
        Two-dimensional: epochs × samples.
    epochs : tuple of int
        Of each row.
    of_blocks : bool
        Whether a file is a block, as in a store that is being filled.
    by_sample : bool
        Whether samples are in an order of their own, as in the second layout of a compact store.
    remedy : str
        What to do about damage.
    """

    store: Path
    array: zarr.Array[Any]
    epochs: tuple[int, ...]
    of_blocks: bool
    by_sample: bool
    remedy: str

    @property
    def name(self) -> str:
        """Name of the array."""
        return self.array.path

    @cached_property
    def shape(self) -> tuple[int, int]:
        """Epochs and samples of a file."""
        rows, samples = self.array.shards or self.array.chunks
        return rows, samples

    @cached_property
    def counts(self) -> tuple[int, int]:
        """Files in each dimension."""
        rows, samples = self.array.shape
        return -(-rows // self.shape[0]), -(-samples // self.shape[1])

    def path(self, file: File) -> str:
        """Return where a file is."""
        # As text, since this is asked for every chunk that is read.
        return f"{self.store}/{self.name}/c/{file[0]}/{file[1]}"

    def where(self, file: File) -> str:
        """Return what a file holds, for example ``"epoch 200 block 3"``."""
        if self.of_blocks:
            return f"epoch {self.epochs[file[0]]} block {file[1]}"
        first, last = (
            (number * size, min((number + 1) * size, count) - 1)
            for number, size, count in zip(file, self.shape, self.array.shape, strict=True)
        )
        rows = f"epochs {self.epochs[first[0]]} to {self.epochs[first[1]]}"
        samples = f"{'places' if self.by_sample else 'samples'} {last[0]} to {last[1]}"
        return f"{rows}, {samples}"

    def there(self, number: int, *, with_content: bool = False) -> NDArray[np.bool_]:
        """Return which files of a row of files are there, by listing a directory.

        Parameters
        ----------
        number : int
        with_content : bool
            Leave out empty ones.
        """
        there = np.zeros(self.counts[1], dtype=bool)
        try:
            with os.scandir(f"{self.store}/{self.name}/c/{number}") as entries:
                # What is no number is from an interrupted write, or from another program.
                found = [
                    entry.name
                    for entry in entries
                    if not with_content or (entry.name.isdecimal() and entry.stat().st_size)
                ]
        except (FileNotFoundError, NotADirectoryError):
            return there
        numbers = [self._number[name] for name in found if name in self._number]
        there[numbers] = True
        return there

    @cached_property
    def _number(self) -> dict[str, int]:
        return {str(number): number for number in range(self.counts[1])}

    def touched(self, key: Key) -> list[File]:
        """Return the files that a selection is in."""
        numbers: list[list[int]] = []
        for chosen, count in zip(self._numbers(key), self.counts, strict=True):
            touched = np.zeros(count, dtype=bool)
            touched[chosen] = True
            numbers.append(np.flatnonzero(touched).tolist())
        rows, samples = numbers
        return list(product(rows, samples))

    def _numbers(self, key: Key) -> list[NDArray[np.int64]]:
        """Return for each dimension in which files what is selected is."""
        return [
            np.arange(length)[selected] // size
            for selected, length, size in zip(key, self.array.shape, self.shape, strict=True)
        ]

    def lost(self, files: Iterable[File]) -> list[File]:
        """Return which of some files are not there."""
        return [file for file in files if not os.path.exists(self.path(file))]  # noqa: PTH110

    def mask(self, key: Key, files: Iterable[File]) -> NDArray[np.bool_]:
        """Return which values of a selection are in some files."""
        rows, samples = self._numbers(key)
        masked = np.zeros((*np.shape(rows), *np.shape(samples)), dtype=bool)
        for row, sample in files:
            masked |= np.logical_and.outer(rows == row, samples == sample)
        return masked

    def read(self, key: Key) -> NDArray[Any]:
        """Return a selection.

        Raises
        ------
        StoreError
            If a file is damaged; the text says which.
        """
        try:
            return self._select(key)
        except UNREADABLE as error:
            damaged = [file for file in self.touched(key) if not self._can_be_read(file)]
            what = shown(f"{self.where(file)}: {self.name}" for file in damaged) or self.name
            raise StoreError(
                f"results store {self.store} is damaged or cannot be read at {what}: {error}. "
                f"{self.remedy}"
            ) from error

    def _select(self, key: Key) -> NDArray[Any]:
        if any(isinstance(selected, np.ndarray) for selected in key):
            return np.asarray(self.array.oindex[key])
        return np.asarray(self.array[key])

    def _can_be_read(self, file: File) -> bool:
        places = zip(file, self.shape, strict=True)
        try:
            self._select(
                tuple(slice(number * size, (number + 1) * size) for number, size in places)
            )
        except UNREADABLE:
            return False
        return True


def shown(texts: Iterable[str]) -> str:
    """Return the first few of some texts as one, and how many more there are."""
    all_of_them = list(texts)
    more = len(all_of_them) - _SHOWN
    return "; ".join(all_of_them[:_SHOWN]) + (f"; and {more} more" if more > 0 else "")
