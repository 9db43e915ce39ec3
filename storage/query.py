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
        Dimensions ``(epoch, sample)``, sorted by epoch, loaded lazily through Dask.

    Raises
    ------
    StoreError
        If `path` is not a results store, or has unfinished epochs and `incomplete` is ``"raise"``.
    """
    if incomplete not in get_args(Incomplete):
        raise ConfigError(f"incomplete is {incomplete!r}; expected one of {get_args(Incomplete)}")
    ResultsStore.open(Path(path))
    stored: xr.Dataset = xr.open_zarr(path, chunks=None)
    stored = stored.isel(epoch=np.argsort(stored.epoch.values))
    per_sample = [variable.name for variable in (*schema.MEASURES, schema.STATUS)]
    # The stored chunks are small, for the sake of resuming; several epochs make a better task.
    chunks = {"epoch": _EPOCHS_PER_DASK_CHUNK, "sample": -1}
    dataset = stored.drop_vars(per_sample).load().assign(stored[per_sample].chunk(chunks))
    complete = dataset.complete.values
    if complete.all() or incomplete == "include":
        return dataset
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
    return dataset
