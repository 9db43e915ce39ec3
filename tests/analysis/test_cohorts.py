"""Samples are compared within their cohort, against SciPy and simulated populations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from scipy.stats import norm, spearmanr
from scipy.stats import quantile_test as order_statistics

from daskcurv.analysis import comparable, median_interval, rank_correlation_by_cohort
from daskcurv.errors import ConfigError


def measures(seed: int = 0, sizes: tuple[int, ...] = (120, 9, 150)) -> xr.Dataset:
    """Two measures that rise together in each cohort, while from one cohort to the next one rises
    and the other falls; and a third, with ties and a gap."""
    generator = np.random.default_rng(seed)
    cohort = np.repeat(np.arange(len(sizes)), sizes)
    first = np.append(200 * cohort, -1)
    common = generator.normal(size=len(first))
    columns = {
        "a": common + generator.normal(size=len(first)) + 10 * first,
        "b": common + generator.normal(size=len(first)) - 10 * first,
        "c": generator.integers(0, 4, len(first)).astype(float),
    }
    columns["c"][3] = np.nan
    return xr.Dataset(
        {name: ("sample", values) for name, values in columns.items()},
        coords={"first_epoch_active": ("sample", first)},
    )


def test_correlations_are_those_of_each_cohort_and_not_of_the_mixture():
    data = measures()
    found = rank_correlation_by_cohort(data)
    first = data.first_epoch_active.values
    assert found.active_from.values.tolist() == [0, 200, 400]
    assert found.samples.values.tolist() == [119, 9, 150]
    for cohort, start in enumerate((0, 200, 400)):
        member = (first == start) & ~np.isnan(data.c.values)
        expected = spearmanr(np.stack([data[name].values[member] for name in "abc"]), axis=1)
        np.testing.assert_allclose(found.rank_correlation[cohort], expected.statistic, atol=1e-12)
    assert spearmanr(data.a, data.b).statistic < -0.3
    assert found.combined.sel(measure="a", other="b") > 0.3


def test_intervals_and_the_combination_are_those_of_fishers_transformation():
    data = measures()[["a", "b"]]
    found = rank_correlation_by_cohort(data, level=0.9).sel(measure="a", other="b")
    first = data.first_epoch_active.values
    z, variance, weight = [], [], []
    for cohort, (start, n) in enumerate(((0, 120), (200, 9), (400, 150))):
        rho = spearmanr(data.a[first == start], data.b[first == start]).statistic
        z.append(math.atanh(rho))
        variance.append((1 + rho**2 / 2) / (n - 3))
        weight.append(n - 3)
        half = 1.6448536269514722 * math.sqrt(variance[-1])
        assert float(found.low[cohort]) == pytest.approx(math.tanh(z[-1] - half), rel=1e-12)
        assert float(found.high[cohort]) == pytest.approx(math.tanh(z[-1] + half), rel=1e-12)
    mean = sum(w * one for w, one in zip(weight, z, strict=True)) / 270
    half = 1.6448536269514722 * math.sqrt(
        sum((w / 270) ** 2 * v for w, v in zip(weight, variance, strict=True))
    )
    for name, expected in (("", mean), ("_low", mean - half), ("_high", mean + half)):
        value = float(found[f"combined{name}"])
        assert value == pytest.approx(math.tanh(expected), rel=1e-12)


def test_intervals_hold_the_true_correlation_as_often_as_they_say():
    generator = np.random.default_rng(0)
    true, held, combined = 0.7, 0, 0
    # Of a normal population with this Pearson correlation; Spearman's then is as below.
    spearman = 6 / math.pi * math.asin(true / 2)
    for _ in range(300):
        normal = generator.multivariate_normal([0, 0], [[1, true], [true, 1]], 80)
        first = np.repeat([0, 6], 40)
        found = rank_correlation_by_cohort(
            xr.Dataset(
                {"a": ("sample", normal[:, 0]), "b": ("sample", normal[:, 1])},
                coords={"first_epoch_active": ("sample", first)},
            )
        )
        held += float(found.low[0, 0, 1]) <= spearman <= float(found.high[0, 0, 1])
        combined += float(found.combined_low[0, 1]) <= spearman <= float(found.combined_high[0, 1])
    assert 0.91 <= held / 300 <= 0.985
    assert 0.91 <= combined / 300 <= 0.985


def test_small_and_constant_cohorts_are_shown_and_not_combined():
    first = np.repeat([0, 1, 2, 3], [3, 5, 8, 1])
    a = np.array([1.0, 2, 3, *range(5), *range(8), 1])
    b = np.array([1.0, 3, 2, *[7] * 5, 0, 1, 2, 4, 3, 5, 7, 6, 1])
    found = rank_correlation_by_cohort(
        xr.Dataset(
            {"a": ("sample", a), "b": ("sample", b)},
            coords={"first_epoch_active": ("sample", first)},
        )
    ).sel(measure="a", other="b")
    rho = found.rank_correlation.values
    assert found.samples.values.tolist() == [3, 5, 8, 1]
    assert rho[0] == pytest.approx(0.5)
    assert np.isnan(rho[[1, 3]]).all()
    assert np.isfinite(found.low.values).tolist() == [False, False, True, False]
    assert float(found.combined) == pytest.approx(rho[2])


def test_a_perfect_correlation_stays_one():
    data = xr.Dataset(
        {"a": ("sample", np.arange(9.0)), "b": ("sample", np.arange(9.0) ** 3)},
        coords={"first_epoch_active": ("sample", np.zeros(9, int))},
    )
    found = rank_correlation_by_cohort(data)
    for name in ("rank_correlation", "low", "high", "combined", "combined_low", "combined_high"):
        np.testing.assert_allclose(found[name], 1.0)


@pytest.mark.parametrize("chunks", [None, {"epoch": 2}], ids=["numpy", "dask"])
def test_samples_are_comparable_that_have_every_epoch_their_cohort_has(chunks):
    status = np.array(
        [  # The first three samples are a cohort, the next three another, the last belongs to none.
            [1, 1, 1, 2, 2, 2, 2],
            [1, 1, 0, 2, 2, 2, 2],
            [1, 1, 1, 1, 0, 1, 2],
            [1, 0, 1, 0, 1, 1, 2],
        ],
        np.uint8,
    )
    first, trained_from = [0, 0, 0, 2, 2, 2, -1], [1, 1, 1, 3, 3, 3, -1]
    data = xr.Dataset(
        {"status": (("epoch", "sample"), status)},
        coords={
            "epoch": np.arange(4),
            "first_epoch_active": ("sample", first),
            "trained": (("epoch", "sample"), np.arange(4)[:, None] >= np.array(trained_from)),
        },
    )
    data = data if chunks is None else data.chunk(chunks)
    # Epoch 2 of the second cohort precedes its training.
    assert comparable(data).values.tolist() == [True, False, False, False, True, True, False]
    every = comparable(data, include_untrained=True)
    assert every.values.tolist() == [True, False, False, False, False, True, False]


@pytest.mark.parametrize("count", [6, 7, 40, 101, 2000])
@pytest.mark.parametrize("level", [0.5, 0.95])
def test_a_medians_interval_is_that_of_scipys_quantile_test(count, level):
    values = np.random.default_rng(count).lognormal(size=count)
    median, low, high = median_interval([*values, np.nan], level)
    assert median == pytest.approx(np.median(values), rel=1e-12)
    expected = order_statistics(values, q=0, p=0.5).confidence_interval(level)
    # Where SciPy's interval is lopsided, ours leaves no more outside on either side.
    assert low <= expected.low
    assert high >= expected.high
    ordered = np.sort(values)
    place = int(np.searchsorted(ordered, low))
    assert high == ordered[count - 1 - place]
    assert abs(place - count / 2) <= 2 + norm.ppf((1 + level) / 2) * math.sqrt(count) / 2


def test_a_median_without_enough_samples_has_no_interval():
    assert median_interval([3.0, 1.0, 2.0])[0] == 2.0
    assert np.isnan(median_interval([1.0, 2, 3, 4, 5])[1:]).all()
    assert median_interval([1.0, 2, 3, 4, 5, 6]) == (3.5, 1.0, 6.0)
    assert np.isnan(median_interval([np.nan])).all()
    for level in (0.0, 1.0, 95):
        with pytest.raises(ConfigError, match="expected a number between 0 and 1"):
            median_interval([1.0], level)
