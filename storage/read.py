"""Results out, as an xarray Dataset."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import xarray as xr
from dask.array.core import normalize_chunks
from numpy.typing import NDArray

from daskcurv.errors import ConfigError, StoreError
from daskcurv.experiment.identity import Recorded
from daskcurv.storage import schema
from daskcurv.storage.attributes import writable
from daskcurv.storage.chunks import UNREADABLE, Key
from daskcurv.storage.integrity.columns import refuse_damaged_columns
from daskcurv.storage.lazy import lazy_variable
from daskcurv.storage.masking import Incomplete, Reader
from daskcurv.storage.working import ResultsStore

Chunks = Mapping[str, Any] | int | Literal["auto"]

_EPOCHS_PER_DASK_CHUNK = 64

_LAUNCHERS_OWN = "checkpoint_mtime_ns"
"""By which a launch knows a file again. NetCDF 3 has no type for it."""

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
    chunks: Chunks | None = None,
) -> xr.Dataset:
    """Open a results store for querying, also while a run is filling it.

    Parameters
    ----------
    path : str or Path
        A store that a launch fills, or one that ``daskcurv compact`` has made.
    incomplete : {"mask", "raise", "include"}
        What to do about blocks that are not done, and about those that were done and have lost a
        file since. ``"mask"`` shows their samples as missing: status 0, NaN, prediction −1, and
        warns in the log if files are lost. ``"raise"`` refuses stores with unfinished epochs, and
        selections from blocks that have lost a file. ``"include"`` shows what is there: a block
        that was interrupted while being written may hold some values already.
    chunks : mapping, int or "auto", optional
        By default, selecting is lazy and what is selected becomes NumPy arrays as soon as it is
        computed with: best for questions about some samples or epochs. Otherwise, variables are
        Dask arrays: with a mapping in pieces of so many epochs and samples (``{}`` for 64 epochs
        each), else as for `xarray.Dataset.chunk`. Best for computations on all of a large store,
        in bounded memory.

    Returns
    -------
    xarray.Dataset
        Dimensions ``(epoch, sample)``, sorted by epoch. Besides what is stored it has
        ``curvature_stderr``, the standard error of ``curvature`` (its probes are a sample), and
        the coordinates ``first_epoch_trained`` (int64, by sample: the first epoch whose weights
        had been trained on the sample's class; -1 if no schedule is recorded, as in an imported
        store) and ``trained`` (bool, by epoch and sample: whether the weights had been; True where
        that is not known, so that nothing is left out). Where the names of the classes are known,
        there is the coordinate ``class_name``. It can be pickled, and written with ``to_netcdf``
        and ``to_zarr``; ``attrs["identity"]`` is JSON text for that; read it with
        `daskcurv.storage.identity_of`.

    Raises
    ------
    StoreError
        If `path` is not a results store, or a column of it is damaged; or if it has unfinished
        epochs and `incomplete` is ``"raise"``. When values are read, if a file of theirs is
        damaged; or if one is lost and `incomplete` is ``"raise"``.
    """
    if incomplete not in get_args(Incomplete):
        raise ConfigError(f"incomplete is {incomplete!r}; expected one of {get_args(Incomplete)}")
    # Absolute, as what is read later is read from there wherever the process is by then.
    store = ResultsStore.open(Path(path).absolute())
    per_sample = [variable.name for variable in store.per_sample]
    try:
        opened: xr.Dataset = xr.open_zarr(store.path, chunks=None)
        # Metadata and columns can be of different moments while epochs are being added.
        dataset = opened.drop_vars([*per_sample, _LAUNCHERS_OWN])
        dataset = dataset.isel(epoch=slice(len(store.epochs))).load()
    except UNREADABLE as error:
        refuse_damaged_columns(store)
        raise StoreError(f"results store {path} cannot be read: {error}") from error
    refuse_damaged_columns(store, lost_only=True)
    complete = dataset.complete.values
    if incomplete == "raise" and not complete.all():
        unfinished = sorted(dataset.epoch.values[~complete].tolist())
        raise StoreError(
            f"results store {path} has unfinished epochs {unfinished}; launch again to finish "
            "them, or open with incomplete='mask'"
        )
    attrs = {name: opened[name].attrs for name in per_sample}
    dataset = dataset.assign(Reader(store, incomplete, complete).variables(attrs))
    dataset = dataset.assign_coords(_trained(store, dataset))
    if names := store.attrs.get("class_names"):
        labels = dataset.label.values
        known = np.array([*names, ""])[np.where(labels < len(names), labels, len(names))]
        dataset = dataset.assign_coords(
            class_name=("sample", known, {"long_name": "name of the sample's class"})
        )
    order = np.argsort(dataset.epoch.values, kind="stable")
    if (np.diff(order) < 0).any():
        dataset = dataset.isel(epoch=order)
    # How it is stored here is nothing for a copy to keep: chunks that fit no others, and codecs.
    dataset = dataset.drop_encoding().assign_attrs(writable(dataset.attrs))
    if chunks is None:
        return dataset
    return dataset.chunk(_chunks(chunks, dataset.status.shape))


def _chunks(chunks: Chunks, shape: tuple[int, ...]) -> dict[str, Any]:
    """Return the pieces of each dimension, the same for all variables whatever their types."""
    wanted: dict[str, Any] = {"epoch": _EPOCHS_PER_DASK_CHUNK, "sample": -1}
    wanted.update(chunks if isinstance(chunks, Mapping) else dict.fromkeys(wanted, chunks))
    sizes = normalize_chunks(  # type: ignore[no-untyped-call]
        (wanted["epoch"], wanted["sample"]), shape=shape, dtype=np.float32
    )
    return {**wanted, "epoch": sizes[0], "sample": sizes[1]}


def _trained(store: ResultsStore, columns: xr.Dataset) -> dict[str, xr.Variable]:
    """Return which weights had been trained on which samples' classes, as coordinates."""
    first = Recorded.of(store.identity).curriculum.first_epochs_trained(
        columns.class_position.values
    )
    read = partial(_is_trained, columns.epoch.values, first)
    return {
        "first_epoch_trained": xr.Variable("sample", first, _FIRST_TRAINED),
        "trained": lazy_variable(store.stored(schema.STATUS.name), np.bool_, read, _TRAINED),
    }


def _is_trained(epochs: NDArray[np.int64], first: NDArray[np.int64], key: Key) -> NDArray[np.bool_]:
    rows, samples = key
    trained: NDArray[np.bool_] = np.greater_equal.outer(epochs[rows], first[samples])
    return trained
