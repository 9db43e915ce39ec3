"""Files that say which samples a training run held out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from daskcurv.errors import ConfigError, DataError
from daskcurv.experiment.held_out import digest_of, read_held_out
from daskcurv.runs.accounts.run_file import overridden, to_mapping
from daskcurv.runs.options import LaunchOptions

N = 6


def saved(path: Path, values: np.ndarray) -> Path:
    np.save(path, values)
    return path


def test_a_mask_and_the_numbers_of_its_samples_say_the_same(tmp_path):
    mask = np.array([False, True, False, False, True, False])
    of_mask = read_held_out(saved(tmp_path / "mask.npy", mask), N)
    of_numbers = read_held_out(saved(tmp_path / "numbers.npy", np.array([4, 1], np.uint16)), N)
    assert of_mask.tolist() == of_numbers.tolist() == mask.tolist()
    assert digest_of(of_mask) == digest_of(of_numbers) != digest_of(~mask)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.zeros(N + 1, bool), ["a mask of 7 samples", "has 6"]),
        (np.array([0, N]), ["sample 6", "from 0 to 5"]),
        (np.array([-1, 2]), ["sample -1", "from 0 to 5"]),
        (np.array([2, 3, 2]), ["sample 2 more than once"]),
        (np.array([0, 1, 0, 0, 1, 0]), ["more than once", "a mask needs the dtype bool"]),
        (np.array([0.0, 1.0]), ["dtype float64", "bool of shape (6,)"]),
        (np.zeros((N, 1), bool), ["shape (6, 1)", "bool of shape (6,)"]),
        (np.ones(N, bool), ["holds out all 6"]),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path, values, expected):
    path = saved(tmp_path / "held.npy", values)
    with pytest.raises(DataError) as refused:
        read_held_out(path, N)
    assert all(part in str(refused.value) for part in [str(path), *expected]), refused.value


@pytest.mark.parametrize("content", [None, b"", b"not an array", b"\x93NUMPY\x01\x00v\x00{'de"])
def test_a_file_that_cannot_be_read_is_named(tmp_path, content):
    path = tmp_path / "held.npy"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=r"held\.npy cannot be read.*bool of shape \(6,\)"):
        read_held_out(path, N)


@pytest.mark.parametrize(
    "given",
    [
        {"held_out": "first:"},
        {"held_out": "first:-1"},
        {"held_out": "first:2.5"},
        {"held_out": "first:2", "validation_per_class": 2},
    ],
)
def test_options_that_cannot_be_used_are_refused_before_data_is_read(given):
    with pytest.raises(ConfigError, match="held_out"):
        LaunchOptions(**given)


def test_a_run_file_has_the_absolute_path_and_another_option_replaces_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    file = to_mapping(LaunchOptions(held_out="held.npy"))
    assert file["held_out"] == str(tmp_path / "held.npy")
    assert "held_out" not in overridden(file, {"validation_per_class": 3})
    assert "validation_per_class" not in overridden(
        {"validation_per_class": 3}, {"held_out": "held.npy"}
    )
    assert to_mapping(LaunchOptions(held_out="first:3"))["held_out"] == "first:3"
