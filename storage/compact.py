"""A finished store, written anew for reading.

Every per-sample variable is stored twice: in chunks that hold one epoch, and (in the group
``by_sample``) in chunks that hold all epochs of a few samples. So one epoch over all samples and
one sample over all epochs are each one chunk, where any compromise would have to read dozens for
both. Chunks are packed into shards, which makes few files. Values take less space than they did,
although they are there twice, because bits are compressed by their significance, and samples of
inactive classes take next to none.

Each block is held against its digests before it is copied, and what was written is read again and
compared, bit by bit.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from daskcurv.errors import StoreError
from daskcurv.files import whole_directory
from daskcurv.storage import schema
from daskcurv.storage.lock import launcher_lock
from daskcurv.storage.store import ResultsStore, array_of, consolidate, writing
from daskcurv.storage.verify import active_samples, checked_block, worth_processes
from daskcurv.storage.work import do_all

log = logging.getLogger(__name__)

EPOCHS_PER_SHARD = 128
SAMPLES_PER_EPOCH_CHUNK = 65_536
SAMPLES_PER_CHUNK = 16
SAMPLES_PER_SHARD = 2048

_SLAB_BYTES = 2**29
"""What a process holds of a variable while it turns epochs into samples."""
_AT_ONCE = 4
"""Processes, so that memory stays within 8 GB on machines of any size."""


def compact(source: ResultsStore, out: Path) -> None:
    """Write a finished store anew for reading.

    Interrupted, it leaves nothing under the name of `out`; what it leaves beside it is removed by
    the next try.

    Parameters
    ----------
    source : ResultsStore
        All of its blocks done. It is only read.
    out : Path
        Must not exist.

    Raises
    ------
    StoreError
        If the store is not finished or is damaged, or `out` exists.
    StoreWriteError
        If there is no space, or no permission.
    """
    if source.is_compact:
        raise StoreError(f"{source.path} was made by compact already; copy it as it is")
    if out.exists():
        raise StoreError(f"{out} exists; name another directory, or move it away")
    _refuse_unfinished(source)
    with writing(f"compact store {out}"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with launcher_lock(out):
        for left in out.absolute().parent.glob(f".{out.name}.*.partial"):
            shutil.rmtree(left)
        with writing(f"compact store {out}"), whole_directory(out.absolute()) as building:
            _build(source, building)
    log.info("%s is complete: %d epochs of %s", out, len(source.epochs), source.path)


def _refuse_unfinished(source: ResultsStore) -> None:
    done = source.done_blocks()
    if unfinished := [epoch for epoch, row in source.rows.items() if not done[row].all()]:
        raise StoreError(
            f"results store {source.path} has unfinished epochs {unfinished}; launch again to "
            "finish them, then compact it"
        )
    if damaged := source.damaged_columns():
        raise StoreError(
            f"{', '.join(variable.name for variable in damaged)} of results store {source.path} "
            "cannot be read; launch again to restore it, then compact the store"
        )


def _build(source: ResultsStore, path: Path) -> None:
    order = np.argsort(source.epochs, kind="stable")
    attrs = {
        **source.attrs,
        "layout": schema.COMPACT,
        "epochs": [source.epochs[row] for row in order],
    }
    group = zarr.create_group(path, zarr_format=3, overwrite=True, attributes=attrs)
    _create_arrays(group, source)
    for name, array in source.arrays():
        if name not in _PER_SAMPLE:
            values = np.asarray(array[:])
            by_epoch = _dimensions(array)[0] == "epoch"
            array_of(group, name)[:] = values[order] if by_epoch else values
    at_once = _AT_ONCE if worth_processes(source) else 1
    starts = range(0, len(order), EPOCHS_PER_SHARD)
    rows = [order[start : start + EPOCHS_PER_SHARD].tolist() for start in starts]
    do_all(
        _copy_epochs,
        [(source.path, path, start, part) for start, part in zip(starts, rows, strict=True)],
        description="copying epochs",
        at_once=at_once,
    )
    do_all(_turn, _slabs(group, path), description="turning into samples", at_once=at_once)
    consolidate(path)


_PER_SAMPLE = {variable.name: variable for variable in schema.PER_SAMPLE}


def _create_arrays(group: zarr.Group, source: ResultsStore) -> None:
    """Create all arrays, empty."""
    for name, array in source.arrays():
        options: dict[str, Any] = {
            "shape": array.shape,
            "dtype": array.metadata.data_type,  # type: ignore[union-attr]
            "fill_value": array.fill_value,
            "dimension_names": _dimensions(array),
            "attributes": dict(array.attrs),
        }
        epochs, *rest = array.shape
        if name not in _PER_SAMPLE:
            chunks, codecs = _one_chunk(name, array), (ZstdCodec(level=3), Crc32cCodec())
            group.create_array(name, chunks=chunks, compressors=codecs, **options)
            continue
        options["compressors"] = (
            BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"),
            Crc32cCodec(),
        )
        chunk = 1, min(rest[0], SAMPLES_PER_EPOCH_CHUNK)
        shard = EPOCHS_PER_SHARD, chunk[1]
        group.create_array(name, chunks=chunk, shards=shard, **options)
        chunk, shard = (epochs, SAMPLES_PER_CHUNK), (epochs, SAMPLES_PER_SHARD)
        group.create_array(schema.by_sample(name), chunks=chunk, shards=shard, **options)


def _dimensions(array: zarr.Array[Any]) -> tuple[str, ...]:
    names: tuple[str, ...] = array.metadata.dimension_names  # type: ignore[union-attr,assignment]
    return names


def _one_chunk(name: str, array: zarr.Array[Any]) -> tuple[int, ...]:
    """Return the shape of a chunk that holds a whole column, and that no other column's fits."""
    number = schema.COLUMNS.index(schema.COLUMN[name]) if name in schema.COLUMN else 0
    return array.shape[0] + number, *array.shape[1:]


def _copy_epochs(source_path: Path, path: Path, start: int, rows: Sequence[int]) -> None:
    """Copy the rows of a store that make a shard of each variable."""
    source = ResultsStore.open(source_path)
    values = {
        name: np.empty((len(rows), source.num_samples), variable.dtype)
        for name, variable in _PER_SAMPLE.items()
    }
    first_active = source.read("first_epoch_active")
    for position, row in enumerate(rows):
        active = active_samples(first_active, source.epochs[row])
        for block in range(source.num_blocks):
            found, problems = checked_block(source, row, block, active)
            if problems:
                raise StoreError(
                    f"epoch {source.epochs[row]} block {block} of results store {source_path} is "
                    f"damaged: {problems}. Mark it with daskcurv verify --repair, and launch again"
                )
            for name, part in found.items():
                values[name][position, slice(*source.bounds(block))] = part
    group = zarr.open_group(path, mode="r+")
    where = slice(start, start + len(rows)), slice(None)
    for name, rectangle in values.items():
        _write_and_compare(path, group, name, where, rectangle)


def _slabs(group: zarr.Group, path: Path) -> list[tuple[Any, ...]]:
    """Return what `_turn` is to be called with: pieces of shards, of bounded size."""
    pieces: list[tuple[Any, ...]] = []
    for name in _PER_SAMPLE:
        array = array_of(group, name)
        epochs, samples = array.shape
        shard_bytes = epochs * SAMPLES_PER_SHARD * array.dtype.itemsize
        step = SAMPLES_PER_SHARD * max(1, _SLAB_BYTES // shard_bytes)
        pieces += [(path, name, start, start + step) for start in range(0, samples, step)]
    return pieces


def _turn(path: Path, name: str, start: int, stop: int) -> None:
    """Write some samples of a variable by sample."""
    group = zarr.open_group(path, mode="r+")
    where = slice(None), slice(start, stop)
    values = np.asarray(array_of(group, name)[where])
    _write_and_compare(path, group, schema.by_sample(name), where, values)


def _write_and_compare(
    path: Path, group: zarr.Group, name: str, where: tuple[slice, slice], values: NDArray[Any]
) -> None:
    array = array_of(group, name)
    with writing(f"{name} of compact store {path}"):
        array[where] = values
    if np.asarray(array[where]).tobytes() != values.tobytes():
        raise StoreError(
            f"{name} of {path} is not what was written; the disk or memory of this machine is bad"
        )
