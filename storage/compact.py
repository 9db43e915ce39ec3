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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec

from daskcurv.atomic import discard_drafts, whole_directory
from daskcurv.errors import StoreError
from daskcurv.places import check_writable
from daskcurv.storage import schema
from daskcurv.storage.group import consolidate, writing
from daskcurv.storage.integrity.digests import checked_epoch
from daskcurv.storage.integrity.lost import refuse_lost
from daskcurv.storage.lock import launcher_lock
from daskcurv.storage.work import do_all, processes_for
from daskcurv.storage.working import ResultsStore

log = logging.getLogger(__name__)

EPOCHS_PER_SHARD = 128
SAMPLES_PER_EPOCH_CHUNK = 65_536
SAMPLES_PER_CHUNK = 16
SAMPLES_PER_SHARD = 2048

_SLAB_BYTES = 2**28
"""What a process holds of a variable while it turns epochs into samples."""


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
    check_writable(out, directory=True, parents=True)
    _refuse_unfinished(source)
    with writing(f"compact store {out}"):
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
    with launcher_lock(out) as lock:
        discard_drafts(out)
        with writing(f"compact store {out}"), whole_directory(out.absolute()) as building:
            _build(source, building)
            lock.check()
    log.info("%s is complete: %d epochs of %s", out, len(source.epochs), source.path)


def _refuse_unfinished(source: ResultsStore) -> None:
    done = source.recorded_blocks()
    if unfinished := [epoch for epoch, row in source.rows.items() if not done[row].all()]:
        raise StoreError(
            f"results store {source.path} has unfinished epochs {unfinished}; launch again to "
            "finish them, then compact it"
        )
    refuse_lost(source)


def _build(source: ResultsStore, path: Path) -> None:
    order = np.argsort(source.epochs, kind="stable")
    attrs = {
        **source.attrs,
        "layout": schema.COMPACT,
        "epochs": [source.epochs[row] for row in order],
    }
    group = zarr.create_group(path, zarr_format=3, overwrite=True, attributes=attrs)
    _create_arrays(group, source)
    consolidate(path)
    out = ResultsStore.open(path)
    for name, array in source.arrays():
        if name not in out.files:
            values = source.read(name)
            by_epoch = _dimensions(array)[0] == "epoch"
            out.array(name)[:] = values[order] if by_epoch else values
    # Samples of a class are active together, and asked for together.
    by_class = np.argsort(source.read("class_position"), kind="stable")
    out.array(schema.by_sample("sample"))[:] = by_class
    at_once = processes_for(source)
    starts = range(0, len(order), EPOCHS_PER_SHARD)
    rows = [order[start : start + EPOCHS_PER_SHARD].tolist() for start in starts]
    do_all(
        _copy_epochs,
        [(source.path, path, start, part) for start, part in zip(starts, rows, strict=True)],
        description="copying epochs",
        at_once=at_once,
    )
    do_all(_turn, slabs(out), description="turning into samples", at_once=at_once)


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
        if name not in source.files:
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

    group.create_array(
        schema.by_sample("sample"),
        shape=(source.num_samples,),
        chunks=(source.num_samples,),
        dtype="int32",
        dimension_names=("place",),
        attributes={"long_name": "sample of each place in the arrays by sample"},
    )


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
    shard = {
        variable.name: np.empty((len(rows), source.num_samples), variable.dtype)
        for variable in source.per_sample
    }
    first_active = source.read("first_epoch_active")
    for position, row in enumerate(rows):
        epoch, damage = checked_epoch(source, row, first_active)
        if damage:
            raise StoreError(
                f"{damage[0].where} of results store {source_path} is damaged: {damage[0].what}. "
                f"{source.remedy}"
            )
        for name, values in epoch.items():
            shard[name][position] = values
    out = ResultsStore.open(path)
    where = slice(start, start + len(rows)), slice(None)
    for name, values in shard.items():
        _write_and_compare(out, name, where, values)


def slabs(store: ResultsStore) -> list[tuple[Path, str, slice]]:
    """Return pieces of a compact store's variables, for memory to hold one at a time.

    Returns
    -------
    list of (Path, str, slice)
        The store, the variable, and a run of places in the order by sample: whole shards.
    """
    pieces = []
    for variable in store.per_sample:
        shard_bytes = len(store.epochs) * SAMPLES_PER_SHARD * np.dtype(variable.dtype).itemsize
        step = SAMPLES_PER_SHARD * max(1, _SLAB_BYTES // shard_bytes)
        for start in range(0, store.num_samples, step):
            places = slice(start, min(start + step, store.num_samples))
            pieces.append((store.path, variable.name, places))
    return pieces


def turned(store: ResultsStore, name: str, places: slice) -> NDArray[Any]:
    """Read a slab of a variable from where it is stored by epoch.

    Returns
    -------
    ndarray, shape (E, samples of the slab)
    """
    samples = store.read(schema.by_sample("sample"))[places]
    values = np.empty((len(store.epochs), len(samples)), store.array(name).dtype)
    for start in range(0, len(values), EPOCHS_PER_SHARD):
        shard = slice(start, start + EPOCHS_PER_SHARD)
        values[shard] = store.read(name, shard)[:, samples]
    return values


def same_bits(one: NDArray[Any], other: NDArray[Any]) -> bool:
    """Return whether two arrays of one type hold the same bits, of NaNs too."""
    bits = f"u{one.dtype.itemsize}"
    return np.array_equal(one.view(bits), other.view(bits))


def _turn(path: Path, name: str, places: slice) -> None:
    """Write a slab of a variable by sample."""
    out = ResultsStore.open(path)
    where = slice(None), places
    _write_and_compare(out, schema.by_sample(name), where, turned(out, name, places))


def _write_and_compare(
    out: ResultsStore, name: str, where: tuple[slice, slice], values: NDArray[Any]
) -> None:
    with writing(f"{name} of compact store {out.path}"):
        out.array(name)[where] = values
    if not same_bits(out.read(name, *where), values):
        raise StoreError(
            f"{name} of {out.path} is not what was written; the disk or memory of this machine is "
            "bad"
        )
