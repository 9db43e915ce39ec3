"""A compact store says the same as the one it was made from, or is not there."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from daskcurv.cli import main
from daskcurv.errors import StoreError
from daskcurv.storage import ResultsStore, export_epochs, schema
from daskcurv.storage import compact as module
from daskcurv.storage.compact import compact
from daskcurv.storage.integrity.columns import discard_column
from daskcurv.storage.integrity.verify import verify
from daskcurv.storage.read import open_results
from tests.support.damage import KINDS, contents, damage, same, undone
from tests.support.disks import enlarge, mounted
from tests.support.project import Project
from tests.support.stores import chunk, epoch_columns, files_below, finish, make_store


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Three finished epochs, added in an order of their own."""
    store = make_store(tmp_path / "curvature.zarr", 200, 400, attrs={"class_names": list("abcde")})
    store.add_epochs(epoch_columns(0))
    return ResultsStore.open(finish(store).path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "compact.zarr"


@pytest.fixture
def made(store: ResultsStore, out: Path, monkeypatch: pytest.MonkeyPatch) -> ResultsStore:
    """A compact store with several chunks and shards in every direction."""
    monkeypatch.setattr(module, "EPOCHS_PER_SHARD", 2)
    monkeypatch.setattr(module, "SAMPLES_PER_CHUNK", 2)
    monkeypatch.setattr(module, "SAMPLES_PER_SHARD", 4)
    monkeypatch.setattr(module, "_SLAB_BYTES", 1)
    compact(store, out)
    return ResultsStore.open(out)


def test_it_says_the_same(store, made):
    assert same(contents(made.path), contents(store.path))
    left, right = open_results(made.path), open_results(store.path)
    assert left.epoch.values.tolist() == [0, 200, 400]
    xr.testing.assert_identical(left.load().drop_attrs(deep=False), right.drop_attrs(deep=False))


def test_plain_xarray_opens_it(store, made):
    plain = xr.open_zarr(made.path).load()
    expected = xr.open_zarr(store.path).sortby("epoch").load()
    xr.testing.assert_equal(plain, expected)


@pytest.mark.parametrize(
    "key",
    [
        (slice(None), 3),
        (slice(None), slice(2, 7)),
        (slice(None), np.array([9, 1, 4])),
        (slice(None), np.flatnonzero(np.arange(11) % 5 == 2)),
        (1, slice(None)),
        (np.array([2, 0]), np.array([5, 5, 0])),
        (slice(None), slice(None)),
        (slice(None), slice(0, 0)),
        (2, 8),
    ],
)
def test_selections_agree_in_whichever_layout_they_are_read(store, made, key):
    for name in ("curvature", "curvature_sq", "directional_eig"):
        found, expected = open_results(made.path)[name], open_results(store.path)[name]
        np.testing.assert_array_equal(found[key], expected.load()[key])


def test_a_sample_and_an_epoch_are_each_read_from_where_they_are_together(made, monkeypatch):
    loss, asked = made.stored("loss"), []
    read = zarr.Array.__getitem__

    def reading(self: zarr.Array[Any], key: Any) -> Any:
        asked.append(self.path)
        return read(self, key)

    monkeypatch.setattr(zarr.Array, "__getitem__", reading)
    loss.read((slice(None), 3))
    loss.read((1, slice(None)))
    assert asked == ["by_sample/loss", "loss"]


def test_exports_are_the_same(store, made, tmp_path):
    for number, source in enumerate((store, made)):
        list(export_epochs(source, tmp_path / str(number), extras=True))
    assert files_below(tmp_path / "0") == files_below(tmp_path / "1")


def test_verify_finds_it_in_order(made):
    found = verify(made)
    assert (found.blocks, found.missing, found.damage) == (9, 0, [])


@pytest.mark.parametrize("kind", KINDS)
def test_verify_notices_damage(made, tmp_path, kind):
    generator = random.Random(1)
    for _ in range(6):
        with undone(made.path, tmp_path):
            files = sorted(p for p in made.path.rglob("c/**/*") if p.is_file())
            paths = damage(kind, files, generator)
            assert verify(ResultsStore.open(made.path)).damage, paths


def test_damage_of_a_compact_store_is_not_repaired_but_said(made, capfd):
    next((made.path / "by_sample" / "loss").rglob("c/0/0")).write_bytes(b"")
    assert main(["verify", str(made.path)]) == 1
    output = capfd.readouterr().err
    assert "by_sample/loss, places 0 to 4" in output
    assert "Make it again with daskcurv compact" in output
    assert main(["verify", str(made.path), "--repair"]) == 2
    assert "was made by compact" in capfd.readouterr().err


def test_what_is_not_finished_is_not_compacted(store, out):
    store.add_epochs(epoch_columns(600))
    with pytest.raises(StoreError, match=r"unfinished epochs \[600\]"):
        compact(store, out)
    assert not out.exists()


def test_what_is_damaged_is_not_compacted(store, out):
    chunk(store, "loss", 1, 1).write_bytes(b"nonsense")
    with pytest.raises(StoreError, match=r"epoch 400 block 1 .* is damaged: loss cannot be read"):
        compact(store, out)
    assert [path.name for path in out.parent.iterdir()] == ["curvature.zarr"]


def test_a_column_that_is_lost_is_named(store, out):
    discard_column(store, schema.COLUMN["label"])
    with pytest.raises(StoreError, match="label of results store"):
        compact(store, out)


def test_nothing_that_exists_is_replaced(store, made, out):
    before = files_below(out)
    with pytest.raises(StoreError, match="exists"):
        compact(store, out)
    with pytest.raises(StoreError, match="made by compact already"):
        compact(made, out.with_name("again"))
    assert files_below(out) == before


def test_a_compact_store_takes_no_results(made):
    with pytest.raises(StoreError, match="was made by compact, for reading"):
        made.add_epochs(epoch_columns(600))
    with pytest.raises(StoreError, match="was made by compact, for reading"):
        made.write_block(0, 0, {})


def test_what_is_written_wrong_is_noticed(store, out, monkeypatch):
    read = ResultsStore.read

    def misread(self: ResultsStore, name: str, *where: Any) -> np.ndarray:
        values = read(self, name, *where)
        return values + 1 if name == "by_sample/loss" else values

    monkeypatch.setattr(ResultsStore, "read", misread)
    with pytest.raises(StoreError, match=r"by_sample/loss of .* is not what was written"):
        compact(store, out)
    assert not out.exists()


def test_a_killed_compaction_leaves_nothing_under_its_name_and_is_started_anew(store, out):
    parent = out.parent
    command = [sys.executable, "-m", "daskcurv", "compact", str(store.path), str(out)]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 60
    while not any(parent.glob(".compact.zarr.*.partial/loss/c/**/*")):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not out.exists()
    assert list(parent.glob(".compact.zarr.*.partial"))
    subprocess.run(command, check=True)
    assert same(contents(out), contents(store.path))
    assert {path.name for path in parent.iterdir()} == {"curvature.zarr", "compact.zarr"}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with mounted(tmp_path / "disk", "200k") as disk:
        yield disk


def test_a_full_disk_ends_it_with_a_message_and_a_rerun_completes_it(store, small_disk, capfd):
    arguments = ["compact", str(store.path), str(small_disk / "compact.zarr")]
    assert main(arguments) == 2
    assert "No space left on device" in capfd.readouterr().err
    assert list(small_disk.iterdir()) == []
    enlarge(small_disk)
    assert main(arguments) == 0
    assert same(contents(small_disk / "compact.zarr"), contents(store.path))


def test_from_a_launch_to_a_compact_store_that_no_launch_fills(project: Project):
    run = project.launch("--no_export")
    assert run.returncode == 0, run.stdout
    assert "daskcurv compact" in run.stdout
    out = project.root / "compact.zarr"
    assert main(["compact", str(project.store), str(out)]) == 0
    assert same(contents(out), contents(project.store))
    shutil.rmtree(project.store)
    project.store = out
    run = project.launch("--no_export")
    assert run.returncode == 2
    assert "was made by compact, for reading" in run.stdout
