"""The table of active classes, and the verdict on a class order."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from daskcurv.cli import main

# From the documentation of the training run.
START = [8, 44, 23, 58, 49, 80, 64, 86, 30, 92, 38, 5, 25, 52, 6, 74, 14, 40, 37, 45]


@pytest.fixture
def printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> str:
    monkeypatch.chdir(tmp_path)
    assert main(["verify_class_partitioning"]) == 0
    return str(capsys.readouterr().out)


def test_the_table_has_the_documented_columns_and_rows(printed):
    header, *lines = printed.splitlines()[2:23]
    assert re.split(r" {2,}", header.strip()) == [
        "Epoch", "Task", "#Classes", "Active Classes (cumulative, shortened)",
    ]  # fmt: skip
    rows = [re.split(r" {2,}", line.strip()) for line in lines]
    assert [[int(value) for value in row[:3]] for row in rows] == [
        [epoch, epoch // 200, min(100, 5 + 5 * (epoch // 200))] for epoch in range(0, 4000, 200)
    ]
    listed = [row[3].replace("…, ", "").split(", ") for row in rows]
    for index, classes in enumerate(listed[:4]):
        newest = START[5 * index : 5 * index + 5]
        assert list(map(int, classes)) == (START[:5] + newest if index else START[:5])
    added = [classes[-5:] for classes in listed]
    assert sorted(int(label) for classes in added for label in classes) == list(range(100))
    assert [("…" in row[3]) for row in rows] == [False, False] + [True] * 18
    assert all(len(line) <= 80 for line in [header, *lines])


def test_nothing_is_printed_as_python_would(printed):
    assert not re.search(r"\w+\(\w+=|\[|'", printed)
    assert (
        "schedule: 5 classes at epoch 0, 5 more every 200 epochs, active from the epoch at which"
        in printed
    )


@pytest.mark.parametrize("swapped", [(0, 1), (98, 99)])
def test_another_order_fails_the_checks_that_it_violates(tmp_path, monkeypatch, capsys, swapped):
    monkeypatch.chdir(tmp_path)
    order = np.array(START + [n for n in range(100) if n not in START])
    first, second = swapped
    order[[first, second]] = order[[second, first]]
    np.save("order.npy", order)
    assert main(["verify_class_partitioning", "--class_order", "order.npy"]) == 1
    found = capsys.readouterr().out
    failed = re.findall(r"^FAIL  (.*)$", found, re.M)
    assert "the class order is the one of experiment index 0" in failed
    assert ("the first 20 classes are the documented ones" in failed) == (first == 0)
    assert "verdict: class partitioning not verified" in found
