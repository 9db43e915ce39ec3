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
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.config import fingerprint
from daskcurv.errors import StoreError
from daskcurv.storage import schema
from daskcurv.storage.store import ResultsStore
from daskcurv.storage.work import do_all

_ROWS_AT_ONCE = 64
_WORTH_PROCESSES = 2000


@dataclass(frozen=True)
class Damage:
    """Something that is not as it was written.

    Attributes
    ----------
    where : str
        For example ``"epoch 200 block 3"``, or the name of a column.
    what : str
    row, block : int or None
        The block that has to be computed again, if it is one.
    column : str
        The one-dimensional variable that has to be restored, if it is one.
    metadata : str
        The array whose metadata file has to be written again, if it is one.
    """

    where: str
    what: str
    row: int | None = None
    block: int | None = None
    column: str = ""
    metadata: str = ""

    @property
    def can_be_repaired(self) -> bool:
        """Whether the next launch can put it right."""
        return self.block is not None or bool(self.column or self.metadata)


@dataclass(frozen=True)
class Verification:
    """What was found in a store.

    Attributes
    ----------
    blocks : int
        Blocks that were checked.
    missing : int
        Blocks that were not computed yet.
    leftovers : int
        Temporary files of interrupted writes, which nobody reads.
    damage : list of Damage
    """

    blocks: int
    missing: int
    leftovers: int
    damage: list[Damage]


def verify(store: ResultsStore) -> Verification:
    """Check everything in a store.

    Parameters
    ----------
    store : ResultsStore

    Returns
    -------
    Verification
    """
    done = store.done_blocks()
    damage = [*_metadata_damage(store), *_column_damage(store), *_lost_blocks(store, done)]
    rows = range(len(store.epochs))
    pieces = [(store.path, rows[i : i + _ROWS_AT_ONCE]) for i in range(0, len(rows), _ROWS_AT_ONCE)]
    found = do_all(
        block_damage,
        pieces,
        description="verifying",
        at_once=None if worth_processes(store) else 1,
    )
    for part in found:
        damage += part
    leftovers = len(list(_leftovers(store.path)))
    return Verification(int(done.sum()), int((~done).sum()), leftovers, damage)


def worth_processes(store: ResultsStore) -> bool:
    """Return whether there is enough in a store for several processes to save time."""
    return len(store.epochs) * store.num_blocks > _WORTH_PROCESSES


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
            store.discard_column(schema.COLUMN[one.column])
        elif one.metadata:
            store.rewrite_metadata(one.metadata)
    for path in _leftovers(store.path):
        path.unlink(missing_ok=True)


def block_damage(path: Path, rows: range) -> list[Damage]:
    """Return what is wrong with the finished blocks of some rows.

    Parameters
    ----------
    path : Path
        Of the store.
    rows : range
    """
    store = ResultsStore.open(path)
    try:
        first_active = store.read("first_epoch_active")
    except StoreError:
        first_active = None
    damage = []
    for row in rows:
        epoch = store.epochs[row]
        active = None if first_active is None else active_samples(first_active, epoch)
        for block in range(store.num_blocks):
            if store.is_done(row, block):
                _, problems = checked_block(store, row, block, active)
                if problems:
                    damage.append(Damage(f"epoch {epoch} block {block}", problems, row, block))
    return damage


def active_samples(first_active: NDArray[np.int64], epoch: int) -> NDArray[np.bool_]:
    """Return which samples are active at an epoch, from the column `first_epoch_active`."""
    active: NDArray[np.bool_] = first_active <= epoch
    return active


def checked_block(
    store: ResultsStore, row: int, block: int, active: NDArray[np.bool_] | None
) -> tuple[dict[str, NDArray[Any]], str]:
    """Read a block and hold it against its digests.

    Parameters
    ----------
    store : ResultsStore
    row, block : int
    active : ndarray of bool, shape (N,), optional
        Which samples are active at the epoch, if that is known.

    Returns
    -------
    dict
        The values of each of `schema.PER_SAMPLE` that could be read.
    str
        What is wrong; empty if nothing is.
    """
    values, problems = {}, []
    expected = None
    try:
        expected = store.read_digests(row, block)
        if not store.is_compact and not store.chunk_path(schema.DIGEST.name, row, block).exists():
            expected = None
            problems.append("its digests are lost")
    except StoreError:
        problems.append("its digests cannot be read")
    for number, variable in enumerate(schema.PER_SAMPLE):
        name = variable.name
        if not store.is_compact and not store.chunk_path(name, row, block).exists():
            problems.append(f"{name} is lost")
            continue
        try:
            values[name] = store.read_block(name, row, block)
        except StoreError:
            problems.append(f"{name} cannot be read")
            continue
        if expected and store.digest(variable, row, block, values[name]) != expected[number]:
            problems.append(f"{name} is not what was written there")
        elif variable is schema.STATUS and active is not None:
            start, stop = store.bounds(block)
            right = np.where(active[start:stop], schema.COMPUTED, schema.INACTIVE)
            if not np.array_equal(values[name], right):
                problems.append("status does not agree with first_epoch_active")
    return values, "; ".join(problems)


def _column_damage(store: ResultsStore) -> Iterator[Damage]:
    damaged = store.damaged_columns()
    for variable in damaged:
        name = variable.name
        yield Damage(name, "lost a file, or cannot be read", column=name)
    readable = {variable.name for variable in schema.COLUMNS} - {v.name for v in damaged}
    if "sample" in readable:
        numbers = store.read("sample")
        if not np.array_equal(numbers, np.arange(len(numbers))):
            yield Damage("sample", "is not 0, 1, 2 …", column="sample")
    if "epoch" in readable and store.read("epoch").tolist() != store.epochs:
        yield Damage("epoch", "does not agree with the epochs in zarr.json", column="epoch")


def _lost_blocks(store: ResultsStore, done: NDArray[np.bool_]) -> Iterator[Damage]:
    try:
        complete = store.read("complete")
    except StoreError:
        return
    for row, block in np.argwhere(complete[:, None] & ~done).tolist():
        where = f"epoch {store.epochs[row]} block {block}"
        yield Damage(where, "its status is lost, though the epoch was complete", row, block)


def _metadata_damage(store: ResultsStore) -> Iterator[Damage]:
    if fingerprint(store.identity) != store.fingerprint:
        yield Damage("zarr.json", "its identity does not have its fingerprint; restore it")
    for name, expected in store.array_metadata().items():
        try:
            found = json.loads((store.path / name / "zarr.json").read_bytes())
        except (OSError, ValueError):
            found = None
        if found != expected:
            what = "is not what the store's own zarr.json says"
            yield Damage(f"{name}/zarr.json", what, metadata=name)


def _leftovers(path: Path) -> Iterator[Path]:
    for directory, _, names in os.walk(path):
        yield from (Path(directory, name) for name in names if name.endswith(".partial"))
