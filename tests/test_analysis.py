"""Answers computed from a results store agree with slow definitions and with scikit-learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import xarray as xr
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from daskcurv.analysis import auroc, mean_over_active_epochs
from daskcurv.storage.schema import COMPUTED, INACTIVE, MISSING


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


def results() -> xr.Dataset:
    """Return 5 epochs of 4 samples: always active, active late, one epoch missing, never active."""
    status = np.array(
        [
            [COMPUTED, INACTIVE, COMPUTED, INACTIVE],
            [COMPUTED, INACTIVE, MISSING, INACTIVE],
            [COMPUTED, INACTIVE, COMPUTED, INACTIVE],
            [COMPUTED, COMPUTED, COMPUTED, MISSING],
            [COMPUTED, COMPUTED, COMPUTED, INACTIVE],
        ],
        dtype=np.uint8,
    )
    # Values where nothing was computed must not matter, whatever they are.
    curvature = np.random.default_rng(0).uniform(0.1, 10, status.shape).astype(np.float32)
    prediction = np.arange(status.size, dtype=np.int16).reshape(status.shape)
    return xr.Dataset(
        {
            "status": (("epoch", "sample"), status),
            "curvature": (("epoch", "sample"), curvature),
            "prediction": (("epoch", "sample"), prediction),
        },
        coords={"epoch": [0, 200, 400, 600, 800], "sample": np.arange(4)},
    )


@pytest.mark.parametrize("chunks", [None, {"epoch": 1, "sample": 3}])
@pytest.mark.parametrize("name", ["curvature", "prediction"])
def test_mean_is_over_the_epochs_at_which_a_sample_was_computed(name, chunks):
    dataset = results()
    expected = []
    for sample in range(4):
        column = [
            float(dataset[name].values[epoch, sample])
            for epoch in range(5)
            if dataset["status"].values[epoch, sample] == COMPUTED
        ]
        expected.append(sum(column) / len(column) if column else math.nan)
    mean = mean_over_active_epochs(dataset if chunks is None else dataset.chunk(chunks), name)
    assert mean.dims == ("sample",)
    np.testing.assert_allclose(mean.values, expected, rtol=1e-6)
    assert math.isnan(mean.values[3])
