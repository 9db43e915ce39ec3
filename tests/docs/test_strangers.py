"""Files that other programs leave in a store are nobody's trouble."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from daskcurv.cli import main
from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, schema
from daskcurv.storage.compact import compact
from daskcurv.storage.integrity.verify import verify
from daskcurv.storage.read import open_results
from tests.support.stores import epoch_columns, finish, make_store

HARMLESS = (
    "._x", ".DS_Store", "Thumbs.db", "desktop.ini", ".nfs0000123", "zarr.json~",
    "zarr (conflicted copy).json",
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """A finished store with such files in its group, its arrays and their directories of chunks."""
    store = finish(make_store(tmp_path / "curvature.zarr", 0, 200))
    arrays = [store.path / "curvature", store.path / "status", store.path / "label"]
    chunks = [one / "c" for one in arrays] + [one / "c" / "0" for one in arrays[:2]]
    for directory in (store.path, store.path / "integrity", *arrays, *chunks):
        for name in HARMLESS:
            (directory / name).write_bytes(b"x")
    for name in ("lost+found", ".snapshot", "@eaDir"):
        (store.path / name).mkdir()
    shutil.copytree(store.path / "loss", store.path / "loss (conflicted copy)")
    return store


def test_they_are_neither_results_nor_worth_a_word(store, tmp_path, caplog):
    before = open_results(store.path).load()
    store.add_epochs(epoch_columns(300))
    again = ResultsStore.open(store.path)
    assert again.done_blocks().tolist() == [[True] * 3, [True] * 3, [False] * 3]
    names = {name for name, _ in again.arrays()}
    assert names == {variable.name for variable in schema.all_variables(MEASURES)}
    assert verify(again).damage == []
    assert open_results(store.path).sel(epoch=[0, 200]).load().equals(before)
    assert caplog.records == []


def test_a_compact_store_does_not_take_them_over(store, tmp_path):
    compact(store, tmp_path / "compact.zarr")
    found = {path.name for path in (tmp_path / "compact.zarr").rglob("*")}
    assert not found & {*HARMLESS, "lost+found", ".snapshot", "@eaDir", "loss (conflicted copy)"}


def test_what_is_not_known_is_named_in_one_line(store, caplog, capfd):
    for name in ("notes.txt", "backup"):
        (store.path / name).write_bytes(b"x")
    store.add_epochs(epoch_columns(300))
    (record,) = caplog.records
    assert "backup, notes.txt" in record.getMessage()
    assert main(["verify", str(store.path)]) == 0
    assert "not looked at: backup, notes.txt" in capfd.readouterr().err
