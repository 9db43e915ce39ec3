"""Whether a results store is what was written into it.

Every chunk is read, so that its checksum and shape are checked; every block is held against its
digests, which also tell when a whole file is in another's place; and what is stored is held against
itself: the states of samples against the epochs from which they are active, finished epochs against
their blocks, the identity against its fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from daskcurv.config import fingerprint
from daskcurv.errors import StoreError
from daskcurv.storage import schema
from daskcurv.storage.compact import same_bits, slabs, turned
from daskcurv.storage.finite import measures_of, not_finite
from daskcurv.storage.integrity.columns import damaged_columns, discard_column
from daskcurv.storage.integrity.digests import Damage, checked_epoch
from daskcurv.storage.npy.layout import IMPORTED_METADATA
from daskcurv.storage.work import do_all, processes_for
from daskcurv.storage.working import ResultsStore

_ROWS_AT_ONCE = 64


@dataclass(frozen=True)
class Verification:
    """What was found in a store.

    Attributes
    ----------
    blocks : int
        Blocks that are on record as done, and were checked.
    missing : int
        Blocks that were not computed yet.
    leftovers : int
        Temporary files of interrupted writes, which nobody reads.
    damage : list of Damage
    not_finite : dict
        By epoch, how many samples have results that are not finite numbers; epochs without such
        samples are left out.
    """

    blocks: int
    missing: int
    leftovers: int
    damage: list[Damage]
    not_finite: dict[int, int]


def verify(store: ResultsStore) -> Verification:
    """Check everything in a store.

    Parameters
    ----------
    store : ResultsStore

    Returns
    -------
    Verification
    """
    recorded = store.recorded_blocks()
    damage = [*_metadata_damage(store), *_column_damage(store)]
    rows = range(len(store.epochs))
    pieces = [(store.path, rows[i : i + _ROWS_AT_ONCE]) for i in range(0, len(rows), _ROWS_AT_ONCE)]
    at_once = processes_for(store)
    found, counts = [], {}
    for part in do_all(check_epochs, pieces, description="verifying epochs", at_once=at_once):
        found.append(part[0])
        counts.update(part[1])
    if store.is_compact:
        found += do_all(slab_damage, slabs(store), description="verifying samples", at_once=at_once)
    damage += chain.from_iterable(found)
    leftovers = len(list(_leftovers(store.path)))
    return Verification(int(recorded.sum()), int((~recorded).sum()), leftovers, damage, counts)


def repair(store: ResultsStore, damage: list[Damage]) -> None:
    """Mark what is damaged as missing, so that the next launch computes or restores it.

    Also removes what interrupted writes have left.

    Parameters
    ----------
    store : ResultsStore
        Locked by the caller.
    damage : list of Damage
    """
    progress_lost = any(one.column == "complete" for one in damage)
    for one in damage:
        if one.row is not None and one.block is not None:
            if not progress_lost:
                store.set_epoch(one.row, complete=False)
            store.discard_block(one.row, one.block)
        elif one.column:
            discard_column(store, schema.COLUMN[one.column])
        elif one.metadata:
            store.rewrite_metadata(one.metadata)
    with store.changing():
        for path in _leftovers(store.path):
            path.unlink(missing_ok=True)


def check_epochs(path: Path, rows: range) -> tuple[list[Damage], dict[int, int]]:
    """Return what is wrong with the finished blocks of some rows.

    Parameters
    ----------
    path : Path
        Of the store.
    rows : range

    Returns
    -------
    damage : list of Damage
    not_finite : dict
        As in `Verification`.
    """
    store = ResultsStore.open(path)
    try:
        first_active = store.read("first_epoch_active")
    except StoreError:
        first_active = None
    names = measures_of(store)
    found: list[Damage] = []
    counts = {}
    for row in rows:
        values, damage = checked_epoch(store, row, first_active)
        found += damage
        broken = not_finite(values, names)
        for one in damage:
            if one.block is not None:
                broken[slice(*store.bounds(one.block))] = False
        if count := int(broken.sum()):
            counts[store.epochs[row]] = count
    return found, counts


def slab_damage(path: Path, name: str, places: slice) -> list[Damage]:
    """Return whether a compact store says the same by sample as by epoch.

    Parameters
    ----------
    path : Path
        Of the store.
    name : str
        A per-sample variable.
    places : slice
        In the order by sample.
    """
    store = ResultsStore.open(path)
    by_sample = schema.by_sample(name)
    where = f"{by_sample}, places {places.start} to {places.stop}"
    try:
        found = store.read(by_sample, slice(None), places)
        same = same_bits(turned(store, name, places), found)
    except StoreError:
        return [Damage(where, "cannot be read, or what it was made from cannot")]
    return [] if same else [Damage(where, f"does not say the same as {name}")]


def _column_damage(store: ResultsStore) -> Iterator[Damage]:
    damaged = damaged_columns(store)
    for variable in damaged:
        name = variable.name
        yield Damage(name, "lost a file, or cannot be read", column=name)
    readable = {variable.name for variable in store.columns} - {v.name for v in damaged}
    if "sample" in readable:
        numbers = store.read("sample")
        if not np.array_equal(numbers, np.arange(len(numbers))):
            yield Damage("sample", "is not 0, 1, 2 …", column="sample")
    if "epoch" in readable and store.read("epoch").tolist() != store.epochs:
        yield Damage("epoch", "does not agree with the epochs in zarr.json", column="epoch")
    if "imported" in store.attrs:
        try:
            texts = store.read(IMPORTED_METADATA)
        except StoreError:
            texts = np.array([""], dtype=object)
        if "" in texts:
            yield Damage(IMPORTED_METADATA, "lost a file, or cannot be read; import the tree again")


def _metadata_damage(store: ResultsStore) -> Iterator[Damage]:
    if fingerprint(store.identity) != store.fingerprint:
        yield Damage("zarr.json", "its identity does not have its fingerprint; restore it")
    for name, expected in store.array_metadata().items():
        try:
            found = json.loads((store.path / name / "zarr.json").read_bytes())
        except (OSError, ValueError):
            found = None
        if found != expected and not _is_from_an_interrupted_addition(found, expected):
            what = "is not what the store's own zarr.json says"
            yield Damage(f"{name}/zarr.json", what, metadata=name)


def _is_from_an_interrupted_addition(found: Any, expected: dict[str, Any]) -> bool:
    """Return whether an array's metadata differ only in having rows that the store does not."""
    if not isinstance(found, dict) or expected["dimension_names"][0] != "epoch":
        return False
    rows, *rest = expected["shape"]
    shape = found.get("shape")
    if not isinstance(shape, list) or shape[1:] != rest or not shape[0] > rows:
        return False
    return {**found, "shape": expected["shape"]} == expected


def _leftovers(path: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(path):
        yield from (Path(directory, name) for name in names if name.endswith(".partial"))
