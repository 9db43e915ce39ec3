"""Values of a results store for a dataset that holds on to it: masked, and never made up.

An object of its own, not functions within a function, as a dataset is handed to other processes
together with what it reads from.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any, Literal

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.config import Identity
from daskcurv.errors import StoreError
from daskcurv.experiment.identity import Recorded
from daskcurv.storage import schema
from daskcurv.storage.chunks import Key, shown
from daskcurv.storage.lazy import lazy_variable
from daskcurv.storage.working import ResultsStore

log = logging.getLogger(__name__)

Incomplete = Literal["mask", "raise", "include"]


class Reader:
    """Reads selections of the per-sample variables of a store, as it was when it was opened.

    Parameters
    ----------
    store : ResultsStore
    incomplete : {"mask", "raise", "include"}
        As for `daskcurv.open_results`.
    complete : ndarray of bool
        Whether each row's epoch is on record as complete.
    """

    def __init__(self, store: ResultsStore, incomplete: Incomplete, complete: NDArray[np.bool_]):
        self._stored = {variable.name: store.stored(variable.name) for variable in store.per_sample}
        self._fills = {variable.name: variable.fill for variable in store.per_sample}
        self._identity = store.identity
        self._path, self._remedy = store.path.absolute(), store.remedy
        self._incomplete = incomplete
        self._complete = np.ones_like(complete) if store.is_compact else complete
        self._said: dict[str, object] = {}

    def variables(self, attrs: dict[str, dict[str, Any]]) -> dict[str, xr.Variable]:
        """Return the variables of a dataset, to be read when they are needed.

        Parameters
        ----------
        attrs : dict
            Of each of the store's `per_sample`.
        """
        status = self._stored[schema.STATUS.name]
        variables = {
            name: lazy_variable(status, stored.dtype, partial(self.read, name), attrs[name])
            for name, stored in self._stored.items()
        }
        if not {"curvature", "curvature_sq"} <= variables.keys():
            return variables
        variables["curvature_stderr"] = lazy_variable(
            status,
            np.float32,
            self.read_error,
            {
                "long_name": f"standard error of curvature, {_from_draws(self._identity)}",
                "units": attrs["curvature"]["units"],
            },
        )
        return variables

    def read(self, name: str, key: Key) -> NDArray[Any]:
        """Return a selection of a variable.

        Raises
        ------
        StoreError
            If a file is damaged; or if one is gone of what is on record as done, unless such blocks
            are to be masked.
        """
        if self._incomplete == "include":
            return self._stored[name].read(key)
        done = None
        if self._incomplete == "mask" and not self._complete.all() and name != schema.STATUS.name:
            # The status first: what it calls done was whole before.
            done = self._stored[schema.STATUS.name].read(key) != schema.MISSING
        values = self._stored[name].read(key)
        # The files afterwards: one that goes in between is noticed.
        lost = self._lost(key)
        if lost is not None:
            done = ~lost if done is None else done & ~lost
        if done is None:
            return values
        return np.where(done, values, values.dtype.type(self._fills[name]))

    def read_error(self, key: Key) -> NDArray[np.float32]:
        """Return a selection of the standard error of the curvature."""
        mean, square = (self.read(name, key) for name in ("curvature", "curvature_sq"))
        return standard_error(mean, square, self._identity)

    def _lost(self, key: Key) -> NDArray[np.bool_] | None:
        """Return which values are of blocks that have lost a file of any variable, if some are."""
        located = {name: stored.located(key) for name, stored in self._stored.items()}
        status, there = located[schema.STATUS.name]
        touched = status.touched(there)
        gone = {name: files.lost(touched) for name, (files, _) in located.items()}
        if not any(gone.values()):
            return None
        # Without a status, a block of an epoch that is not complete has not been done yet.
        undone = {
            file
            for file in gone[schema.STATUS.name]
            if not self._complete[file[0] * status.shape[0]]
        }
        lost = [
            (file, located[name][0]) for name in gone for file in gone[name] if file not in undone
        ]
        if not lost:
            return None
        what = [f"{files.where(file)}: {files.name}" for file, files in lost]
        if self._incomplete == "raise":
            raise StoreError(
                f"results store {self._path} has lost files that it has on record: {shown(what)}. "
                f"{self._remedy}; or open it with incomplete='mask' to leave these out"
            )
        # Of several threads that find the same loss, one logs it.
        here = object()
        if new := [one for one in what if self._said.setdefault(one, here) is here]:
            log.warning(
                "results store %s has lost files, and what they hold is left out: %s. %s",
                self._path,
                shown(new),
                self._remedy,
            )
        return status.mask(there, {file for file, _ in lost})


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
    estimator = Recorded.of(identity).estimator
    draws = estimator.draws if estimator else 1
    if draws < 2:
        return np.full_like(mean, np.nan)
    wide = mean.astype(np.float64)
    # Rounding of the stored means can leave a small negative number where all norms are equal.
    variance = np.maximum(square.astype(np.float64) - wide**2, 0)
    return np.sqrt(variance / (draws - 1)).astype(np.float32)


def _from_draws(identity: Identity) -> str:
    estimator = Recorded.of(identity).estimator
    if estimator is None:
        return "NaN because the number of probes is not known"
    return f"from {estimator.draws} draws"
