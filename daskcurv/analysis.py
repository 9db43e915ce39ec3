"""Questions asked of a results store, as functions on its Dataset."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray

from daskcurv.storage import schema


def mean_over_active_epochs(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Average a measure over the epochs at which a sample's class is active.

    Cumulative sums (cumulative sample loss and its like) grow with the number of epochs summed;
    where classes arrive at different epochs the mean makes their samples comparable.

    Parameters
    ----------
    dataset : xarray.Dataset
        As opened by `daskcurv.open_results`.
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray
        Float64, dimension ``sample``; NaN for samples that are never active, and for those whose
        measure is not a number at some epoch.
    """
    computed = dataset.status == schema.COMPUTED
    total = dataset[name].where(computed, 0).astype(np.float64).sum("epoch", skipna=False)
    epochs = computed.sum("epoch")
    mean: xr.DataArray = (total / epochs.where(epochs > 0)).compute()
    return mean


def auroc(scores: ArrayLike, flagged: ArrayLike) -> float:
    """Return the area under the ROC curve.

    It is the probability that a flagged sample scores higher than one that is not, ties counting
    half (the Mann-Whitney statistic); 0.5 means the scores say nothing.

    Parameters
    ----------
    scores : array_like of float, shape (N,)
        Samples whose score is NaN are left out.
    flagged : array_like of bool, shape (N,)

    Returns
    -------
    float
        NaN if all samples or none are flagged.
    """
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(flagged, dtype=bool)
    known = ~np.isnan(values)
    values, marks = values[known], marks[known]
    positives, negatives = int(marks.sum()), int((~marks).sum())
    if not positives or not negatives:
        return float("nan")
    rank_sum = float(_ranks(values)[marks].sum())
    return (rank_sum - positives * (positives + 1) / 2) / (positives * negatives)


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return 1-based ranks, ties sharing their mean."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: NDArray[np.float64] = (last - (counts - 1) / 2)[inverse]
    return mean
