"""Weight files found by their names, here and in other people's directories."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from daskcurv.errors import CheckpointError
from daskcurv.experiment.naming import discover


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).touch()


def test_both_naming_schemes_are_found_in_the_order_of_epochs(tmp_path):
    names = ["index-0_epoch-1000.pt", "checkpoint_index-0_epoch-200.pt", "index-0_epoch-30.pt"]
    touch(tmp_path, *names)
    found = discover(tmp_path, 0)
    assert list(found.items()) == [
        (30, tmp_path / "index-0_epoch-30.pt"),
        (200, tmp_path / "checkpoint_index-0_epoch-200.pt"),
        (1000, tmp_path / "index-0_epoch-1000.pt"),
    ]


def test_other_files_and_other_experiments_are_ignored(tmp_path):
    touch(
        tmp_path,
        "index-2_epoch-5.pt",
        "index-12_epoch-7.pt",
        "index-2_epoch-6.pt.tmp",
        "old_index-2_epoch-8.pt",
        "index-2_epoch-.pt",
        "index-2_epoch-9.pth",
        "experiment_checkpoint-2.pkl",
        "notes.txt",
    )
    (tmp_path / "subdirectory").mkdir()
    assert discover(tmp_path, 2) == {5: tmp_path / "index-2_epoch-5.pt"}


@pytest.mark.parametrize(
    "name",
    [
        "index-2_epoch-9.PT",
        "index-2_epoch-9.pth",
        "index-2_epoch-9.pt.part",
        "Index-2_epoch-0009.pt",
        "index_2_epoch_9.pt",
        "index-2-epoch-9.pt",
        "index-2_epoch-9 (1).pt",
        "copy of checkpoint_index-02_epoch-9.pt",
    ],
)
def test_a_file_that_looks_like_a_checkpoint_of_another_epoch_is_named(tmp_path, caplog, name):
    caplog.set_level(logging.WARNING)
    touch(tmp_path, "index-2_epoch-5.pt", "index-2_epoch-5.pt.bak", "index-3_epoch-7.pth", name)
    assert list(discover(tmp_path, 2)) == [5]
    (warning,) = caplog.messages
    assert f"not used: {name}. Rename" in warning
    assert str(tmp_path) in warning


def test_an_index_without_checkpoints_is_told_which_indices_there_are(tmp_path):
    touch(tmp_path, "index-3_epoch-0.pt", "checkpoint_index-1_epoch-0.pt")
    with pytest.raises(CheckpointError) as refusal:
        discover(tmp_path, 0)
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert "experiment index 0" in message
    assert "it has index 1, 3" in message


@pytest.mark.parametrize(
    "names",
    [
        ("index-0_epoch-4.pt", "checkpoint_index-0_epoch-4.pt"),
        ("index-0_epoch-4.pt", "index-0_epoch-004.pt"),
    ],
)
def test_two_files_for_one_epoch_are_refused_and_named(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(CheckpointError, match="epoch 4") as refusal:
        discover(tmp_path, 0)
    assert str(tmp_path) in str(refusal.value)
    assert all(name in str(refusal.value) for name in names)


def test_a_directory_that_is_missing_empty_or_a_file_is_refused_and_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing", "empty", "file"):
        with pytest.raises(CheckpointError) as refusal:
            discover(tmp_path / name, 0)
        assert str(tmp_path / name) in str(refusal.value)
