"""Every analysis of a results store at once."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.analysis import groups, per_sample
from daskcurv.analysis.agreement import agreement, auroc, auroc_interval
from daskcurv.analysis.cohorts import rank_correlation_by_cohort
from daskcurv.analysis.duplicates import duplicates
from daskcurv.errors import DataError

LOSS_THRESHOLD = 0.1
"""In nats: a loss that leaves the right class a probability of 0.9."""

RANKED = (
    "csl", "cumulative_curvature", "mean_curvature", "median_curvature", "cumulative_grad_norm",
    "learning_time", "forgetting_events",
)  # fmt: skip
"""Per-sample numbers that are compared with each other, and with what is known from elsewhere."""

_PREDICTED = "predicted"
_MEASURES = ("loss", "curvature", "grad_norm")


def summarise(dataset: xr.Dataset, *, include_untrained: bool = False) -> xr.Dataset:
    """Apply every analysis.

    Parameters
    ----------
    dataset : xarray.Dataset
        As opened by `daskcurv.open_results`; with ``chunks={}`` if it does not fit into memory.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.Dataset
        In memory. By sample: ``csl``, ``mean_loss`` and ``median_loss``, the same of curvature and
        gradient norm (with ``cumulative_`` for the sum), ``learning_time`` (squared norms) and
        ``learning_time_plain``, ``threshold_learning_time`` of the loss, ``forgetting_events``,
        ``ever_learned``, and how many epochs count, ``active_epochs``, and do not,
        ``untrained_epochs``. By group and epoch: curvature, loss and gradient norm ``_by_class``,
        ``_by_cohort`` and ``_by_split``, and the ``_change`` of each cohort as new classes are
        trained on. And ``rank_correlation`` of those `ranked` within each cohort, with the other
        variables of `daskcurv.analysis.rank_correlation_by_cohort`, ``rank_correlation_low`` to
        ``rank_correlation_combined_high``. The attribute ``epochs`` says which
        epochs count. Where samples have keys, also what `daskcurv.analysis.duplicates` gives.
        Without predictions, as in an imported store, there are no forgetting events.

    Raises
    ------
    DataError
        If no epoch counts for any sample, or no sample has results that are numbers throughout.
    """
    choice = {"include_untrained": include_untrained}
    active = per_sample.active_epochs(dataset, include_untrained=True)
    counting = per_sample.active_epochs(dataset, **choice)
    lazy = {
        "active_epochs": counting,
        "untrained_epochs": per_sample.described(
            active - counting,
            "active epochs left out: weights had not been trained on the sample's class",
            units="1",
        ),
        "learning_time": per_sample.learning_time(dataset, "squared", **choice),
        "learning_time_plain": per_sample.learning_time(dataset, "plain", **choice),
        "threshold_learning_time": per_sample.threshold_learning_time(
            dataset, LOSS_THRESHOLD, include_untrained=include_untrained
        ),
        **per_sample.forgetting_events(dataset, **choice),
    }
    for name in _MEASURES:
        total = "csl" if name == "loss" else f"cumulative_{name}"
        lazy[total] = per_sample.cumulative(dataset, name, **choice)
        lazy[f"mean_{name}"] = per_sample.mean_over_active_epochs(dataset, name, **choice)
        lazy[f"{name}_by_class"] = groups.by_class(dataset, name, **choice)
        lazy[f"{name}_by_cohort"] = groups.by_cohort(dataset, name, **choice)
        lazy[f"{name}_by_split"] = groups.by_split(dataset, name, **choice)
        lazy[f"{name}_change"] = groups.boundary_changes(dataset, name)
    predicted = (dataset.prediction >= 0).any()
    summary = xr.Dataset({**lazy, _PREDICTED: predicted}).compute()
    for name in _MEASURES:
        # One at a time: each takes a whole variable in memory.
        median = per_sample.median_over_active_epochs(dataset, name, **choice)
        summary[f"median_{name}"] = median.compute()
    if not summary[_PREDICTED]:
        # Of results that were imported without predictions, they would say: never learned.
        summary = summary.drop_vars(["forgetting_events", "ever_learned"])
    summary = summary.drop_vars(_PREDICTED)
    if not summary.active_epochs.any():
        raise DataError(
            "no epoch counts for any sample: at the epochs that there are, weights had not been "
            "trained on its class; include untrained weights, or compute later epochs"
        )
    if not ranked(summary):
        raise DataError("no sample has results that are numbers at each of its epochs")
    correlations = rank_correlation_by_cohort(ranked(summary))
    for part, values in correlations.items():
        own = part if part == "rank_correlation" else f"rank_correlation_{part}"
        summary[own] = values
    if "sample_key" in dataset.coords:
        summary = summary.merge(duplicates(dataset), compat="override", join="exact")
    return summary.assign_attrs(epochs=per_sample.epochs_counted(dataset, include_untrained))


def ranked(summary: xr.Dataset) -> xr.Dataset:
    """Return those of `RANKED` that the results have, NaN for samples of which no epoch counts."""
    measures = summary[[name for name in RANKED if name in summary]]
    measures = measures.where(summary.active_epochs > 0)
    return measures[[name for name in measures if measures[name].notnull().any()]]


def compare_with_known(
    summary: xr.Dataset,
    flagged: NDArray[np.bool_] | None = None,
    scores: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Hold the per-sample numbers of a summary against what is known from elsewhere.

    Parameters
    ----------
    summary : xarray.Dataset
        Of `summarise`.
    flagged : ndarray of bool, shape (N,), optional
        Samples that are to be found, such as those with a wrong label.
    scores : ndarray of float64, shape (N,), optional
        Scores of the same samples, such as published memorization scores.

    Returns
    -------
    dict
        JSON-able: for each of `ranked`, under ``auroc`` the area with its 95 % bootstrap interval,
        for all samples together and, ``within_cohorts``, for pairs of samples of the same cohort;
        and under ``agreement`` what `daskcurv.analysis.agreement` gives for all samples together,
        and, ``within_cohorts``, Spearman's correlation of each cohort and of cohorts combined, with
        95 % intervals.

    Raises
    ------
    DataError
        If no epoch counts for any of the flagged samples, or for any of the others.
    """
    found: dict[str, Any] = {}
    if flagged is not None:
        known = summary.active_epochs.values > 0
        if not (flagged & known).any() or not (~flagged & known).any():
            kind = "none" if not (flagged & known).any() else "all"
            raise DataError(
                f"{kind} of the {known.sum()} samples that have results are flagged; expected some "
                "that are and some that are not, to tell them apart"
            )
        found["flagged"] = int(flagged.sum())
        found["flagged_with_results"] = int((flagged & known).sum())
        cohort = summary.first_epoch_active
        found["auroc"] = {
            name: {
                "area": auroc(values, flagged),
                "interval": auroc_interval(values, flagged),
                "within_cohorts": {
                    "area": auroc(values, flagged, cohort),
                    "interval": auroc_interval(values, flagged, cohort),
                },
            }
            for name, values in ranked(summary).items()
        }
    if scores is not None:
        found["agreement"] = {
            name: {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in asdict(agreement(values, scores)).items()
            }
            | {"within_cohorts": _within_cohorts(values, scores)}
            for name, values in ranked(summary).items()
        }
    return found


def _within_cohorts(values: xr.DataArray, scores: NDArray[np.float64]) -> dict[str, Any]:
    both = xr.Dataset({"value": values, "score": ("sample", scores)})
    found = rank_correlation_by_cohort(both).sel(measure="value", other="score")
    return {
        "spearman": float(found.combined),
        "interval": [float(found.combined_low), float(found.combined_high)],
        "cohorts": [
            {
                "active_from": int(one.active_from),
                "samples": int(one.samples),
                "spearman": float(one.rank_correlation),
                "interval": [float(one.low), float(one.high)],
            }
            for one in (found.isel(cohort=number) for number in range(found.sizes["cohort"]))
        ],
    }
