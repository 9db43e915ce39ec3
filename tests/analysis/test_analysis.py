"""Answers computed from a results store agree with slow definitions and with scikit-learn."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.stats import binned_statistic, norm, pearsonr, spearmanr
from sklearn.metrics import roc_auc_score

from daskcurv.analysis import (
    active_epochs,
    agreement,
    auroc,
    auroc_interval,
    boundary_changes,
    by_class,
    by_cohort,
    by_split,
    cumulative,
    forgetting_events,
    learning_time,
    mean_over_active_epochs,
    median_over_active_epochs,
    rank_correlation,
    threshold_learning_time,
)
from daskcurv.errors import ConfigError
from daskcurv.storage.schema import COMPUTED, INACTIVE, MISSING
from tests.support.results import CLASSES, EPOCHS, SAMPLES, results


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=40))
def test_auroc_is_scikit_learns_also_with_ties(samples):
    scores, flagged = zip(*samples, strict=True)
    assume(any(flagged) and not all(flagged))
    assert auroc(scores, flagged) == pytest.approx(roc_auc_score(flagged, scores), abs=1e-12)


def test_auroc_is_scikit_learns_on_many_continuous_scores():
    generator = np.random.default_rng(0)
    flagged = generator.random(50_000) < 0.01
    scores = generator.lognormal(size=50_000) + flagged
    assert auroc(scores, flagged) == pytest.approx(roc_auc_score(flagged, scores), abs=1e-12)


def test_auroc_counts_pairs_also_with_infinite_scores():
    scores = [math.inf, -math.inf, 0.0, math.inf, -math.inf, 1.0]
    flagged = [True, False, True, False, True, False]
    pairs = [
        0.5 * (a >= b) + 0.5 * (a > b)
        for a, a_flagged in zip(scores, flagged, strict=True)
        for b, b_flagged in zip(scores, flagged, strict=True)
        if a_flagged and not b_flagged
    ]
    assert auroc(scores, flagged) == pytest.approx(np.mean(pairs))


def test_auroc_within_groups_counts_the_pairs_of_the_same_group():
    generator = np.random.default_rng(5)
    groups = generator.integers(-1, 4, 80)
    flagged = generator.random(80) < 0.3
    flagged[groups == 3] = True  # a group without pairs
    # Between groups the scores differ far more than within, and the other way round.
    scores = np.round(generator.normal(size=80) + flagged - 10.0 * groups, 1)
    scores[::17] = np.nan
    higher = [
        float(scores[i] > scores[j]) + (scores[i] == scores[j]) / 2
        for i in np.flatnonzero(flagged & ~np.isnan(scores))
        for j in np.flatnonzero(~flagged & ~np.isnan(scores))
        if groups[i] == groups[j] >= 0
    ]
    area = auroc(scores, flagged, groups)
    assert area == pytest.approx(np.mean(higher), abs=1e-12)
    low, high = auroc_interval(scores, flagged, groups)
    assert low < area < high
    # The same shift of all samples of a group changes nothing.
    assert auroc_interval(scores + 100 * groups, flagged, groups) == pytest.approx((low, high))
    assert auroc(scores, flagged, np.zeros(80, int)) == auroc(scores, flagged)
    assert math.isnan(auroc([1.0, 2.0], [True, False], [0, 1]))


def test_auroc_leaves_out_samples_without_a_score():
    scores = np.array([0.1, np.nan, 0.4, 0.4, np.nan, 0.9])
    flagged = np.array([0, 1, 1, 0, 0, 1])
    known = ~np.isnan(scores)
    assert auroc(scores, flagged) == pytest.approx(roc_auc_score(flagged[known], scores[known]))


@pytest.mark.parametrize(
    ("scores", "flagged"),
    [
        ([], []),
        ([1.0, 2.0], [True, True]),
        ([1.0, 2.0], [False, False]),
        ([1.0, np.nan], [False, True]),
        ([np.nan, np.nan], [False, True]),
    ],
)
def test_auroc_of_one_kind_of_sample_is_not_a_number(scores, flagged):
    assert math.isnan(auroc(scores, flagged))


def counts(dataset: xr.Dataset, epoch: int, sample: int, untrained: bool) -> bool:
    """Whether the epoch of a row counts for a sample, by the definition."""
    if dataset.status.values[epoch, sample] != COMPUTED:
        return False
    return untrained or bool(200 * epoch > dataset.first_epoch_active.values[sample])


def values_of(dataset: xr.Dataset, name: str, sample: int, untrained: bool) -> list[float]:
    """The values of a sample at the epochs that count."""
    return [
        float(dataset[name].values[epoch, sample])
        for epoch in range(EPOCHS)
        if counts(dataset, epoch, sample, untrained)
    ]


def by_definition(
    dataset: xr.Dataset, name: str, number: Callable[[list[float]], float], untrained: bool
) -> list[float]:
    """Apply a function to each sample's values that count; NaN without any, or with NaN."""
    columns = [values_of(dataset, name, sample, untrained) for sample in range(SAMPLES)]
    return [
        number(column) if column and not np.isnan(column).any() else math.nan for column in columns
    ]


def shaped(dataset: xr.Dataset, chunks: dict[str, int] | None) -> xr.Dataset:
    return dataset if chunks is None else dataset.chunk(chunks)


@pytest.fixture(params=[None, {"epoch": 2, "sample": 9}], ids=["numpy", "dask"])
def chunks(request: pytest.FixtureRequest) -> dict[str, int] | None:
    chosen: dict[str, int] | None = request.param
    return chosen


@pytest.fixture(params=[False, True], ids=["numbers", "with nan"])
def data(request: pytest.FixtureRequest) -> xr.Dataset:
    return results(with_nan=request.param)


@pytest.fixture(params=[False, True], ids=["trained", "all weights"])
def untrained(request: pytest.FixtureRequest) -> bool:
    chosen: bool = request.param
    return chosen


@pytest.mark.parametrize("name", ["curvature", "loss", "grad_norm", "prediction"])
def test_sums_means_and_medians_are_over_active_epochs_with_trained_weights(
    data, chunks, untrained, name
):
    reductions = {
        cumulative: sum, mean_over_active_epochs: np.mean, median_over_active_epochs: np.median,
    }  # fmt: skip
    definition: Callable[[list[float]], float]
    for reduction, definition in reductions.items():  # type: ignore[assignment]
        # By default, weights that had not been trained on the sample's class are left out.
        choice = {"include_untrained": True} if untrained else {}
        found = reduction(shaped(data, chunks), name, **choice)
        assert found.dims == ("sample",)
        expected = by_definition(data, name, definition, untrained)
        np.testing.assert_allclose(found, expected, rtol=1e-12)
        assert math.isnan(found.values[0])
        assert ("whether or not" in found.attrs["epochs"]) == untrained
    lengths = [len(values_of(data, name, sample, untrained)) for sample in range(SAMPLES)]
    found = active_epochs(shaped(data, chunks), include_untrained=untrained)
    np.testing.assert_array_equal(found, lengths)


def test_where_the_schedule_is_not_known_every_active_epoch_counts_and_that_is_said():
    data = results()
    unknown = data.assign_coords(
        first_epoch_trained=-xr.ones_like(data.first_epoch_trained),
        trained=xr.ones_like(data.trained),
    )
    found = cumulative(unknown, "loss")
    np.testing.assert_allclose(found, by_definition(data, "loss", sum, untrained=True))
    assert found.attrs["epochs"].endswith("is not known")


def test_results_that_do_not_say_which_weights_had_been_trained_are_refused():
    data = results().drop_vars(["trained", "first_epoch_trained"])
    with pytest.raises(ConfigError, match=r"no coordinate 'trained'.*open_results"):
        cumulative(data, "loss")
    expected = by_definition(data, "loss", sum, untrained=True)
    np.testing.assert_allclose(cumulative(data, "loss", include_untrained=True), expected)


def running_means(values: list[float], power: int) -> list[float]:
    powers = [value**power for value in values]
    return [sum(powers[: end + 1]) / (end + 1) for end in range(len(powers))]


@pytest.mark.parametrize(("norm", "power"), [("squared", 2), ("plain", 1)])
def test_learning_time_is_the_part_of_epochs_before_the_running_mean_is_low(
    data, chunks, untrained, norm, power
):
    known = [
        values
        for sample in range(SAMPLES)
        if (values := values_of(data, "grad_norm", sample, untrained))
        and not np.isnan(values).any()
    ]
    tau = np.mean([mean for values in known for mean in running_means(values, power)])
    found = learning_time(shaped(data, chunks), norm, include_untrained=untrained)
    assert found.attrs["tau"] == pytest.approx(tau, rel=1e-12)

    def part(values: list[float]) -> float:
        return float(np.mean([mean >= tau for mean in running_means(values, power)]))

    np.testing.assert_allclose(found, by_definition(data, "grad_norm", part, untrained), atol=1e-12)
    assert 0 < np.nanmean(found) < 1
    np.testing.assert_array_equal(np.unique(learning_time(data, norm, tau=1e9))[:1], [0])


def test_an_unknown_norm_is_refused():
    with pytest.raises(ConfigError, match="norm is 'cubed'"):
        learning_time(results(), "cubed")


def test_threshold_learning_time_is_in_epochs_that_count(data, chunks, untrained):
    def first(values: list[float]) -> float:
        reached = [number for number, value in enumerate(values, 1) if value <= 0.5]
        return reached[0] if reached else math.nan

    columns = [values_of(data, "loss", sample, untrained) for sample in range(SAMPLES)]
    found = threshold_learning_time(shaped(data, chunks), 0.5, include_untrained=untrained)
    np.testing.assert_array_equal(found, [first(values) for values in columns])
    assert np.isnan(found).any()
    assert (found > 1).any()


def test_forgetting_is_from_correct_to_wrong_at_epochs_that_follow_each_other(
    data, chunks, untrained
):
    found = forgetting_events(shaped(data, chunks), include_untrained=untrained)
    for sample in range(SAMPLES):
        right = data.prediction.values[:, sample] == data.label.values[sample]
        on = np.array([counts(data, epoch, sample, untrained) for epoch in range(EPOCHS)])
        events = sum(
            on[epoch] and on[epoch + 1] and right[epoch] and not right[epoch + 1]
            for epoch in range(EPOCHS - 1)
        )
        assert int(found.forgetting_events[sample]) == events
        assert bool(found.ever_learned[sample]) == (right & on).any()
    assert found.forgetting_events.sum() > 0


@pytest.mark.parametrize("gone", [MISSING, INACTIVE])
def test_becoming_missing_is_not_forgetting(gone):
    data = results()
    data.prediction[:] = data.label
    data.status[:, 1] = COMPUTED
    data.status[4, 1] = gone
    data.prediction[4, 1] = -1
    found = forgetting_events(data, include_untrained=True)
    assert found.forgetting_events.values.tolist() == [0] * SAMPLES


def group_mean(
    data: xr.Dataset, name: str, members: np.ndarray, epoch: int, untrained: bool = False
) -> float:
    on = members & [counts(data, epoch, sample, untrained) for sample in range(SAMPLES)]
    values = data[name].values[epoch, on].astype(np.float64)
    return float(values.mean()) if len(values) else math.nan


def test_means_by_class_are_in_class_order(data, chunks, untrained):
    found = by_class(shaped(data, chunks), "curvature", include_untrained=untrained)
    assert found.dims == ("position", "epoch")
    assert found.position.values.tolist() == list(range(CLASSES))
    for place in range(CLASSES):
        members = data.class_position.values == place
        (label,) = set(data.label.values[members])
        assert found.class_label.values[place] == label
        assert found.class_title.values[place] == "abcdef"[label]
        expected = [
            group_mean(data, "curvature", members, epoch, untrained) for epoch in range(EPOCHS)
        ]
        np.testing.assert_allclose(found.sel(position=place), expected, rtol=1e-12)
    assert np.isnan(found).any()


def test_means_by_cohort_and_by_split(data, chunks, untrained):
    found = by_cohort(shaped(data, chunks), "loss", include_untrained=untrained)
    assert found.active_from.values.tolist() == [0, 400, 800, 10_000]
    for cohort, first in enumerate(found.active_from.values):
        members = data.first_epoch_active.values == first
        expected = [group_mean(data, "loss", members, epoch, untrained) for epoch in range(EPOCHS)]
        np.testing.assert_allclose(found.sel(cohort=cohort), expected, rtol=1e-12)
    split = by_split(shaped(data, chunks), "loss", include_untrained=untrained)
    for code, name in enumerate(("trained", "held out")):
        members = data.split.values == code
        expected = [group_mean(data, "loss", members, epoch, untrained) for epoch in range(EPOCHS)]
        np.testing.assert_allclose(split.sel(part=name), expected, rtol=1e-12)


def change_by_definition(
    data: xr.Dataset, cohort: int, before: int, after: int, untrained: bool = False
) -> float:
    """From one epoch to another, over the samples of a cohort that count at both."""
    rows, pairs = (before // 200, after // 200), []
    for sample in range(SAMPLES):
        if data.first_epoch_active.values[sample] == cohort and all(
            counts(data, row, sample, untrained) for row in rows
        ):
            pairs.append([float(data.curvature.values[row, sample]) for row in rows])
    if not pairs:
        return math.nan
    mean_before, mean_after = np.mean(pairs, axis=0)
    return float(mean_after - mean_before)


def test_changes_are_from_the_last_weights_before_new_classes_to_the_first_after(data, chunks):
    found = boundary_changes(shaped(data, chunks), "curvature")
    assert found.dims == ("cohort", "boundary")
    assert found.boundary.values.tolist() == [400, 800]
    # Saved at the end of epoch 400, before the classes were added: the last that precede them.
    assert found.epoch_before.values.tolist() == [400, 800]
    assert found.epoch_after.values.tolist() == [600, 1000]
    for cohort, first in enumerate([0, 400, 800, 10_000]):
        expected = [
            change_by_definition(data, first, before, after)
            for before, after in ((400, 600), (800, 1000))
        ]
        np.testing.assert_allclose(found.sel(cohort=cohort), expected, rtol=1e-9)
    assert np.isnan(found.sel(cohort=[1, 2], boundary=400)).all()


def test_changes_are_over_the_samples_that_count_at_both_epochs(chunks):
    data = results()
    old = int(np.flatnonzero(data.first_epoch_active == 0)[0])
    data.curvature[2, old] = 1000
    data.status[3, old] = MISSING
    found = boundary_changes(shaped(data, chunks), "curvature").sel(cohort=0, boundary=400)
    assert float(found) == pytest.approx(change_by_definition(data, 0, 400, 600))
    assert abs(float(found)) < 2


def test_changes_name_the_epochs_that_the_store_has():
    data = results().isel(epoch=[0, 1, 4, 6])
    found = boundary_changes(data, "curvature")
    assert found.boundary.values.tolist() == [400, 800]
    assert found.epoch_before.values.tolist() == [200, 800]
    assert found.epoch_after.values.tolist() == [800, 1200]
    assert boundary_changes(data.isel(epoch=[0, 1]), "curvature").sizes["boundary"] == 0


def test_changes_where_the_schedule_is_not_known_pass_over_the_boundary_epoch(chunks):
    data = results()
    unknown = data.assign_coords(
        first_epoch_trained=-xr.ones_like(data.first_epoch_trained),
        trained=xr.ones_like(data.trained),
    )
    found = boundary_changes(shaped(unknown, chunks), "curvature")
    assert found.boundary.values.tolist() == [400, 800]
    assert found.epoch_before.values.tolist() == [200, 600]
    assert found.epoch_after.values.tolist() == [600, 1000]
    expected = change_by_definition(data, 0, 200, 600, untrained=True)
    assert float(found[0, 0]) == pytest.approx(expected)


def test_rank_correlations_are_scipys():
    generator = np.random.default_rng(0)
    columns = generator.integers(0, 9, (3, 50)).astype(float)
    columns[2] += columns[0]
    columns[1, 7] = np.nan
    measures = xr.Dataset({name: ("sample", c) for name, c in zip("abc", columns, strict=True)})
    found = rank_correlation(measures)
    kept = np.delete(columns, 7, axis=1)
    np.testing.assert_allclose(found, spearmanr(kept, axis=1).statistic, atol=1e-12)
    assert found.attrs["samples"] == 49


def test_agreement_is_by_its_definitions():
    generator = np.random.default_rng(1)
    right = generator.random(200)
    left = right + 0.3 * generator.random(200)
    left[3], right[4] = np.nan, np.nan
    found = agreement(left, right, top_k=20, bins=5)
    known = ~np.isnan(left + right)
    a, b = left[known], right[known]
    assert found.samples == 198
    assert found.cosine == pytest.approx(a @ b / np.sqrt((a @ a) * (b @ b)))
    assert found.pearson == pytest.approx(pearsonr(a, b).statistic)
    assert found.spearman == pytest.approx(spearmanr(a, b).statistic)
    assert found.overlap == len({*np.argsort(-a)[:20]} & {*np.argsort(-b)[:20]}) / 20
    expected = binned_statistic(b, a, bins=np.quantile(b, np.linspace(0, 1, 6))).statistic
    np.testing.assert_allclose(found.bin_means, expected)


def test_scores_that_cannot_be_compared_are_refused():
    with pytest.raises(ConfigError, match=r"shapes \(3,\) and \(2,\)"):
        agreement([1, 2, 3], [1, 2])
    with pytest.raises(ConfigError, match="no sample has both"):
        agreement([1, np.nan], [np.nan, 1])


def test_the_interval_holds_the_true_area_about_as_often_as_it_says():
    hits = 0
    for trial in range(200):
        generator = np.random.default_rng(trial)
        flagged = np.arange(120) < 30
        # Of normal scores with means 1 apart, the true area is Φ(1/√2).
        scores = generator.normal(size=120) + flagged
        low, high = auroc_interval(scores, flagged, level=0.9, draws=200, seed=trial)
        hits += low <= norm.cdf(1 / np.sqrt(2)) <= high
    assert 0.83 <= hits / 200 <= 0.96


def test_the_interval_within_groups_holds_the_true_area_about_as_often_as_it_says():
    hits = 0
    groups = np.arange(160) % 2
    for trial in range(200):
        generator = np.random.default_rng(trial)
        flagged = np.arange(160) < 40
        scores = generator.normal(size=160) + flagged + 5 * groups
        low, high = auroc_interval(scores, flagged, groups, level=0.9, draws=200, seed=trial)
        hits += low <= norm.cdf(1 / np.sqrt(2)) <= high
    assert 0.83 <= hits / 200 <= 0.96


def test_scores_that_are_all_equal_tell_nothing_in_any_draw():
    assert auroc_interval(np.zeros(40), np.arange(40) < 10) == (0.5, 0.5)


def test_the_interval_is_keyed_and_holds_the_area():
    scores, flagged = [0.1, 0.4, 0.4, 0.8, np.nan, 0.5], [False, True, False, True, True, False]
    low, high = auroc_interval(scores, flagged, seed=3)
    assert (low, high) == auroc_interval(scores, flagged, seed=3)
    assert low <= auroc(scores, flagged) <= high
    assert all(map(math.isnan, auroc_interval([1.0], [True])))
    with pytest.raises(ConfigError, match="level is 1"):
        auroc_interval(scores, flagged, level=1)
