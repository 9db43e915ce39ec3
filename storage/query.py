"""Results out, as an xarray Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.classes import first_epochs_trained
from daskcurv.config import Identity
from daskcurv.errors import ConfigError, StoreError
from daskcurv.storage import schema
from daskcurv.storage.lazy import Key, lazy_variable
from daskcurv.storage.store import ResultsStore

Incomplete = Literal["mask", "raise", "include"]

_EPOCHS_PER_DASK_CHUNK = 64

_FIRST_TRAINED = {
    "long_name": "first epoch whose weights had been trained on the sample's class; "
    "-1 if not known",
}
_TRAINED = {
    "long_name": "whether the weights had been trained on the sample's class",
    "comment": "epoch >= first_epoch_trained; True where that is not known",
}


def open_results(
    path: str | Path,
    incomplete: Incomplete = "mask",
    chunks: Mapping[str, int] | None = None,
) -> xr.Dataset:
    """Open a results store for querying, also while a run is filling it.

    Parameters
    ----------
    path : str or Path
        A store that a launch fills, or one that ``daskcurv compact`` has made.
    incomplete : {"mask", "raise", "include"}
        What to do about blocks that are not done. A block interrupted while being written may
        hold some values already: ``"mask"`` shows every such sample as NaN (prediction −1),
        ``"include"`` shows what is there, ``"raise"`` refuses stores with unfinished epochs.
    chunks : mapping, optional
        By default, selecting is lazy and what is selected becomes NumPy arrays as soon as it is
        computed with: best for questions about some samples or epochs. With a mapping, variables
        are Dask arrays in pieces of so many epochs and samples (``{}`` for 64 epochs each): best
        for computations on all of a large store, in bounded memory.

    Returns
    -------
    xarray.Dataset
        Dimensions ``(epoch, sample)``, sorted by epoch. Besides what is stored it has
        ``curvature_stderr``, the standard error of ``curvature`` for want of more probes, and
        the coordinates ``first_epoch_trained`` (int64, by sample: the first epoch whose weights
        had been trained on the sample's class; -1 if no schedule is recorded, as in an imported
        store) and ``trained`` (bool, by epoch and sample: whether the weights had been; True where
        that is not known, so that nothing is left out). Where the names of the classes are known,
        there is the coordinate ``class_name``.

    Raises
    ------
    StoreError
        If `path` is not a results store, or has unfinished epochs and `incomplete` is ``"raise"``.
    """
    if incomplete not in get_args(Incomplete):
        raise ConfigError(f"incomplete is {incomplete!r}; expected one of {get_args(Incomplete)}")
    store = ResultsStore.open(Path(path))
    per_sample = [variable.name for variable in schema.PER_SAMPLE]
    opened: xr.Dataset = xr.open_zarr(path, chunks=None)
    # Metadata and columns can be of different moments while epochs are being added.
    dataset = opened.drop_vars(per_sample).isel(epoch=slice(len(store.epochs))).load()
    complete = dataset.complete.values
    if incomplete == "raise" and not complete.all():
        unfinished = sorted(dataset.epoch.values[~complete].tolist())
        raise StoreError(
            f"results store {path} has unfinished epochs {unfinished}; launch again to finish "
            "them, or open with incomplete='mask'"
        )
    masked = incomplete == "mask" and not complete.all()
    variables = _variables(store, masked, {name: opened[name].attrs for name in per_sample})
    dataset = dataset.assign(variables).assign_coords(_trained(store, dataset))
    if names := store.attrs.get("class_names"):
        labels = dataset.label.values
        known = np.array([*names, ""])[np.where(labels < len(names), labels, len(names))]
        dataset = dataset.assign_coords(
            class_name=("sample", known, {"long_name": "name of the sample's class"})
        )
    order = np.argsort(dataset.epoch.values, kind="stable")
    if (np.diff(order) < 0).any():
        dataset = dataset.isel(epoch=order)
    if chunks is None:
        return dataset
    return dataset.chunk({"epoch": _EPOCHS_PER_DASK_CHUNK, "sample": -1, **chunks})


def _variables(
    store: ResultsStore, masked: bool, attrs: dict[str, dict[str, Any]]
) -> dict[str, xr.Variable]:
    stored = {variable.name: store.stored(variable.name) for variable in schema.PER_SAMPLE}
    status = stored[schema.STATUS.name]

    def read(variable: schema.Variable, key: Key) -> NDArray[Any]:
        if not masked:
            return stored[variable.name].read(key)
        # The status first: what it calls done was whole before.
        done = status.read(key) != schema.MISSING
        values = stored[variable.name].read(key)
        return np.where(done, values, np.asarray(variable.fill, values.dtype))

    def read_error(key: Key) -> NDArray[np.float32]:
        mean, square = (read(variable, key) for variable in schema.MEASURES[:2])
        return standard_error(mean, square, store.identity)

    variables = {
        variable.name: lazy_variable(
            status, stored[variable.name].dtype, partial(read, variable), attrs[variable.name]
        )
        for variable in schema.MEASURES
    }
    variables["curvature_stderr"] = lazy_variable(
        status,
        np.float32,
        read_error,
        {
            "long_name": f"standard error of curvature, from {_draws(store.identity)} draws",
            "units": attrs["curvature"]["units"],
        },
    )
    name = schema.STATUS.name
    variables[name] = lazy_variable(status, status.dtype, status.read, attrs[name])
    return variables


def _trained(store: ResultsStore, columns: xr.Dataset) -> dict[str, xr.Variable]:
    """Return which weights had been trained on which samples' classes, as coordinates."""
    first = first_epochs_trained(store.identity["classes"], columns.class_position.values)
    read = partial(_is_trained, columns.epoch.values, first)
    return {
        "first_epoch_trained": xr.Variable("sample", first, _FIRST_TRAINED),
        "trained": lazy_variable(store.stored(schema.STATUS.name), np.bool_, read, _TRAINED),
    }


def _is_trained(epochs: NDArray[np.int64], first: NDArray[np.int64], key: Key) -> NDArray[np.bool_]:
    rows, samples = key
    trained: NDArray[np.bool_] = np.greater_equal.outer(epochs[rows], first[samples])
    return trained


def standard_error(
    mean: NDArray[np.float32], square: NDArray[np.float32], identity: Identity
) -> NDArray[np.float32]:
    """Return the standard error of the curvature, a mean over probes.

    Parameters
    ----------
    mean, square : ndarray of float32
        The store's ``curvature`` and ``curvature_sq``.
    identity : dict
        Of the store; says how many draws the means are over.

    Returns
    -------
    ndarray of float32
        sqrt((square − mean²) / (draws − 1)); NaN with a single draw.
    """
    draws = _draws(identity)
    if draws < 2:
        return np.full_like(mean, np.nan)
    wide = mean.astype(np.float64)
    # Rounding of the stored means can leave a small negative number where all norms are equal.
    variance = np.maximum(square.astype(np.float64) - wide**2, 0)
    return np.sqrt(variance / (draws - 1)).astype(np.float32)


def _draws(identity: Identity) -> int:
    estimator = identity["estimator"]
    draws: int = estimator["n_probes"]
    # A pair of probes is one draw.
    return draws // 2 if estimator["method"] == "zeroth-order" else draws
