"""How far numbers for the same samples agree, and how well they find some of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike, NDArray
from scipy.stats import rankdata

from daskcurv.config import check_positive
from daskcurv.errors import ConfigError


def auroc(scores: ArrayLike, flagged: ArrayLike, groups: ArrayLike | None = None) -> float:
    """Return the area under the ROC curve.

    It is the probability that a flagged sample scores higher than one that is not, ties counting
    half (the Mann-Whitney statistic); 0.5 means the scores say nothing.

    Parameters
    ----------
    scores : array_like of float, shape (N,)
        Samples whose score is NaN are left out.
    flagged : array_like of bool, shape (N,)
    groups : array_like of int, shape (N,), optional
        Only samples of the same group are compared, each such pair counting once; samples of a
        negative group are left out. By default all samples are compared with each other, where
        differences between groups, such as sums over unlike numbers of epochs, count as well.

    Returns
    -------
    float
        NaN if no flagged sample can be compared with one that is not.
    """
    above, pairs = 0.0, 0
    for values, marks in _by_group(scores, flagged, groups):
        positives = int(marks.sum())
        rank_sum = float(rankdata(values)[marks].sum())
        above += rank_sum - positives * (positives + 1) / 2
        pairs += positives * (len(marks) - positives)
    return above / pairs if pairs else float("nan")


def _by_group(
    scores: ArrayLike, flagged: ArrayLike, groups: ArrayLike | None
) -> list[tuple[NDArray[np.float64], NDArray[np.bool_]]]:
    """Return the scores and flags of each group that has samples of both kinds."""
    values, marks = np.asarray(scores, dtype=np.float64), np.asarray(flagged, dtype=bool)
    labels = np.zeros(len(values), int) if groups is None else np.asarray(groups)
    known = ~np.isnan(values) & (labels >= 0)
    found = []
    for label in np.unique(labels[known]):
        member = known & (labels == label)
        if 0 < marks[member].sum() < member.sum():
            found.append((values[member], marks[member]))
    return found


def auroc_interval(
    scores: ArrayLike,
    flagged: ArrayLike,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """Return a bootstrap interval for the area under the ROC curve.

    The percentile interval of Efron & Tibshirani, "An Introduction to the Bootstrap" (1993):
    the flagged samples of each group, and its others, are drawn again with replacement.

    Parameters
    ----------
    scores : array_like of float, shape (N,)
        Samples whose score is NaN are left out.
    flagged : array_like of bool, shape (N,)
    groups : array_like of int, shape (N,), optional
        As for `auroc`.
    level : float
        The part of the draws that lie inside.
    draws : int
    seed : int

    Returns
    -------
    low, high : float
        NaN if no flagged sample can be compared with one that is not.
    """
    check_positive(draws=draws)
    if not 0 < level < 1:
        raise ConfigError(f"level is {level!r}; expected a number between 0 and 1")
    generator = np.random.default_rng(seed)
    above, pairs = np.zeros(draws), 0
    for values, marks in _by_group(scores, flagged, groups):
        # How often each distinct value is drawn is all that counts.
        _, inverse = np.unique(values, return_inverse=True)
        counts = [
            np.bincount(inverse[kind], minlength=inverse.max() + 1) for kind in (marks, ~marks)
        ]
        positives, negatives = (int(count.sum()) for count in counts)
        for draw in range(draws):
            drawn = generator.multinomial(positives, counts[0] / positives)
            others = generator.multinomial(negatives, counts[1] / negatives)
            above[draw] += drawn @ (np.cumsum(others) - others / 2)
        pairs += positives * negatives
    if not pairs:
        return float("nan"), float("nan")
    low, high = np.quantile(above / pairs, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def rank_correlation(measures: xr.Dataset) -> xr.DataArray:
    """Return Spearman's rank correlation between all pairs of measures.

    Parameters
    ----------
    measures : xarray.Dataset
        Variables with the dimension ``sample`` alone; samples for which any is NaN are left out.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(measure, other)``
        The attribute ``samples`` says how many were compared. NaN for a measure that is constant.
    """
    names = [str(name) for name in measures.data_vars]
    columns = np.stack([np.asarray(measures[name], dtype=np.float64) for name in names])
    columns = columns[:, ~np.isnan(columns).any(axis=0)]
    matrix = _correlations(rankdata(columns, axis=1))
    return xr.DataArray(
        matrix,
        dims=("measure", "other"),
        coords={"measure": names, "other": names},
        attrs={
            "long_name": "Spearman rank correlation",
            "units": "1",
            "samples": columns.shape[1],
        },
    )


@dataclass(frozen=True)
class Agreement:
    """How two scores of the same samples compare.

    Attributes
    ----------
    samples : int
        Compared; those for which either is NaN are left out.
    cosine, pearson, spearman : float
        NaN if either score is constant (the cosine: zero) or there are fewer than two samples.
    top_k : int
    overlap : float
        Part of the `top_k` samples with the largest score that also have the largest other score.
    bin_edges : ndarray of float64, shape (bins + 1,)
        Of the other score: quantiles of it.
    bin_means : ndarray of float64, shape (bins,)
        Mean score of the samples in each bin; NaN for one that is empty.
    """

    samples: int
    cosine: float
    pearson: float
    spearman: float
    top_k: int
    overlap: float
    bin_edges: NDArray[np.float64]
    bin_means: NDArray[np.float64]


def agreement(
    scores: ArrayLike, others: ArrayLike, top_k: int | None = None, bins: int = 10
) -> Agreement:
    """Compare scores with others of the same samples, such as published memorization scores.

    Parameters
    ----------
    scores, others : array_like of float, shape (N,)
    top_k : int, optional
        By default a tenth of the samples, at least one.
    bins : int

    Returns
    -------
    Agreement

    Raises
    ------
    ConfigError
        If they have different lengths, or no sample has both.
    """
    left, right = np.asarray(scores, np.float64), np.asarray(others, np.float64)
    if left.shape != right.shape or left.ndim != 1:
        raise ConfigError(
            f"scores have shapes {left.shape} and {right.shape}; expected one value per sample in "
            "both, in data-set order"
        )
    known = ~(np.isnan(left) | np.isnan(right))
    left, right = left[known], right[known]
    if not len(left):
        raise ConfigError("no sample has both scores; expected some that are not NaN in both")
    top_k = min(len(left), top_k or max(1, len(left) // 10))
    check_positive(top_k=top_k, bins=bins)
    edges = np.quantile(right, np.linspace(0, 1, bins + 1))
    place = np.clip(np.searchsorted(edges, right, side="right") - 1, 0, bins - 1)
    count = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.bincount(place, left, minlength=bins) / count
        cosine = float(left @ right / (np.linalg.norm(left) * np.linalg.norm(right)))
    both = {*_largest(left, top_k)} & {*_largest(right, top_k)}
    return Agreement(
        samples=len(left),
        cosine=cosine,
        pearson=float(_correlations(np.stack([left, right]))[0, 1]),
        spearman=float(_correlations(rankdata([left, right], axis=1))[0, 1]),
        top_k=top_k,
        overlap=len(both) / top_k,
        bin_edges=edges,
        bin_means=means,
    )


def _largest(values: NDArray[np.float64], count: int) -> list[int]:
    """Return the places of the largest values, of equal ones the first."""
    places: list[int] = np.argsort(-values, kind="stable")[:count].tolist()
    return places


def _correlations(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Pearson's correlation of each pair of rows, NaN where one is constant.

    Unlike `numpy.corrcoef`, without a warning, and of no or one column as well.
    """
    centred = rows - rows.mean(axis=1, keepdims=True) if rows.size else rows
    norms = np.linalg.norm(centred, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        matrix: NDArray[np.float64] = (centred @ centred.T) / np.outer(norms, norms)
    return matrix
