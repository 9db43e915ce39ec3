"""Results out, as an xarray Dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, get_args

import numpy as np
import xarray as xr

from daskcurv.errors import ConfigError, StoreError
from daskcurv.storage import schema
from daskcurv.storage.store import ResultsStore

Incomplete = Literal["mask", "raise", "include"]

_EPOCHS_PER_DASK_CHUNK = 16


def open_results(path: str | Path, incomplete: Incomplete = "mask") -> xr.Dataset:
    """Open a results store for querying, also while a run is filling it.

    Parameters
    ----------
    path : str or Path
    incomplete : {"mask", "raise", "include"}
        What to do about blocks that are not done. A block interrupted while being written may
        hold some values already: ``"mask"`` shows every such sample as NaN (prediction −1),
        ``"include"`` shows what is there, ``"raise"`` refuses stores with unfinished epochs.

    Returns
    -------
    xarray.Dataset
        Dimensions ``(epoch, sample)``, sorted by epoch, loaded lazily through Dask. Besides what
        is stored it has ``curvature_stderr``, the standard error of ``curvature`` for want of more
        probes.

    Raises
    ------
    StoreError
        If `path` is not a results store, or has unfinished epochs and `incomplete` is ``"raise"``.
    """
    if incomplete not in get_args(Incomplete):
        raise ConfigError(f"incomplete is {incomplete!r}; expected one of {get_args(Incomplete)}")
    store = ResultsStore.open(Path(path))
    stored: xr.Dataset = xr.open_zarr(path, chunks=None)
    stored = stored.isel(epoch=np.argsort(stored.epoch.values))
    per_sample = [variable.name for variable in (*schema.MEASURES, schema.STATUS)]
    # The stored chunks are small, for the sake of resuming; several epochs make a better task.
    chunks = {"epoch": _EPOCHS_PER_DASK_CHUNK, "sample": -1}
    dataset = stored.drop_vars(per_sample).load().assign(stored[per_sample].chunk(chunks))
    complete = dataset.complete.values
    if complete.all() or incomplete == "include":
        return _with_standard_error(dataset, store)
    if incomplete == "raise":
        unfinished = dataset.epoch.values[~complete].tolist()
        raise StoreError(
            f"results store {path} has unfinished epochs {unfinished}; launch again to finish "
            "them, or open with incomplete='mask'"
        )
    done = dataset.status != schema.MISSING
    for variable in schema.MEASURES:
        masked = dataset[variable.name].where(done, variable.fill)
        dataset[variable.name] = masked.astype(variable.dtype).assign_attrs(variable.attrs)
    return _with_standard_error(dataset, store)


def _with_standard_error(dataset: xr.Dataset, store: ResultsStore) -> xr.Dataset:
    """Add the standard error of `curvature`, a mean over probes, from what the store has."""
    estimator = store.identity["estimator"]
    draws = estimator["n_probes"]
    if estimator["method"] == "zeroth-order":
        draws //= 2  # a pair of probes is one draw
    mean, square = (dataset[name].astype(np.float64) for name in ("curvature", "curvature_sq"))
    # Rounding of the stored means can leave a small negative number where all norms are equal.
    variance = (square - mean**2).clip(min=0)
    error = (variance / (draws - 1)) ** 0.5 if draws > 1 else xr.full_like(mean, np.nan)
    return dataset.assign(
        curvature_stderr=error.astype(np.float32).assign_attrs(
            long_name=f"standard error of curvature, from the spread of {draws} draws",
            units=dataset.curvature.attrs["units"],
        )
    )
