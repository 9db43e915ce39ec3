"""The results store while it is being filled.

Two rules carry everything that is promised about interrupted runs.

*Chunk = block = task.* A block is one chunk of every per-sample variable, each written whole, and
``status`` last. The presence of the status chunk is the record that the block was done; nothing
else remembers the progress of an epoch that is not complete. A block that is on record and has lost
one of its files is done no longer. No two tasks share a chunk.

*A digest binds a block to its place.* Beside the measures of a block, a digest of each is written.
A checksum inside a file cannot tell when a whole file is in another's place.

*One file decides.* The group's ``zarr.json`` holds consolidated metadata and is replaced in one
rename. The template is built beside and renamed into place; epochs are added by preparing their
rows first and replacing that file last. A reader sees the store before or after, never between.

Both rest on a file system on which a rename within a directory is atomic, which POSIX asks for,
and on files being durable before the rename that vouches for them, which is why blocks are synced.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.core.metadata import ArrayV3Metadata

from daskcurv.config import Identity, differences, fingerprint
from daskcurv.errors import StoreError
from daskcurv.files import followed, sync, whole_directory, write_whole
from daskcurv.storage import schema
from daskcurv.storage.chunks import UNREADABLE, Files
from daskcurv.storage.group import (
    CODECS,
    array_of,
    consolidate,
    numpy_dtype,
    open_group,
    writing,
)
from daskcurv.storage.lazy import Stored
from daskcurv.storage.lock import LauncherLock
from daskcurv.storage.template import write_template

log = logging.getLogger(__name__)

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]


class ResultsStore:
    """A store open for writing blocks (workers) or epochs (the launcher).

    Use :meth:`create` or :meth:`open`.
    """

    def __init__(self, path: Path, lock: LauncherLock | None = None):
        self.path = path
        self.root = followed(path)
        """Where it is, whatever becomes of the current directory or of links."""
        self._lock = lock
        self._group = open_group(path)
        attrs = dict(self._group.attrs)
        self.attrs: Mapping[str, Any] = attrs
        self.is_compact = attrs.get("layout") == schema.COMPACT
        self.identity = cast(Identity, attrs["identity"])
        self.fingerprint = cast(str, attrs["fingerprint"])
        self.block_size = cast(int, attrs["block_size"])

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        identity: Identity,
        samples: Columns,
        epochs: Columns,
        block_size: int = schema.DEFAULT_BLOCK_SIZE,
        attrs: Mapping[str, Any] | None = None,
        lock: LauncherLock | None = None,
    ) -> ResultsStore:
        """Create a store with nothing computed.

        Parameters
        ----------
        path : Path
            Must not exist.
        identity : dict
            Scientific configuration that the store is bound to.
        samples : mapping
            A column of length N for each of `schema.SAMPLE_VARIABLES`.
        epochs : mapping
            A column for each of `schema.EPOCH_VARIABLES`.
        block_size : int
            Samples per block; at most N are used.
        attrs : mapping, optional
            Further attributes, for the reader's benefit.
        lock : LauncherLock, optional
            As for `open`.

        Raises
        ------
        StoreWriteError
            If the directory cannot be written.
        """
        num_samples = len(samples["sample"])
        block_size = min(block_size, num_samples)
        if path.exists():
            raise StoreError(
                f"{path} exists; open that results store, or choose another store", option="--store"
            )
        with writing(f"results store {path}"), whole_directory(path) as building:
            write_template(building, identity, samples, block_size, attrs or {})
            # With the lock, so that it is held just before the store gets its name.
            cls(building, lock)._append_rows(epochs)
        return cls.open(path, lock=lock)

    @classmethod
    def open(
        cls, path: Path, *, identity: Identity | None = None, lock: LauncherLock | None = None
    ) -> ResultsStore:
        """Open an existing store.

        Parameters
        ----------
        path : Path
        identity : dict, optional
            If given, the store must have been made with it.
        lock : LauncherLock, optional
            Held by whoever is to change more than blocks. It then covers this store too, and
            before every such change it is made sure that it is still held.

        Raises
        ------
        StoreError
            If it is not a store, was made by a newer version, or has another identity; the text
            then lists the fields that differ.
        """
        store = cls(path, lock)
        if identity is not None and store.fingerprint != fingerprint(identity):
            lines = differences(store.identity, identity)
            raise StoreError(
                f"results store {path} was made with another configuration:\n  "
                + "\n  ".join(lines)
                + "\nChange these settings back, or choose another --store"
            )
        if lock is not None:
            lock.cover(path)
        return store

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold a change of anything but blocks: refused by the system, or without the lock.

        Raises
        ------
        StoreWriteError
        """
        with writing(f"results store {self.path}"):
            self._check_lock()
            yield

    def _check_lock(self) -> None:
        if self._lock is not None:
            self._lock.check()

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
        """Return a variable as it is stored."""
        return array_of(self._group, name)

    def read(
        self, name: str, rows: int | slice | None = None, samples: slice = slice(None)
    ) -> NDArray[Any]:
        """Return a variable, or one epoch's row of it or several, or part of that.

        What has no file is as if it had never been written; see `daskcurv.storage.lost`.
        """
        if name in self.files:
            return self.files[name].read((slice(None) if rows is None else rows, samples))
        try:
            return np.asarray(self.array(name)[slice(None) if rows is None else (rows, samples)])
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
        names = [variable.name for variable in schema.PER_SAMPLE]
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
                number >= len(schema.PER_SAMPLE),
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

    def add_array(self, name: str, values: NDArray[Any], long_name: str) -> None:
        """Add a variable of text with a value for each epoch; whoever does then consolidates."""
        array = self._group.create_array(
            name,
            shape=values.shape,
            chunks=(schema.EPOCH_CHUNK,),
            dtype="str",
            dimension_names=("epoch",),
            attributes={"long_name": long_name},
            compressors=CODECS,
        )
        array[:] = values

    def rewrite_metadata(self, name: str) -> None:
        """Write an array's own ``zarr.json`` anew from the store's."""
        with self.changing():
            text = json.dumps(self.array_metadata()[name], indent=2)
            write_whole(self.root / name / "zarr.json", text.encode())

    def refuse_if_compact(self) -> None:
        """Raise a StoreError if this is a store for reading."""
        if self.is_compact:
            raise StoreError(
                f"{self.path} was made by compact, for reading; add to the results store that it "
                "was made from, and compact that again"
            )

    def add_epochs(self, epochs: Columns) -> None:
        """Append rows for epochs that the store does not have yet.

        Only the launcher calls this, before any block of the new rows is written. Interrupted, it
        leaves the store as it was.

        Parameters
        ----------
        epochs : mapping
            A column for each of `schema.EPOCH_VARIABLES`, all of one length.
        """
        self.refuse_if_compact()
        seen = Counter([*self.rows, *map(int, epochs["epoch"])])
        if repeated := [epoch for epoch, times in seen.items() if times > 1]:
            raise StoreError(f"results store {self.path} would have epochs {repeated} twice")
        with self.changing():
            self._append_rows(epochs)
        self._group = open_group(self.root)
        self.__dict__.pop("epochs", None)
        self.__dict__.pop("rows", None)
        self.__dict__.pop("files", None)

    def _append_rows(self, epochs: Columns) -> None:
        count, start = len(epochs["epoch"]), len(self.rows)
        for variable in schema.ALL_VARIABLES:
            if variable.dims[0] != "epoch":
                continue
            array = self.array(variable.name)
            array.resize((start + count, *array.shape[1:]))
            if variable in schema.COLUMNS:
                values = epochs.get(variable.name, [variable.fill] * count)
                array[start:] = np.asarray(values, dtype=numpy_dtype(variable))
        self._check_lock()
        self._group.update_attributes({"epochs": [*self.epochs, *map(int, epochs["epoch"])]})
        consolidate(self.root)

    def set_epoch(self, row: int, **values: bool | float | int | str) -> None:
        """Write per-epoch variables of one row; only the launcher does."""
        with self.changing():
            for name, value in values.items():
                self.array(name)[row] = value

    def write_block(self, row: int, block: int, values: Mapping[str, NDArray[Any]]) -> None:
        """Write a block, its status last.

        Parameters
        ----------
        row, block : int
        values : mapping
            For `status` and each of `schema.MEASURES`, one value per sample of the block.

        Raises
        ------
        StoreError
            If the block does not exist or the values do not fill it exactly.
        StoreWriteError
            If the disk is full or not writable; the block then does not count as done.
        """
        self.refuse_if_compact()
        start, stop = self.bounds(block)
        if not (0 <= row < len(self.rows) and 0 <= block < self.num_blocks):
            raise StoreError(f"results store {self.path} has no block {block} in row {row}")
        for variable in schema.PER_SAMPLE:
            shape = np.shape(values[variable.name])
            if shape != (stop - start,):
                raise StoreError(
                    f"{variable.name} has shape {shape}; block {block} takes ({stop - start},)"
                )
        with writing(f"results store {self.path}"):
            for variable in schema.MEASURES:
                self._write_chunk(variable, row, start, stop, values)
            digests = [self.digest(v, row, block, values[v.name]) for v in schema.PER_SAMPLE]
            self.array(schema.DIGEST.name)[row, block] = np.array(digests, np.uint64)
            # A crash of the machine must not leave a status without its data.
            for variable in (*schema.MEASURES, schema.DIGEST):
                sync(self.chunk_path(variable.name, row, block))
            self._write_chunk(schema.STATUS, row, start, stop, values)
            sync(self.chunk_path(schema.STATUS.name, row, block))

    def discard_block(self, row: int, block: int) -> None:
        """Make a block missing again, its status first, so that it is never half of one."""
        with self.changing():
            status = self.chunk_path(schema.STATUS.name, row, block)
            for variable in (schema.STATUS, *schema.MEASURES, schema.DIGEST):
                self.chunk_path(variable.name, row, block).unlink(missing_ok=True)
                if variable is schema.STATUS and status.parent.exists():
                    sync(status.parent)

    def is_done(self, row: int, block: int) -> bool:
        """Return whether a block has been written, and has all of its files."""
        status = self.chunk_path(schema.STATUS.name, row, block)
        if not self.is_compact and not (status.exists() and status.stat().st_size):
            return False
        return all(self.has_file(variable.name, row, block) for variable in schema.PER_SAMPLE)

    def done_blocks(self) -> NDArray[np.bool_]:
        """Return which blocks are done, as booleans of shape (rows, blocks)."""
        done = [self.done_in(row) for row in range(len(self.rows))]
        return np.array(done, dtype=bool).reshape(len(self.rows), self.num_blocks)

    def done_in(self, row: int) -> NDArray[np.bool_]:
        """Return which blocks of an epoch have been written, and have all of their files."""
        done = np.ones(self.num_blocks, dtype=bool)
        for variable in (schema.STATUS, *schema.MEASURES):
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

    def _write_chunk(
        self,
        variable: schema.Variable,
        row: int,
        start: int,
        stop: int,
        values: Mapping[str, NDArray[Any]],
    ) -> None:
        array = self.array(variable.name)
        array[row, start:stop] = np.asarray(values[variable.name]).astype(variable.dtype)

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
