"""Results that are not finite numbers: where a network overflows, or its weights are impossible.

They are what the weights give, so they are neither damage nor missing; but no analysis can use
them. A launch notes the epochs that have some among the store's attributes, so that it is known
without reading all values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.atomic import write_whole
from daskcurv.experiment.identity import Recorded
from daskcurv.storage import schema
from daskcurv.storage.working import ResultsStore

if TYPE_CHECKING:
    import xarray as xr

EPOCHS_NOT_FINITE = "epochs_not_finite"
"""Attribute of a store: its epochs with results that are not finite. Absent where none are."""


def measures_of(store: ResultsStore) -> list[str]:
    """Return the measures that every computed sample of a store has, of those with fractions."""
    measures = [measure for measure in store.measures if not measure.is_integer]
    if not Recorded.of(store.identity).differentiates:
        measures = [measure for measure in measures if not measure.needs_gradients]
    if "imported" in store.attrs:
        # A tree need not have the others, which are NaN then.
        measures = [measure for measure in measures if measure.documented]
    return [measure.name for measure in measures]


def not_finite(values: Mapping[str, NDArray[Any]], names: Iterable[str]) -> NDArray[np.bool_]:
    """Return which samples were computed and have a measure that is NaN or infinite.

    Parameters
    ----------
    values : mapping
        For `status` and each of `names`, one value per sample.
    names : iterable of str
    """
    found: NDArray[np.bool_] = np.zeros(len(values["status"]), dtype=bool)
    with np.errstate(over="ignore"):  # what overflows when it is stored is what is looked for
        for name in names:
            found |= ~np.isfinite(np.asarray(values[name]).astype(np.float32))
    found &= values["status"] == schema.COMPUTED
    return found


def count_not_finite(store: ResultsStore, row: int) -> int:
    """Return how many samples of an epoch have results that are not finite."""
    names = measures_of(store)
    values = {name: store.read(name, row) for name in (*names, "status")}
    return int(not_finite(values, names).sum())


def not_finite_by_epoch(store: ResultsStore, dataset: xr.Dataset) -> dict[int, int]:
    """Count the samples with results that are not finite, at the epochs that have some.

    Only the epochs on record for this are read; of an imported store, which has no such record,
    all are.

    Parameters
    ----------
    store : ResultsStore
    dataset : xarray.Dataset
        The store, opened; all or some of its epochs.
    """
    names = measures_of(store)
    epochs = dataset.epoch.values
    if "imported" not in store.attrs:
        epochs = epochs[np.isin(epochs, noted_epochs(store))]
    counts = {}
    for epoch in epochs.tolist():
        row = dataset.sel(epoch=epoch)
        counts[epoch] = int(not_finite({n: row[n].values for n in (*names, "status")}, names).sum())
    return {epoch: count for epoch, count in counts.items() if count}


def noted_epochs(store: ResultsStore) -> list[int]:
    """Return the epochs that are on record as having results that are not finite."""
    return list(map(int, store.attrs.get(EPOCHS_NOT_FINITE, [])))


def note_epochs(store: ResultsStore, epochs: Iterable[int]) -> None:
    """Put on record which epochs have results that are not finite; only the launcher does."""
    with store.changing():
        path = store.path / "zarr.json"
        metadata = json.loads(path.read_bytes())
        metadata["attributes"].pop(EPOCHS_NOT_FINITE, None)
        if noted := sorted(epochs):
            metadata["attributes"][EPOCHS_NOT_FINITE] = noted
        write_whole(path, json.dumps(metadata, indent=2).encode())


def told(counts: Mapping[int, int]) -> str:
    """Return the counts of epochs as text, the first few one by one."""
    shown = [f"{epoch} ({count:,})" for epoch, count in sorted(counts.items())]
    more = f" and {len(shown) - 10} more epochs" if len(shown) > 10 else ""
    return ", ".join(shown[:10]) + more
