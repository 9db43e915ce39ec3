"""The numbers that a report shows, gathered from a results store.

Means over epochs take every epoch whose weights had been trained on the sample's class. What is
drawn over epochs takes at most some hundreds of them, as many as a figure has room for, the ends of
tasks among them. Samples are compared within their cohort: the classes that were added together,
which have been trained on for the same epochs.
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
from daskcurv.analysis.cohorts import cohorts
from daskcurv.analysis.groups import PARTS
from daskcurv.analysis.per_sample import counted
from daskcurv.errors import ConfigError, StoreError
from daskcurv.experiment.identity import Recorded
from daskcurv.spread import evenly
from daskcurv.storage import ResultsStore
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.finite import not_finite_by_epoch
from daskcurv.storage.integrity.lost import lost_files
from daskcurv.storage.read import open_results

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the quantiles that are drawn: the median, and bands of a half and nine tenths."""

MOST_EPOCHS = 400
DISTRIBUTIONS = 4
CHOSEN = 6


@dataclass(frozen=True)
class Findings:
    """What there is to draw. C cohorts have results; E epochs are drawn.

    Attributes
    ----------
    dataset : xarray.Dataset
        The results of the epochs that were asked for, lazily.
    imported : bool
        Whether the results were imported, so that much about them is not known.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on a sample's class.
    values : int
        How many (epoch, sample) values there are.
    not_finite : dict
        By epoch, how many samples have results that are not finite numbers, where there are some.
    lost : list of str
        Blocks that have lost a file, and are left out.
    untrained : xarray.DataArray of int64, dimension ``epoch``
        How many of them are of such epochs.
    epochs : ndarray of int64, shape (E,)
        Those that are drawn.
    boundaries : ndarray of int64
        First epochs of tasks, but for the first task's.
    cohort_starts : ndarray of int64, shape (C,)
        First epoch at which a cohort is active.
    cohort : ndarray of int, shape (N,)
        Number of each sample's cohort; −1 if it has none, or no results.
    cohorts : ndarray of float64, shape (C, E, levels)
        Quantiles of the curvature.
    parts : ndarray of float64, shape (2, C, E, levels)
        The same of samples that were trained on, and of those held out.
    relative_errors : ndarray of float64, shape (C, E, levels)
        Quantiles of the curvature's standard error, relative to it.
    classes : xarray.DataArray, dimensions ``(position, epoch)``
        Mean curvature of each class.
    distributions : dict
        By epoch, the curvature of each cohort's samples.
    curvature, loss : xarray.DataArray, dimension ``sample``
        Means over the epochs that count; NaN for samples that lack some that their cohort has.
    not_comparable : int
        How many samples with results those are.
    trajectories : xarray.Dataset, dimensions ``(sample, epoch)``
        ``curvature``, ``curvature_stderr`` and the coordinate ``trained`` of a few samples at the
        epochs that are drawn, also where the weights had not been trained.
    """

    dataset: xr.Dataset
    imported: bool
    include_untrained: bool
    values: int
    not_finite: dict[int, int]
    lost: list[str]
    untrained: xr.DataArray
    epochs: NDArray[np.int64]
    boundaries: NDArray[np.int64]
    cohort_starts: NDArray[np.int64]
    cohort: NDArray[np.intp]
    cohorts: NDArray[np.float64]
    parts: NDArray[np.float64]
    relative_errors: NDArray[np.float64]
    classes: xr.DataArray
    distributions: dict[int, list[NDArray[np.float64]]]
    curvature: xr.DataArray
    loss: xr.DataArray
    not_comparable: int
    trajectories: xr.Dataset


def select(store: Path, start_epoch: int = 0, samples: Sequence[int] = ()) -> xr.Dataset:
    """Open the results that a report is on.

    Raises
    ------
    StoreError
        If no epoch is left.
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
    return dataset


def gather(
    store: Path,
    start_epoch: int = 0,
    samples: Sequence[int] = (),
    include_untrained: bool = False,
) -> Findings:
    """Read what a report takes.

    Parameters
    ----------
    store : Path
        A results store; samples that are not computed yet are left out.
    start_epoch : int
        Earlier epochs are left out.
    samples : sequence of int
        Whose trajectories to show; if none are named, a few between the least and the most curved
        of their cohorts.
    include_untrained : bool
        Also count epochs whose weights had not been trained on a sample's class.

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
    choice = {"include_untrained": include_untrained}
    opened = ResultsStore.open(store)
    dataset = select(store, start_epoch, samples)
    means = _means(open_results(store, chunks={}).sel(epoch=dataset.epoch), include_untrained)
    if not means.values_at.sum():
        raise StoreError(f"nothing is computed yet in {store}; launch, then report again")
    if means.curvature.isnull().all():
        raise StoreError(
            f"no weights in {store} had been trained on the classes of the samples computed with "
            "them; add --include_untrained to report on these results"
        )
    shown = _shown(dataset.task.values)
    drawn = dataset.isel(epoch=shown)
    starts, cohort = _cohorts_with_results(means)
    imported = Recorded.of(identity_of(dataset)).imported
    split = np.full(len(cohort), -1) if imported else dataset.split.values
    counts = means.values_at if include_untrained else means.values_at - means.untrained_at
    with_results = np.flatnonzero(counts.values[shown])
    distributed = with_results[evenly(len(with_results), DISTRIBUTIONS)]
    levels = (len(starts), len(shown), len(LEVELS))
    by_cohort, errors = np.full(levels, np.nan), np.full(levels, np.nan)
    parts = np.full((len(PARTS), *levels), np.nan)
    distributions = {}
    for place in tqdm(range(len(shown)), desc="reading", unit=" epochs", disable=None):
        row = drawn.isel(epoch=place)
        group = np.where(counted(row, include_untrained).values, cohort, -1)
        curvature = row.curvature.values.astype(np.float64)
        with np.errstate(divide="ignore", invalid="ignore"):
            relative = row.curvature_stderr.values / curvature
        by_cohort[:, place] = _quantiles(curvature, group, len(starts))
        errors[:, place] = _quantiles(relative, group, len(starts))
        for part in range(len(PARTS)):
            own = np.where(split == part, group, -1)
            parts[part, :, place] = _quantiles(curvature, own, len(starts))
        if place in distributed:
            known = np.where(np.isfinite(curvature), group, -1)
            distributions[int(row.epoch)] = [curvature[known == n] for n in range(len(starts))]
    comparable = means.comparable & means.curvature.notnull()
    curvature_of_each = means.curvature.where(comparable)
    return Findings(
        dataset=dataset,
        imported=imported,
        include_untrained=include_untrained,
        values=int(means.values_at.sum()),
        not_finite=not_finite_by_epoch(opened, dataset),
        lost=_lost_blocks(opened, dataset),
        untrained=means.untrained_at,
        epochs=drawn.epoch.values,
        boundaries=dataset.epoch.values[1:][np.diff(dataset.task.values) > 0],
        cohort_starts=starts,
        cohort=cohort,
        cohorts=by_cohort,
        parts=parts,
        relative_errors=errors,
        classes=analysis.by_class(drawn, "curvature", **choice).compute(),
        distributions=distributions,
        curvature=curvature_of_each,
        loss=means.loss.where(comparable),
        not_comparable=int((means.curvature.notnull() & ~comparable).sum()),
        trajectories=_trajectories(drawn, samples or choose(curvature_of_each, cohort)),
    )


def sizes(findings: Findings, part: int | None = None) -> NDArray[np.int64]:
    """Count the samples with results of each cohort, of all or of a part of the split.

    Returns
    -------
    ndarray of int64, shape (C,)
    """
    own = findings.cohort >= 0
    if part is not None:
        own &= findings.dataset.split.values == part
    counts: NDArray[np.int64] = np.bincount(
        findings.cohort[own], minlength=len(findings.cohort_starts)
    )
    return counts


def _means(whole: xr.Dataset, include_untrained: bool) -> xr.Dataset:
    """Return what takes all epochs of all samples, in one pass."""
    computed = counted(whole, include_untrained=True)
    choice = {"include_untrained": include_untrained}
    return xr.Dataset(
        {
            "values_at": computed.sum("sample"),
            "untrained_at": (computed & ~whole.trained).sum("sample"),
            "comparable": analysis.comparable(whole, **choice),
            "curvature": analysis.mean_over_active_epochs(whole, "curvature", **choice),
            "loss": analysis.mean_over_active_epochs(whole, "loss", **choice),
        }
    ).compute()


def _lost_blocks(store: ResultsStore, dataset: xr.Dataset) -> list[str]:
    """Return the blocks that have lost a file, in words, each once."""
    lost = lost_files(store, dataset.epoch.values.tolist())
    return list(dict.fromkeys(one.where for one in lost))


def _cohorts_with_results(means: xr.Dataset) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    starts, cohort = cohorts(means)
    cohort = np.where(means.curvature.notnull().values, cohort, -1)
    found = np.unique(cohort[cohort >= 0])
    return starts[found], np.where(cohort >= 0, np.searchsorted(found, cohort), -1)


def _shown(task: NDArray[np.int16]) -> NDArray[np.intp]:
    """Return which rows to draw: evenly spread ones, and those on both sides of a boundary."""
    count = len(task)
    after = np.flatnonzero(np.diff(task) > 0) + 1
    return np.unique(np.concatenate([evenly(count, MOST_EPOCHS), after, after - 1]))


def _quantiles(
    values: NDArray[np.float64], group: NDArray[np.integer], count: int
) -> NDArray[np.float64]:
    """Return quantiles of each group's samples, shape (count, levels)."""
    found = np.full((count, len(LEVELS)), np.nan)
    group = np.where(np.isfinite(values), group, -1)
    for number in range(count):
        chosen = values[group == number]
        if len(chosen):
            found[number] = np.quantile(chosen, LEVELS)
    return found


def choose(curvature: xr.DataArray, cohort: NDArray[np.intp]) -> list[int]:
    """Return a few samples, from the least to the most curved of their cohorts.

    Parameters
    ----------
    curvature : xarray.DataArray, dimension ``sample``
        Samples whose curvature is NaN are not chosen.
    cohort : ndarray of int, shape (N,)

    Returns
    -------
    list of int
        In equal steps of the rank within the cohort.
    """
    values = curvature.values
    standing = np.full(len(values), np.nan)
    for number in np.unique(cohort):
        own = np.flatnonzero((cohort == number) & ~np.isnan(values))
        standing[own[np.argsort(values[own], kind="stable")]] = np.linspace(0, 1, len(own))
    order = np.argsort(standing, kind="stable")[: np.count_nonzero(~np.isnan(values))]
    places = order[evenly(len(order), CHOSEN)]
    chosen: list[int] = curvature.sample.values[places].tolist()
    return chosen


def _trajectories(drawn: xr.Dataset, samples: Sequence[int]) -> xr.Dataset:
    few = drawn[["curvature", "curvature_stderr"]].sel(sample=list(samples))
    return few.transpose("sample", "epoch").load()
