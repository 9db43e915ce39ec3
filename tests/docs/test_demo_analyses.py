"""Every analysis on the demo's store, against loops written from the definitions."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from numpy.typing import NDArray

from daskcurv import analysis
from daskcurv.analysis.summary import RANKED, compare_with_known, summarise
from daskcurv.storage import schema
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.read import open_results

Values = NDArray[np.float64]


@pytest.fixture(scope="module")
def data(demo: tuple[Path, str]) -> xr.Dataset:
    return open_results(demo[0] / "demo" / "curvature.zarr", incomplete="raise").load()


@pytest.fixture(scope="module")
def summary(data: xr.Dataset) -> xr.Dataset:
    return summarise(data.chunk({"epoch": 5}))


def counting(data: xr.Dataset) -> NDArray[np.bool_]:
    """Where a sample is active and the weights had been trained on its class.

    The first five classes are trained on from epoch 1, the others from epoch 7.
    """
    order = identity_of(data)["classes"]["order"]
    first = np.where(np.isin(data.label.values, order[:5]), 1, 7)
    computed: NDArray[np.bool_] = data.status.values == schema.COMPUTED
    return computed & (np.arange(13)[:, None] >= first)


def of_each_sample(data: xr.Dataset, name: str, function: Callable[[Values], float]) -> Values:
    """Apply a function to each sample's values at the epochs that count."""
    values, counts = data[name].values.astype(np.float64), counting(data)
    return np.array(
        [function(values[counts[:, sample], sample]) for sample in range(values.shape[1])]
    )


def test_cumulative_measures_are_sums_over_epochs_with_trained_weights(data, summary):
    for name, measure in (("csl", "loss"), ("cumulative_curvature", "curvature"),
                          ("cumulative_grad_norm", "grad_norm")):  # fmt: skip
        expected = of_each_sample(data, measure, np.sum)
        np.testing.assert_allclose(summary[name], expected, rtol=1e-12)
    means = of_each_sample(data, "curvature", np.mean)
    np.testing.assert_allclose(summary.mean_curvature, means, rtol=1e-12)
    medians = of_each_sample(data, "curvature", np.median)
    np.testing.assert_allclose(summary.median_curvature, medians, rtol=1e-12)
    counts = of_each_sample(data, "curvature", len)
    np.testing.assert_array_equal(summary.active_epochs, counts)
    assert {*counts} == {6, 12}, "some are trained on from epoch 7 of 12"
    assert (summary.untrained_epochs == 1).all()


@pytest.mark.parametrize(("name", "power"), [("learning_time", 2), ("learning_time_plain", 1)])
def test_learning_times_count_epochs_before_the_running_mean_is_below_tau(
    data, summary, name, power
):
    def running(norms: Values) -> list[float]:
        return [float(np.mean(norms[: n + 1] ** power)) for n in range(len(norms))]

    norms, counts = data.grad_norm.values.astype(np.float64), counting(data)
    active = [norms[counts[:, sample], sample] for sample in range(norms.shape[1])]
    all_means = [running(one) for one in active]
    tau = np.mean([mean for means in all_means for mean in means])
    assert summary[name].attrs["tau"] == pytest.approx(tau, rel=1e-12)
    expected = [1 - np.mean(np.array(means) < tau) for means in all_means]
    np.testing.assert_allclose(summary[name], expected, atol=1e-12)
    assert 0.1 < np.mean(expected) < 0.9


def test_the_threshold_learning_time_is_the_first_epoch_with_a_small_loss(data, summary):
    def first(losses: Values) -> float:
        below = np.flatnonzero(losses <= 0.1)
        return float(below[0] + 1) if len(below) else np.nan

    expected = of_each_sample(data, "loss", first)
    np.testing.assert_array_equal(summary.threshold_learning_time, expected)
    assert 0 < np.isnan(expected).sum() < len(expected)


def test_forgetting_events_are_steps_from_right_to_wrong(data, summary):
    right, counts = data.prediction.values == data.label.values, counting(data)
    events, learned = [], []
    for sample in range(right.shape[1]):
        own = right[counts[:, sample], sample]
        events.append(sum(before and not after for before, after in pairwise(own)))
        learned.append(own.any())
    np.testing.assert_array_equal(summary.forgetting_events, events)
    np.testing.assert_array_equal(summary.ever_learned, learned)
    assert max(events) > 0


@pytest.mark.parametrize("measure", ["curvature", "loss", "grad_norm"])
def test_means_of_groups_are_over_samples_whose_class_was_trained_on(data, summary, measure):
    values, counts = data[measure].values.astype(np.float64), counting(data)

    def means(member: NDArray[np.bool_]) -> list[float]:
        chosen = counts & member
        return [
            float(np.mean(values[row, chosen[row]])) if chosen[row].any() else np.nan
            for row in range(len(values))
        ]

    order = identity_of(data)["classes"]["order"]
    classes = [means(data.label.values == label) for label in order]
    np.testing.assert_allclose(summary[f"{measure}_by_class"], classes, rtol=1e-9)
    np.testing.assert_array_equal(summary.class_label, order)
    assert np.isnan(classes[-1][6])
    assert not np.isnan(classes[-1][7])
    cohorts = [means(np.isin(data.label.values, part)) for part in (order[:5], order[5:])]
    np.testing.assert_allclose(summary[f"{measure}_by_cohort"], cohorts, rtol=1e-9)
    np.testing.assert_array_equal(summary.active_from, [0, 6])
    parts = [means(data.split.values == part) for part in (0, 1)]
    np.testing.assert_allclose(summary[f"{measure}_by_split"], parts, rtol=1e-9)
    change = summary[f"{measure}_change"]
    np.testing.assert_allclose(change.values[0, 0], cohorts[0][7] - cohorts[0][6], rtol=1e-6)
    assert np.isnan(change.values[1, 0])
    compared = change.boundary.item(), change.epoch_before.item(), change.epoch_after.item()
    assert compared == (6, 6, 7)


def _ranks(values: Values) -> Values:
    return np.array([np.mean(np.flatnonzero(np.sort(values) == value)) for value in values])


def test_rank_correlations_are_pearsons_of_the_ranks_within_each_cohort(data, summary):
    for cohort, start in enumerate((0, 6)):
        own = data.first_epoch_active.values == start
        expected = np.corrcoef([_ranks(summary[name].values[own].astype(float)) for name in RANKED])
        np.testing.assert_allclose(summary.rank_correlation[cohort], expected, atol=1e-12)


def test_flags_and_other_scores_are_compared_as_defined(data, summary, demo):
    flipped = np.load(demo[0] / "demo" / "flipped_samples.npy")
    marks = np.isin(data.sample.values, flipped)
    others = data.loss.values[-1].astype(np.float64)
    found = compare_with_known(summary, marks, others)
    for name in RANKED:
        scores = summary[name].values.astype(np.float64)
        above, below = scores[marks][:, None], scores[~marks][None, :]
        area = np.mean((above > below) + 0.5 * (above == below))
        assert found["auroc"][name]["area"] == pytest.approx(area, abs=1e-12)
        low, high = found["auroc"][name]["interval"]
        assert low <= area <= high
        agreement = found["agreement"][name]
        cosine = scores @ others / np.sqrt((scores @ scores) * (others @ others))
        assert agreement["cosine"] == pytest.approx(cosine, rel=1e-12)
        assert agreement["pearson"] == pytest.approx(np.corrcoef(scores, others)[0, 1], rel=1e-9)
        spearman = np.corrcoef(_ranks(scores), _ranks(others))[0, 1]
        assert agreement["spearman"] == pytest.approx(spearman, rel=1e-9)
        for cohort, start in zip(agreement["within_cohorts"]["cohorts"], (0, 6), strict=True):
            own = data.first_epoch_active.values == start
            spearman = np.corrcoef(_ranks(scores[own]), _ranks(others[own]))[0, 1]
            assert cohort["spearman"] == pytest.approx(spearman, rel=1e-9)
            assert (cohort["active_from"], cohort["samples"]) == (start, own.sum())
            assert cohort["interval"][0] < spearman < cohort["interval"][1]
        assert agreement["samples"] == 1797
        assert agreement["top_k"] == 179
    largest = [{*np.argsort(-one, kind="stable")[:179]} for one in (summary.csl.values, others)]
    assert found["agreement"]["csl"]["overlap"] == len(largest[0] & largest[1]) / 179


def test_what_is_lost_is_unknown_and_spreads_no_further(data):
    spoiled = data.copy(deep=True)
    spoiled.loss.values[9, 0] = spoiled.grad_norm.values[9, 0] = np.nan
    spoiled.status.values[8, 1] = schema.MISSING
    clean, found = summarise(data), summarise(spoiled)
    for name in ("csl", "mean_loss", "learning_time"):
        assert np.isnan(found[name][0])
        assert not found[name][2:].isnull().any()
    np.testing.assert_array_equal(found.csl[2:], clean.csl[2:])
    assert found.active_epochs[1] == clean.active_epochs[1] - 1
    lost = float(data.loss[8, 1])
    assert float(found.csl[1]) == pytest.approx(float(clean.csl[1]) - lost, rel=1e-9)
    label = int(data.label[0])
    row = found.class_label.values.tolist().index(label)
    assert np.isnan(found.loss_by_class.sel(epoch=9).values[row])
    assert np.isnan(found.loss_by_class.values).sum() == (
        np.isnan(clean.loss_by_class.values).sum() + 1
    )
    assert {*analysis.cumulative(data, "loss").attrs} == {"long_name", "units", "epochs"}
