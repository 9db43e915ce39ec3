"""Comparisons within cohorts: the samples of the classes that one task introduced.

Cohorts have been trained on for different numbers of epochs. Among all samples, what distinguishes
the cohorts shows as a relation between measures: pooled, two measures correlate that do not within
any cohort, or do not although they do within each (Simpson, "The Interpretation of Interaction in
Contingency Tables", 1951). So samples are compared within their cohort, over the same epochs, and
cohorts are combined afterwards.
"""

from __future__ import annotations

import math
from statistics import NormalDist

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom

from daskcurv.analysis.agreement import rank_correlation
from daskcurv.analysis.per_sample import counted
from daskcurv.errors import ConfigError

LEVEL = 0.95


def cohorts(dataset: xr.Dataset | xr.DataArray) -> tuple[NDArray[np.int64], NDArray[np.intp]]:
    """Return which cohorts there are, and which one each sample belongs to.

    Parameters
    ----------
    dataset : xarray.Dataset or xarray.DataArray
        With the coordinate ``first_epoch_active``.

    Returns
    -------
    active_from : ndarray of int64, shape (cohorts,)
        First epoch at which each cohort is active, ascending.
    cohort : ndarray of int, shape (N,)
        Number of each sample's cohort; -1 where it is not known.
    """
    first = dataset.first_epoch_active.values
    active_from = np.unique(first[first >= 0])
    return active_from, np.where(first >= 0, np.searchsorted(active_from, first), -1)


def comparable(dataset: xr.Dataset, *, include_untrained: bool = False) -> xr.DataArray:
    """Return which samples have results at all epochs at which any sample of their cohort has.

    In a store that is not finished, means of other samples are over fewer epochs.

    Parameters
    ----------
    dataset : xarray.Dataset
    include_untrained : bool
        Count epochs whose weights had not been trained on a sample's class, too.

    Returns
    -------
    xarray.DataArray of bool, dimension ``sample``
        False for samples without results.
    """
    counts = counted(dataset, include_untrained)
    active_from, cohort = cohorts(dataset)
    # Samples of no cohort take one of their own.
    numbers = xr.DataArray(np.where(cohort < 0, len(active_from), cohort), dims="sample")
    member = xr.DataArray(np.arange(len(active_from) + 1), dims="cohort") == numbers
    reached = xr.dot(counts.astype(np.float32), member.astype(np.float32), dim="sample") > 0
    own: xr.DataArray = counts.sum("epoch")
    every: xr.DataArray = own == reached.sum("epoch").isel(cohort=numbers)
    return every & (own > 0) & (cohort >= 0)


def rank_correlation_by_cohort(measures: xr.Dataset, level: float = LEVEL) -> xr.Dataset:
    """Return Spearman's rank correlation of all pairs of measures within each cohort.

    Intervals are by Fisher's transformation z = artanh ρ with the variance (1 + ρ²/2)/(n − 3) of
    Bonett & Wright, "Sample Size Requirements for Estimating Pearson, Kendall and Spearman
    Correlations" (Psychometrika 65, 2000), as if samples were drawn independently.

    The combination is the mean of z over cohorts with weights n − 3, transformed back (Fisher,
    "Statistical Methods for Research Workers", 1925; Hedges & Olkin, "Statistical Methods for
    Meta-Analysis", 1985); the variance of that mean follows from those of its terms. It describes
    the cohorts at hand: where their intervals do not overlap, they have no correlation in common.

    Parameters
    ----------
    measures : xarray.Dataset
        Variables with the dimension ``sample`` alone, and the coordinate ``first_epoch_active``.
        Samples for which any variable is NaN are left out, and those of no known cohort. Within a
        cohort, the values should be over the same epochs: see `comparable`.
    level : float
        Of the intervals.

    Returns
    -------
    xarray.Dataset
        ``rank_correlation``, ``low`` and ``high``, float64 with dimensions ``(cohort, measure,
        other)``; ``samples``, int64, how many of each cohort were compared; and without the
        dimension ``cohort``, ``combined``, ``combined_low`` and ``combined_high``. Cohorts have the
        coordinate ``active_from``. NaN where a measure is constant; intervals, and what is
        combined, take cohorts of more than three samples.
    """
    active_from, cohort = cohorts(measures)
    names = [str(name) for name in measures.data_vars]
    shape = (len(active_from), len(names), len(names))
    rho, samples = np.full(shape, np.nan), np.zeros(len(active_from), np.int64)
    for number in range(len(active_from)):
        one = rank_correlation(measures.isel(sample=np.flatnonzero(cohort == number)))
        # Of equal ranks, rounding can give a little more than 1.
        rho[number] = np.clip(one.values, -1, 1)
        samples[number] = one.attrs["samples"]
    weight = np.where(np.isnan(rho) | (samples[:, None, None] <= 3), 0, samples[:, None, None] - 3)
    quantile = _two_sided(level)
    with np.errstate(divide="ignore", invalid="ignore"):
        z = np.arctanh(rho)
        error = np.sqrt((1 + rho**2 / 2) / weight)
        total = weight.sum(axis=0)
        mean = np.where(weight > 0, weight * z, 0).sum(axis=0) / total
        spread = np.sqrt(np.where(weight > 0, (weight * error) ** 2, 0).sum(axis=0)) / total
        bounds = {
            "low": np.where(weight > 0, np.tanh(z - quantile * error), np.nan),
            "high": np.where(weight > 0, np.tanh(z + quantile * error), np.nan),
        }
        combined = {
            "combined": np.tanh(mean),
            "combined_low": np.tanh(mean - quantile * spread),
            "combined_high": np.tanh(mean + quantile * spread),
        }
    pair = ("measure", "other")
    names_of = {
        "rank_correlation": "Spearman rank correlation within the cohort",
        "combined": "mean of Fisher's z over cohorts, weighted by samples − 3, transformed back",
        **{f"{start}{end}": f"{end} end of the {level:.0%} interval"
           for start in ("", "combined_") for end in ("low", "high")},
    }  # fmt: skip
    own = {"rank_correlation": rho, **bounds}
    arrays = {
        name: ((*(("cohort",) if name in own else ()), *pair), values,
               {"long_name": names_of[name], "units": "1"})
        for name, values in (own | combined).items()
    }  # fmt: skip
    return xr.Dataset(
        {
            **arrays,
            "samples": ("cohort", samples, {"long_name": "samples that were compared"}),
        },
        coords={
            "cohort": np.arange(len(active_from)),
            "active_from": ("cohort", active_from),
            "measure": names,
            "other": names,
        },
    )


def median_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """Return a median and an interval for it, whatever the distribution.

    The interval lies between two order statistics that are equally far from the ends, and covers
    the median of the population with at least the probability `level` (David & Nagaraja, "Order
    Statistics", 2003, section 7.1).

    Parameters
    ----------
    values : array_like of float, shape (N,)
        Independent draws; NaN are left out.
    level : float

    Returns
    -------
    median, low, high : float
        NaN without values; the interval is NaN if there are too few: for 95 %, fewer than six.
    """
    _two_sided(level)
    known = np.asarray(values, np.float64).ravel()
    known = np.sort(known[~np.isnan(known)])
    count = len(known)
    if not count:
        return math.nan, math.nan, math.nan
    # How many of n values lie below the median is binomial; here, the probability of at most k.
    below = binom.cdf(np.arange((count + 1) // 2), count, 0.5)
    place = int(np.count_nonzero(below <= (1 - level) / 2)) - 1
    median = float(np.median(known))
    if place < 0:
        return median, math.nan, math.nan
    return median, float(known[place]), float(known[count - 1 - place])


def _two_sided(level: float) -> float:
    """Return the standard normal quantile of an interval of this level."""
    if not 0 < level < 1:
        raise ConfigError(f"level is {level!r}; expected a number between 0 and 1")
    return NormalDist().inv_cdf((1 + level) / 2)
