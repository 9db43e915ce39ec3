"""The numbers that a report shows, gathered from a results store.

Sums over epochs take every epoch. What is drawn over epochs takes at most some hundreds of them, as
many as a figure has room for, the ends of tasks among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from daskcurv import analysis
from daskcurv.analysis.groups import PARTS
from daskcurv.errors import ConfigError, StoreError
from daskcurv.spread import evenly
from daskcurv.storage import open_results, schema

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the quantiles that are drawn: the median, and bands of a half and nine tenths."""

MOST_EPOCHS = 400
DISTRIBUTIONS = 4
CHOSEN = 6


@dataclass(frozen=True)
class Findings:
    """What there is to draw.

    Attributes
    ----------
    dataset : xarray.Dataset
        The results of the epochs that count, lazily.
    epochs : ndarray of int64, shape (E,)
        Those that are drawn.
    boundaries : ndarray of int64
        First epochs of tasks, but for the first task's.
    cohorts : ndarray of float64, shape (cohorts, E, levels)
        Quantiles of the curvature.
    cohort_starts : ndarray of int64, shape (cohorts,)
        First epoch at which a cohort is active.
    parts : ndarray of float64, shape (2, E, levels)
        The same of samples that were trained on, and of those held out.
    relative_errors : ndarray of float64, shape (E, levels)
        Quantiles of the curvature's standard error, relative to it.
    classes : xarray.DataArray, dimensions ``(position, epoch)``
        Mean curvature of each class.
    distributions : dict
        Curvature of all active samples, by epoch.
    active_epochs : xarray.DataArray of int64, dimension ``sample``
        How many epochs a sample was computed at.
    curvature, loss : xarray.DataArray, dimension ``sample``
        Means over active epochs.
    trajectories : xarray.Dataset, dimensions ``(sample, epoch)``
        ``curvature`` and ``curvature_stderr`` of a few samples at the epochs that are drawn.
    """

    dataset: xr.Dataset
    epochs: NDArray[np.int64]
    boundaries: NDArray[np.int64]
    cohorts: NDArray[np.float64]
    cohort_starts: NDArray[np.int64]
    parts: NDArray[np.float64]
    relative_errors: NDArray[np.float64]
    classes: xr.DataArray
    distributions: dict[int, NDArray[np.float64]]
    active_epochs: xr.DataArray
    curvature: xr.DataArray
    loss: xr.DataArray
    trajectories: xr.Dataset


def gather(store: Path, start_epoch: int = 0, samples: Sequence[int] = ()) -> Findings:
    """Read what a report takes.

    Parameters
    ----------
    store : Path
        A results store; samples that are not computed yet are left out.
    start_epoch : int
        Earlier epochs are left out.
    samples : sequence of int
        Whose trajectories to show; a few between the least and the most curved are chosen if none
        are named.

    Returns
    -------
    Findings

    Raises
    ------
    StoreError
        If nothing is computed, or no epoch is left.
    ConfigError
        If there is no such sample.
    """
    dataset = open_results(store).sel(epoch=slice(start_epoch, None))
    if unknown := [sample for sample in samples if not 0 <= sample < dataset.sizes["sample"]]:
        raise ConfigError(
            f"samples has {unknown[0]}; expected numbers from 0 to {dataset.sizes['sample'] - 1}"
        )
    if not dataset.sizes["epoch"]:
        raise StoreError(f"{store} has no epoch from {start_epoch} on; name an earlier one")
    whole = open_results(store, chunks={}).sel(epoch=slice(start_epoch, None))
    means = xr.Dataset(
        {
            "active_epochs": analysis.active_epochs(whole),
            "curvature": analysis.mean_over_active_epochs(whole, "curvature"),
            "loss": analysis.mean_over_active_epochs(whole, "loss"),
        }
    ).compute()
    if means.curvature.isnull().all():
        raise StoreError(f"nothing is computed yet in {store}; launch, then report again")
    shown = _shown(dataset.task.values)
    drawn = dataset.isel(epoch=shown)
    first_active = dataset.first_epoch_active.values
    starts = np.unique(first_active[first_active >= 0])
    starts = starts[starts <= dataset.epoch.values[-1]]
    cohort_of = np.where(first_active >= 0, np.searchsorted(starts, first_active), -1)
    distributed = evenly(len(shown), DISTRIBUTIONS)
    cohorts = np.full((len(starts), len(shown), len(LEVELS)), np.nan)
    parts = np.full((len(PARTS), len(shown), len(LEVELS)), np.nan)
    errors = np.full((len(shown), len(LEVELS)), np.nan)
    distributions = {}
    for place in tqdm(range(len(shown)), desc="reading", unit=" epochs", disable=None):
        row = drawn.isel(epoch=place)
        active = row.status.values == schema.COMPUTED
        curvature = row.curvature.values.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = row.curvature_stderr.values / curvature
        cohorts[:, place] = _quantiles(curvature, active, cohort_of, len(starts))
        parts[:, place] = _quantiles(curvature, active, dataset.split.values, len(PARTS))
        errors[place] = _quantiles(relative, active, np.zeros(len(active), int), 1)[0]
        if place in distributed:
            distributions[int(row.epoch)] = curvature[active & np.isfinite(curvature)]
    return Findings(
        dataset=dataset,
        epochs=drawn.epoch.values,
        boundaries=dataset.epoch.values[1:][np.diff(dataset.task.values) > 0],
        cohorts=cohorts,
        cohort_starts=starts,
        parts=parts,
        relative_errors=errors,
        classes=analysis.by_class(drawn, "curvature").compute(),
        distributions=distributions,
        active_epochs=means.active_epochs,
        curvature=means.curvature,
        loss=means.loss,
        trajectories=_trajectories(drawn, samples or choose(means.curvature)),
    )


def _shown(task: NDArray[np.int16]) -> NDArray[np.intp]:
    """Return which rows to draw: evenly spread ones, and those on both sides of a boundary."""
    count = len(task)
    after = np.flatnonzero(np.diff(task) > 0) + 1
    return np.unique(np.concatenate([evenly(count, MOST_EPOCHS), after, after - 1]))


def _quantiles(
    values: NDArray[np.float64],
    active: NDArray[np.bool_],
    group: NDArray[np.integer],
    count: int,
) -> NDArray[np.float64]:
    """Return quantiles of each group's active samples, shape (count, levels)."""
    found = np.full((count, len(LEVELS)), np.nan)
    usable = active & np.isfinite(values)
    for number in range(count):
        chosen = values[usable & (group == number)]
        if len(chosen):
            found[number] = np.quantile(chosen, LEVELS)
    return found


def choose(curvature: xr.DataArray) -> list[int]:
    """Return a few samples, from the least to the most curved in equal steps of rank."""
    values = curvature.values
    order = np.argsort(values, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    places = order[evenly(len(order), CHOSEN)]
    chosen: list[int] = curvature.sample.values[places].tolist()
    return chosen


def _trajectories(drawn: xr.Dataset, samples: Sequence[int]) -> xr.Dataset:
    few = drawn[["curvature", "curvature_stderr"]].sel(sample=list(samples))
    return few.transpose("sample", "epoch").load()
