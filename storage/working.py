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

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from daskcurv import measures as table
from daskcurv.atomic import sync, whole_directory, write_whole
from daskcurv.config import Identity, differences, fingerprint
from daskcurv.errors import StoreError
from daskcurv.measures import Measure
from daskcurv.storage import schema
from daskcurv.storage.contents import StoreContents
from daskcurv.storage.group import (
    CODECS,
    array_of,
    consolidate,
    create_array,
    numpy_dtype,
    open_group,
    writing,
)
from daskcurv.storage.lock import LauncherLock

Columns = Mapping[str, Sequence[Any] | NDArray[Any]]


class ResultsStore(StoreContents):
    """A store open for writing blocks (workers) or epochs (the launcher).

    Use :meth:`create` or :meth:`open`.
    """

    def __init__(self, path: Path, lock: LauncherLock | None = None):
        super().__init__(path)
        self._lock = lock

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        identity: Identity,
        samples: Columns,
        epochs: Columns,
        measures: Sequence[Measure] | None = None,
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
            A column of length N for each of `schema.SAMPLE_VARIABLES`, and for those of
            `schema.SAMPLE_TEXTS` that the store is to have.
        epochs : mapping
            A column for each of `schema.EPOCH_VARIABLES`.
        measures : sequence of Measure, optional
            What blocks hold; by default all of `daskcurv.measures.MEASURES`.
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
            listed = table.MEASURES if measures is None else measures
            _write_template(building, identity, samples, listed, block_size, attrs or {})
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
            Of a run that is to fill the store, which must have been made with it.
        lock : LauncherLock, optional
            Held by whoever is to change more than blocks. It then covers this store too, and
            before every such change it is made sure that it is still held.

        Raises
        ------
        StoreError
            If it is not a store or was made by a newer version; or if a run cannot fill it: it
            has another identity, and the text lists the fields that differ, or it holds a measure
            that is not computed.
        """
        store = cls(path, lock)
        if identity is not None and store.fingerprint != fingerprint(identity):
            lines = differences(store.identity, identity)
            raise StoreError(
                f"results store {path} was made with another configuration:\n  "
                + "\n  ".join(lines)
                + "\nChange these settings back, or choose another --store"
            )
        if identity is not None:
            store._refuse_unknown_measures()
        if lock is not None:
            lock.cover(path)
        return store

    def _refuse_unknown_measures(self) -> None:
        computed = {measure.name for measure in table.MEASURES}
        if unknown := [m.name for m in self.measures if m.name not in computed]:
            raise StoreError(
                f"results store {self.path} holds {', '.join(unknown)}, which this daskcurv does "
                "not compute; continue it with the daskcurv that made it, or choose another store",
                option="--store",
            )

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
        for variable in self.variables:
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
            For `status` and each of the store's measures, one value per sample of the block.

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
        for variable in self.per_sample:
            shape = np.shape(values[variable.name])
            if shape != (stop - start,):
                raise StoreError(
                    f"{variable.name} has shape {shape}; block {block} takes ({stop - start},)"
                )
        with writing(f"results store {self.path}"):
            for variable in self.measured:
                self._write_chunk(variable, row, start, stop, values)
            digests = [self.digest(v, row, block, values[v.name]) for v in self.per_sample]
            self.array(schema.DIGEST.name)[row, block] = np.array(digests, np.uint64)
            # A crash of the machine must not leave a status without its data.
            for variable in (*self.measured, schema.DIGEST):
                sync(self.chunk_path(variable.name, row, block))
            self._write_chunk(schema.STATUS, row, start, stop, values)
            sync(self.chunk_path(schema.STATUS.name, row, block))

    def discard_block(self, row: int, block: int) -> None:
        """Make a block missing again, its status first, so that it is never half of one."""
        with self.changing():
            status = self.chunk_path(schema.STATUS.name, row, block)
            for variable in (schema.STATUS, *self.measured, schema.DIGEST):
                self.chunk_path(variable.name, row, block).unlink(missing_ok=True)
                if variable is schema.STATUS and status.parent.exists():
                    sync(status.parent)

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


def _write_template(
    path: Path,
    identity: Identity,
    samples: Columns,
    measures: Sequence[Measure],
    block_size: int,
    attrs: Mapping[str, Any],
) -> None:
    """Write a store without epochs into an empty directory."""
    variables = schema.all_variables(measures, samples)
    group = zarr.create_group(
        path,
        zarr_format=3,
        overwrite=True,
        attributes={
            **attrs,
            "daskcurv_format": schema.FORMAT_VERSION,
            "identity": identity,
            "fingerprint": fingerprint(identity),
            "block_size": block_size,
            "epochs": [],
            "coordinates": " ".join(v.name for v in variables if v.coordinate),
            schema.MEASURES: [measure.to_json() for measure in measures],
        },
    )
    group.create_group(schema.DIGEST.name.rpartition("/")[0])
    num_samples = len(samples["sample"])
    for variable in variables:
        create_array(group, variable, num_samples, block_size, len(measures) + 1)
    for variable in schema.columns(samples):
        if variable.dims == ("sample",):
            values = np.asarray(samples[variable.name], dtype=numpy_dtype(variable))
            array_of(group, variable.name)[:] = values
    consolidate(path)
