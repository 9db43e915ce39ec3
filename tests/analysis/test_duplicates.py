"""Samples with the same pixels, against a dictionary filled one sample at a time."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcurv.analysis import duplicates
from daskcurv.analysis.duplicates import told
from daskcurv.errors import ConfigError


def keyed(samples: list[tuple[str, int]]) -> xr.Dataset:
    keys, labels = zip(*samples, strict=True)
    return xr.Dataset(
        coords={
            "sample": np.arange(len(keys)),
            "label": ("sample", np.array(labels, np.int16)),
            "sample_key": ("sample", np.array(keys, object)),
        }
    )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.tuples(st.sampled_from("abcdef"), st.integers(0, 2)), min_size=1, max_size=20))
def test_groups_are_those_of_equal_keys_in_the_order_of_their_first_samples(samples):
    found = duplicates(keyed(samples))
    by_key: dict[str, list[int]] = defaultdict(list)
    for sample, (key, _) in enumerate(samples):
        by_key[key].append(sample)
    groups = [members for members in by_key.values() if len(members) > 1]
    expected = {sample: number for number, members in enumerate(groups) for sample in members}
    assert found.duplicate_group.values.tolist() == [
        expected.get(sample, -1) for sample in range(len(samples))
    ]
    differing = {
        sample
        for members in groups
        if len({samples[sample][1] for sample in members}) > 1
        for sample in members
    }
    assert set(np.flatnonzero(found.duplicate_labels_differ).tolist()) == differing
    text = told(found)
    assert ("no two samples" in text) == (not groups)
    assert ("samples " in text and "(label" in text) == bool(differing)


def test_what_is_said_lists_samples_with_their_labels():
    found = duplicates(keyed([("a", 1), ("b", 0), ("a", 2), ("c", 0), ("b", 0)]))
    assert told(found) == (
        "4 samples are 2 images: pixels are the same; the labels of 1 differ: samples 0 (label 1), "
        "2 (label 2)"
    )


def test_results_without_keys_are_refused():
    with pytest.raises(ConfigError, match="sample_key"):
        duplicates(keyed([("a", 1)]).drop_vars("sample_key"))
