"""One epoch of a results store, read and held against its digests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import StoreError
from daskcurv.storage import schema
from daskcurv.storage.working import ResultsStore


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


def checked_epoch(
    store: ResultsStore, row: int, first_active: NDArray[np.int64] | None
) -> tuple[dict[str, NDArray[Any]], list[Damage]]:
    """Read the blocks of an epoch that are on record, and hold them against their digests.

    Parameters
    ----------
    store : ResultsStore
    row : int
    first_active : ndarray of int64, shape (N,), or None
        The column of that name, if it can be read.

    Returns
    -------
    dict
        The values of each of the store's `per_sample`, shape (N,).
    list of Damage
        One for each block that is not what was written.
    """
    done = np.flatnonzero(store.recorded_in(row)).tolist()
    problems: dict[int, list[str]] = {block: [] for block in done}

    def checked(name: str, what: str) -> tuple[NDArray[Any], set[int]]:
        """Return an epoch of a variable, and its blocks that are there and can be read."""
        values, unreadable = _read_epoch(store, name, row, done)
        lost = {block for block in done if not store.has_file(name, row, block)}
        for block in lost:
            problems[block].append(f"{what} is lost")
        for block in unreadable - lost:
            problems[block].append(f"{what} cannot be read")
        return values, {*done} - lost - unreadable

    digests, with_digests = checked(schema.DIGEST.name, "its digest")
    values = {}
    for number, variable in enumerate(store.per_sample):
        name = variable.name
        values[name], readable = checked(name, name)
        for block in sorted(readable & with_digests):
            found = store.digest(variable, row, block, values[name][slice(*store.bounds(block))])
            if found != digests[block, number]:
                problems[block].append(f"{name} is not what was written there")
    inactive = values[schema.STATUS.name] == schema.INACTIVE
    for variable in store.measured:
        column = values[variable.name]
        filled = np.isnan(column) if column.dtype.kind == "f" else column == variable.fill
        for block in done:
            part = slice(*store.bounds(block))
            if not problems[block] and (inactive & ~filled)[part].any():
                problems[block].append(f"{variable.name} has values where no sample is active")
    if first_active is not None:
        active = (first_active >= 0) & (first_active <= store.epochs[row])
        right = np.where(active, schema.COMPUTED, schema.INACTIVE) == values[schema.STATUS.name]
        for block in done:
            if not problems[block] and not right[slice(*store.bounds(block))].all():
                problems[block].append("status does not agree with first_epoch_active")
    epoch = store.epochs[row]
    return values, [
        Damage(f"epoch {epoch} block {block}", "; ".join(found), row, block)
        for block, found in problems.items()
        if found
    ]


def _read_epoch(
    store: ResultsStore, name: str, row: int, blocks: list[int]
) -> tuple[NDArray[Any], set[int]]:
    """Return an epoch of a variable, and which of its blocks cannot be read."""
    try:
        return store.read(name, row), set()
    except StoreError:
        pass  # one of them is to blame
    parts, unreadable = store.empty_epoch(name), set()
    for block in blocks:
        try:
            part = store.read_block(name, row, block)
        except StoreError:
            unreadable.add(block)
            continue
        parts[store.span(name, block)] = part
    return parts, unreadable
