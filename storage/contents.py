"""What a results store holds: its variables, epochs and blocks, and which of them are done.

Nothing here changes a store; that is `daskcurv.storage.working`'s.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.metadata import ArrayV3Metadata

from daskcurv.config import Identity
from daskcurv.errors import StoreError
from daskcurv.measures import FORMAT_1, Measure
from daskcurv.places import followed
from daskcurv.storage import schema
from daskcurv.storage.chunks import UNREADABLE, Files
from daskcurv.storage.group import array_of, open_group
from daskcurv.storage.stored import Stored
from daskcurv.storage.texts import check_texts


class StoreContents:
    """A store as it can be read.

    Parameters
    ----------
    path : Path

    Raises
    ------
    StoreError
        If it is not a store, or was made by a newer version.
    """

    def __init__(self, path: Path):
        self.path = path
        self.root = followed(path)
        """Where it is, whatever becomes of the current directory or of links."""
        self._group = open_group(path)
        attrs = dict(self._group.attrs)
        self.attrs: Mapping[str, Any] = attrs
        self.is_compact = attrs.get("layout") == schema.COMPACT
        self.identity = cast(Identity, attrs["identity"])
        self.fingerprint = cast(str, attrs["fingerprint"])
        self.block_size = cast(int, attrs["block_size"])
        self.measures = _listed(path, attrs)
        """What it holds for every sample at every epoch, beside the status."""
        self.per_sample = schema.per_sample(self.measures)
        """The variables of the measures, in order, and the status."""
        self.measured = self.per_sample[:-1]
        texts = {one.name for one in schema.SAMPLE_TEXTS if one.name in self._group}
        self.columns = schema.columns(texts)
        """The variables of one dimension."""
        self.variables = schema.all_variables(self.measures, texts)

    @property
    def num_samples(self) -> int:
        """Number of samples."""
        return self.array("sample").shape[0]

    @property
    def num_blocks(self) -> int:
        """Blocks per epoch."""
        return -(-self.num_samples // self.block_size)

    @cached_property
    def epochs(self) -> list[int]:
        """Epochs, in the order in which they were added."""
        epochs = cast(list[int], self._group.attrs["epochs"])
        # An interrupted addition can have left epochs whose rows are not there yet.
        return epochs[: self.array("epoch").shape[0]]

    @cached_property
    def rows(self) -> dict[int, int]:
        """Row of each epoch."""
        return {epoch: row for row, epoch in enumerate(self.epochs)}

    def bounds(self, block: int) -> tuple[int, int]:
        """Return the first sample of a block, and the one after its last."""
        start = block * self.block_size
        return start, min(start + self.block_size, self.num_samples)

    def array(self, name: str) -> zarr.Array[Any]:
        """Return a variable as it is stored.

        Raises
        ------
        StoreError
            If the store has none of that name.
        """
        try:
            return array_of(self._group, name)
        except KeyError:
            held = ", ".join(measure.name for measure in self.measures)
            raise StoreError(
                f"results store {self.path} has no {name}; its measures are {held}"
            ) from None

    def read(
        self, name: str, rows: int | slice | None = None, samples: slice = slice(None)
    ) -> NDArray[Any]:
        """Return a variable, or one epoch's row of it or several, or part of that.

        What has no file is as if it had never been written; see `daskcurv.storage.integrity.lost`.
        """
        if name in self.files:
            return self.files[name].read((slice(None) if rows is None else rows, samples))
        array = self.array(name)
        try:
            if array.dtype.kind in "OT":
                check_texts(self.root / name, array)
            return np.asarray(array[slice(None) if rows is None else (rows, samples)])
        except UNREADABLE as error:
            raise StoreError(
                f"{name} of results store {self.path} is damaged or cannot be read: {error}. "
                f"{self.remedy}"
            ) from error

    @property
    def can_be_launched(self) -> bool:
        """Whether a launch fills this store."""
        return not self.is_compact and "imported" not in self.attrs

    @property
    def remedy(self) -> str:
        """What to do about damage, as a sentence."""
        if self.is_compact:
            return "Make it again with daskcurv compact from the store it was made from"
        if "imported" in self.attrs:
            return "Import the tree again with daskcurv import_npy"
        return f"Mark it with daskcurv verify {self.path} --repair, and launch again"

    @property
    def column_remedy(self) -> str:
        """What to do about a damaged column, which a launch restores by itself."""
        return "Launch again to restore it" if self.can_be_launched else self.remedy

    @cached_property
    def files(self) -> Mapping[str, Files]:
        """The files of each per-sample variable, of both layouts in a compact store."""
        names = [variable.name for variable in self.per_sample]
        if self.is_compact:
            names += [schema.by_sample(name) for name in names]
        epochs = tuple(self.epochs)
        working = not self.is_compact
        return {
            name: Files(
                self.root,
                self.array(name),
                epochs,
                working,
                number >= len(self.per_sample),
                self.remedy,
            )
            for number, name in enumerate(names)
        }

    def stored(self, name: str) -> Stored:
        """Return a per-sample variable, to be read lazily."""
        if not self.is_compact:
            return Stored(self.files[name])
        return Stored(self.files[name], self.files[schema.by_sample(name)], self._places)

    @cached_property
    def _places(self) -> NDArray[np.int64]:
        """Where each sample is in the arrays by sample."""
        return np.argsort(self.read(schema.by_sample("sample")))

    def span(self, name: str, block: int) -> slice:
        """Return where a block is within an epoch of a per-sample variable, or of the digests."""
        return slice(block, block + 1) if name == schema.DIGEST.name else slice(*self.bounds(block))

    def read_block(self, name: str, row: int, block: int) -> NDArray[Any]:
        """Return a block of a per-sample variable, or its digests."""
        return self.read(name, row, self.span(name, block))

    def empty_epoch(self, name: str) -> NDArray[Any]:
        """Return an epoch of a per-sample variable, or of the digests, with nothing in it."""
        array = self.array(name)
        return np.full(array.shape[1:], array.fill_value, array.dtype)

    def has_file(self, name: str, row: int, block: int) -> bool:
        """Return whether there is a file for a block of a per-sample variable, or of its digests.

        Without one, what is read is as if it had never been written.
        """
        if name not in self.files:
            return self.is_compact or self.chunk_path(name, row, block).exists()
        files = self.files[name]
        return not files.lost(files.touched((row, slice(*self.bounds(block)))))

    def arrays(self) -> Iterator[tuple[str, zarr.Array[Any]]]:
        """Yield each array with its name, those of subgroups too."""
        for name in self.array_metadata():
            yield name, self.array(name)

    def array_metadata(self) -> dict[str, Any]:
        """Return what each array's own ``zarr.json`` should say, by name."""
        consolidated = self._group.metadata.consolidated_metadata
        assert consolidated is not None  # or it would not have opened
        return {
            name: json.loads(json.dumps(node.to_dict()))
            for name, node in consolidated.flattened_metadata.items()
            if isinstance(node, ArrayV3Metadata)
        }

    def is_done(self, row: int, block: int) -> bool:
        """Return whether a block has been written, and has all of its files."""
        status = self.chunk_path(schema.STATUS.name, row, block)
        if not self.is_compact and not (status.exists() and status.stat().st_size):
            return False
        return all(self.has_file(variable.name, row, block) for variable in self.per_sample)

    def done_blocks(self) -> NDArray[np.bool_]:
        """Return which blocks are done, as booleans of shape (rows, blocks)."""
        done = [self.done_in(row) for row in range(len(self.rows))]
        return np.array(done, dtype=bool).reshape(len(self.rows), self.num_blocks)

    def done_in(self, row: int) -> NDArray[np.bool_]:
        """Return which blocks of an epoch have been written, and have all of their files."""
        done = np.ones(self.num_blocks, dtype=bool)
        for variable in reversed(self.per_sample):
            done &= self._there(variable.name, row)
            if not done.any():
                break
        return done

    def recorded_in(self, row: int) -> NDArray[np.bool_]:
        """Return which blocks of an epoch are on record as done, whatever files they have lost."""
        return self._recorded(row, self._complete())

    def recorded_blocks(self, rows: Sequence[int] | None = None) -> NDArray[np.bool_]:
        """Return the same of some epochs, by default all, as booleans of shape (rows, blocks)."""
        rows = range(len(self.rows)) if rows is None else rows
        complete = self._complete()
        recorded = [self._recorded(row, complete) for row in rows]
        return np.array(recorded, dtype=bool).reshape(len(rows), self.num_blocks)

    def _recorded(self, row: int, complete: NDArray[np.bool_]) -> NDArray[np.bool_]:
        if self.is_compact or complete[row]:
            return np.ones(self.num_blocks, dtype=bool)
        return self._there(schema.STATUS.name, row)

    def _complete(self) -> NDArray[np.bool_]:
        try:
            return np.asarray(self.read("complete"), dtype=bool)
        except StoreError:
            return np.zeros(len(self.rows), dtype=bool)

    def _there(self, name: str, row: int) -> NDArray[np.bool_]:
        """Return of which blocks of an epoch a variable has the files."""
        files = self.files[name]
        # After a power cut, a status can be there by name and have no contents.
        with_content = name == schema.STATUS.name and not self.is_compact
        there = files.there(row // files.shape[0], with_content=with_content)
        starts = np.arange(self.num_blocks) * self.block_size
        ends = np.minimum(starts + self.block_size, self.num_samples) - 1
        lost_before = np.concatenate([[0], np.cumsum(~there)])
        lost = lost_before[ends // files.shape[1] + 1] - lost_before[starts // files.shape[1]]
        all_there: NDArray[np.bool_] = lost == 0
        return all_there

    def digest(self, variable: schema.Variable, row: int, block: int, values: NDArray[Any]) -> int:
        """Return the digest of a block of a variable: of its name, its place and its values."""
        place = f"{variable.name} {self.epochs[row]} {block} "
        content = np.ascontiguousarray(values, variable.dtype).tobytes()
        digest = hashlib.blake2b(place.encode() + content, digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def chunk_path(self, name: str, row: int, block: int) -> Path:
        """Return the file of a block of a per-sample variable, or of its digests."""
        path = self.root / name / "c" / str(row) / str(block)
        return path / "0" if name == schema.DIGEST.name else path


def _listed(path: Path, attrs: Mapping[str, Any]) -> tuple[Measure, ...]:
    """Return the measures that a store of any format lists."""
    if attrs["daskcurv_format"] == 1:
        return FORMAT_1
    try:
        measures = tuple(map(Measure.from_json, attrs[schema.MEASURES]))
        if len({measure.name for measure in measures}) < len(measures):
            raise ValueError("a measure is listed twice")
    except (TypeError, ValueError, AttributeError) as error:
        raise StoreError(
            f"results store {path} is damaged: its zarr.json has no list of measures ({error}). "
            "Restore that file from a copy, or choose another store",
            option="--store",
        ) from error
    return measures
