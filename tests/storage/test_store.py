"""The results store: exact, resumable at any instant, open to others."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import dask.array
import numpy as np
import pytest
import xarray as xr
import zarr
from zarr.storage import LocalStore

from daskcurv.errors import ConfigError, StoreError, StoreWriteError
from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, schema
from daskcurv.storage.integrity.columns import column_files, damaged_columns, restore_columns
from daskcurv.storage.read import open_results
from daskcurv.storage.stored import Stored
from tests.support.stores import (
    BLOCK,
    IDENTITY,
    LABELS,
    PER_SAMPLE,
    N,
    block_values,
    chunk,
    epoch_columns,
    files_below,
    fill_row,
    inactive_values,
    make_store,
    sample_columns,
)


def test_a_store_stays_what_it_is_when_the_process_changes_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = make_store(Path("s"), 0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    for block in range(store.num_blocks):
        store.write_block(0, block, block_values(store, block))
    store.set_epoch(0, complete=True)
    store.add_epochs(epoch_columns(100))
    store.rewrite_metadata("label")
    assert list((tmp_path / "elsewhere").iterdir()) == []
    monkeypatch.chdir(tmp_path)
    dataset = open_results("s")
    monkeypatch.chdir("elsewhere")
    expected = block_values(store, 0)["loss"]
    np.testing.assert_array_equal(dataset.loss.values[0, :BLOCK], expected)
    assert dataset.status.values[1].tolist() == [schema.MISSING] * N


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Epochs 0 and 200 of 11 samples in blocks of 4, 4 and 3."""
    return make_store(tmp_path / "curvature.zarr", 0, 200)


class Writes:
    """The keys written to stores on disk, and optionally one that cannot be."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.full_from: str | None = None
        self.full_after: int | None = None

    def check(self, key: str) -> None:
        full = self.full_from is not None and key.startswith(self.full_from)
        if full or (self.full_after is not None and len(self.keys) >= self.full_after):
            raise OSError(errno.ENOSPC, "No space left on device")
        self.keys.append(key)


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> Writes:
    writes = Writes()
    for method in ("set", "set_if_not_exists"):
        original = getattr(LocalStore, method)

        async def checked(self: LocalStore, key: str, *rest: Any, _do: Any = original) -> None:
            try:
                writes.check(key)
            except OSError:
                # Zarr does not wait for a write beside the failing one; by now it is over.
                await asyncio.sleep(0.1)
                raise
            await _do(self, key, *rest)

        monkeypatch.setattr(LocalStore, method, checked)

    set_sync = LocalStore.set_sync

    def checked_sync(self: LocalStore, key: str, *rest: Any) -> None:
        writes.check(key)
        set_sync(self, key, *rest)

    monkeypatch.setattr(LocalStore, "set_sync", checked_sync)
    return writes


# Creating and opening


def test_a_store_opens_with_what_it_was_created_with(tmp_path):
    created = make_store(tmp_path / "new" / "s.zarr", 0, 200, attrs={"title": "for the reader"})
    opened = ResultsStore.open(tmp_path / "new" / "s.zarr", identity=IDENTITY)
    for store in (created, opened):
        assert store.identity == IDENTITY
        assert len(store.fingerprint) == 64
        assert (store.num_samples, store.num_blocks, store.block_size) == (N, 3, BLOCK)
        assert [store.bounds(block) for block in range(3)] == [(0, 4), (4, 8), (8, 11)]
        assert store.rows == {0: 0, 200: 1}
        for columns in (sample_columns(), epoch_columns(0, 200)):
            for name, values in columns.items():
                np.testing.assert_array_equal(store.read(name), values)
        assert not store.done_blocks().any()
        assert store.done_blocks().shape == (2, 3)
    assert created.fingerprint == opened.fingerprint
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["s.zarr"]
    assert xr.open_zarr(tmp_path / "new" / "s.zarr").attrs["title"] == "for the reader"


def test_a_block_is_never_larger_than_the_data_set(tmp_path):
    store = make_store(tmp_path / "s", 0, block_size=5000)
    assert (store.block_size, store.num_blocks, store.bounds(0)) == (N, 1, (0, N))


def test_xarray_sees_dimensions_types_coordinates_and_fill_values(store):
    dataset = xr.open_zarr(store.path)
    assert dict(dataset.sizes) == {"epoch": 2, "sample": N}
    measures = ["curvature", "curvature_sq", "directional_eig", "loss", "grad_norm"]
    assert set(dataset.data_vars) == {*measures, "prediction", "status"}
    for name in dataset.data_vars:
        assert dataset[name].dims == ("epoch", "sample")
    for name in measures:
        assert dataset[name].dtype == np.float32
        assert np.isnan(dataset[name]).all()
    assert dataset.prediction.dtype == np.int16
    assert (dataset.prediction == -1).all()
    assert dataset.status.dtype == np.uint8
    assert (dataset.status == 0).all()
    assert dataset.status.attrs["flag_values"] == [0, 1, 2]
    assert dataset.status.attrs["flag_meanings"] == "missing computed class_not_active"

    assert set(dataset.coords) == {
        "epoch", "task", "num_active_classes", "complete", "compute_seconds", "num_workers",
            "method",
        "checkpoint", "checkpoint_sha256", "checkpoint_size", "checkpoint_mtime_ns",
        "sample", "label", "split", "class_position", "first_epoch_active",
        "sample_key", "sample_name",
    }  # fmt: skip
    assert set(dataset.indexes) == {"epoch", "sample"}
    for columns, dims in ((sample_columns(), ("sample",)), (epoch_columns(0, 200), ("epoch",))):
        for name, values in columns.items():
            assert dataset[name].dims == dims
            np.testing.assert_array_equal(dataset[name].values, values)
    assert dataset.label.dtype == np.int16
    assert dataset.complete.dtype == bool
    assert not dataset.complete.any()
    assert dataset.compute_seconds.dtype == np.float64
    assert (dataset.compute_seconds == 0).all()
    assert dataset.checkpoint_mtime_ns.dtype == np.int64


def test_samples_can_be_selected_by_class_and_epoch(store):
    written = fill_row(store, 1)
    dataset = open_results(store.path)
    chosen = dataset.curvature.sel(epoch=200).where(dataset.label == 3, drop=True)
    np.testing.assert_array_equal(chosen, written["curvature"][LABELS == 3])


def test_every_array_is_compressed_and_carries_a_checksum(store):
    group = zarr.open_group(store.path, mode="r")
    names = {variable.name for variable in schema.all_variables(MEASURES)}
    found = {name for name, node in group.members(max_depth=None) if isinstance(node, zarr.Array)}
    assert found == names
    for name in names:
        metadata = json.loads((store.path / name / "zarr.json").read_text())
        assert [codec["name"] for codec in metadata["codecs"]][-2:] == ["zstd", "crc32c"]
        assert metadata["zarr_format"] == 3


def test_every_per_sample_variable_has_a_chunk_for_each_block(store):
    for name in PER_SAMPLE:
        metadata = json.loads((store.path / name / "zarr.json").read_text())
        assert metadata["chunk_grid"]["configuration"]["chunk_shape"] == [1, BLOCK]
        assert metadata["dimension_names"] == ["epoch", "sample"]


def test_creating_a_store_that_fails_half_way_leaves_nothing(tmp_path, writes):
    make_store(tmp_path / "measured", 0)
    count = len(writes.keys)
    shutil.rmtree(tmp_path / "measured")
    for full_after in (0, 1, count // 3, count // 2, count - 1):
        writes.keys.clear()
        writes.full_after = full_after
        with pytest.raises(StoreWriteError, match="No space left") as refusal:
            make_store(tmp_path / "s.zarr", 0)
        assert str(tmp_path / "s.zarr") in str(refusal.value)
        assert list(tmp_path.iterdir()) == []
    writes.full_after = None
    make_store(tmp_path / "s.zarr", 0)


def test_creating_a_store_that_is_interrupted_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ResultsStore, "_append_rows", interrupted)
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path / "s.zarr", 0)
    assert list(tmp_path.iterdir()) == []


def test_a_store_is_not_created_over_something_else(tmp_path):
    (tmp_path / "directory").mkdir()
    (tmp_path / "directory" / "thesis.txt").write_text("precious")
    (tmp_path / "file").write_text("precious")
    before = files_below(tmp_path)
    for name in ("directory", "file", "file/below"):
        with pytest.raises(StoreError) as refusal:
            make_store(tmp_path / name, 0)
        assert str(tmp_path / name) in str(refusal.value)
    assert files_below(tmp_path) == before
    assert len(list(tmp_path.iterdir())) == 2


def test_another_identity_is_refused_with_exactly_the_fields_that_differ(store):
    other = {
        "estimator": {"method": "finite-difference", "h": 0.01, "n_probes": 10},
        "head": "all",
        "classes": {"order": [0, 1, 2, 4, 3]},
        "seed": 3,
    }
    with pytest.raises(StoreError) as refusal:
        ResultsStore.open(store.path, identity=other)
    lines = str(refusal.value).splitlines()
    assert str(store.path) in lines[0]
    assert [line.strip() for line in lines if ": the store has" in line] == [
        "classes.initial: the store has 2, this run has nothing",
        "classes.order: the store has [0, 1, 2, 3, 4], this run has [0, 1, 2, 4, 3]",
        "estimator.h: the store has 0.001, this run has 0.01",
        "seed: the store has nothing, this run has 3",
    ]
    assert "n_probes" not in str(refusal.value)
    assert "--store" in lines[-1]


def test_the_order_of_an_identitys_fields_does_not_matter(store):
    reordered = {key: IDENTITY[key] for key in reversed(IDENTITY)}
    ResultsStore.open(store.path, identity=reordered)


def test_a_store_of_a_newer_format_is_refused_and_named(store):
    path = store.path / "zarr.json"
    content = json.loads(path.read_text())
    content["attributes"]["daskcurv_format"] = schema.FORMAT_VERSION + 1
    path.write_text(json.dumps(content))
    for open_it in (ResultsStore.open, open_results):
        with pytest.raises(StoreError, match=f"format {schema.FORMAT_VERSION + 1}") as refusal:
            open_it(store.path)
        assert str(store.path) in str(refusal.value)


def not_a_store(path: Path, kind: str) -> None:
    if kind == "file":
        path.write_text("precious")
    elif kind == "directory":
        path.mkdir()
        (path / "thesis.txt").write_text("precious")
    elif kind == "empty directory":
        path.mkdir()
    elif kind == "zarr group":
        zarr.create_group(path).create_array("a", shape=(3,), dtype="i4")
    elif kind == "zarr array":
        zarr.create_array(path, shape=(3,), dtype="i4")
    elif kind == "xarray's store":
        xr.Dataset({"a": ("x", [1, 2])}).to_zarr(path, zarr_format=3, consolidated=False)
    elif kind == "version 2 group":
        zarr.create_group(path, zarr_format=2)
    elif kind in ("truncated metadata", "empty metadata", "no identity"):
        make_store(path, 0)
        content = (path / "zarr.json").read_text()
        if kind == "no identity":
            group = json.loads(content)
            del group["attributes"]["identity"]
            content = json.dumps(group)
        else:
            content = content[:300] if kind == "truncated metadata" else ""
        (path / "zarr.json").write_text(content)


@pytest.mark.parametrize(
    "kind",
    [
        "missing",
        "file",
        "directory",
        "empty directory",
        "zarr group",
        "zarr array",
        "xarray's store",
        "version 2 group",
        "truncated metadata",
        "empty metadata",
        "no identity",
    ],
)
def test_anything_that_is_not_a_results_store_is_refused_named_and_left_alone(tmp_path, kind):
    path = tmp_path / "s"
    not_a_store(path, kind)
    before = files_below(tmp_path)
    for open_it in (ResultsStore.open, open_results):
        with pytest.raises(StoreError) as refusal:
            open_it(path)
        assert str(path) in str(refusal.value)
    assert files_below(tmp_path) == before
    assert path.exists() == (kind != "missing")


# Blocks


def test_what_is_written_is_read_back_exactly(store):
    written = {row: fill_row(store, row) for row in (1, 0)}
    for reader in (store, ResultsStore.open(store.path)):
        for row, values in written.items():
            for name in PER_SAMPLE:
                np.testing.assert_array_equal(reader.read(name, row), values[name])
                assert reader.read(name, row).dtype == values[name].dtype
        assert reader.done_blocks().all()
    dataset = xr.open_zarr(store.path)
    for name in PER_SAMPLE:
        np.testing.assert_array_equal(dataset[name].sel(epoch=200), written[1][name])


def test_one_block_touches_one_chunk_of_each_variable_and_status_comes_last(store, writes):
    store.write_block(1, 2, block_values(store, 2))
    chunks = [f"{name}/c/1/2" for name in PER_SAMPLE]
    assert sorted(writes.keys) == sorted([*chunks, "integrity/block_digest/c/1/2/0"])
    assert writes.keys[-1] == "status/c/1/2"
    assert store.done_blocks().tolist() == [[False, False, False], [False, False, True]]
    assert store.is_done(1, 2)
    assert not store.is_done(1, 1)


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_full_disk_is_a_store_write_error_and_the_block_is_not_done(store, writes, name):
    writes.full_from = f"{name}/c/"
    with pytest.raises(StoreWriteError, match="No space left on device") as refusal:
        store.write_block(0, 1, block_values(store, 1))
    assert str(store.path) in str(refusal.value)
    assert not chunk(store, "status", 0, 1).exists()
    for reader in (store, ResultsStore.open(store.path)):
        assert not reader.is_done(0, 1)
        assert not reader.done_blocks().any()

    writes.full_from = None
    store.write_block(0, 1, block_values(store, 1))
    assert store.is_done(0, 1)
    np.testing.assert_array_equal(store.read(name, 0)[4:8], block_values(store, 1)[name])


@pytest.mark.parametrize("reopened", [False, True])
def test_a_block_of_inactive_samples_has_all_its_chunks(store, reopened):
    writer = ResultsStore.open(store.path) if reopened else store
    writer.write_block(0, 0, inactive_values(4))
    for name in PER_SAMPLE:
        assert chunk(store, name, 0, 0).exists()
    assert store.is_done(0, 0)
    assert store.read("status", 0).tolist() == [2, 2, 2, 2] + [0] * 7


def test_a_block_can_be_written_again(store):
    store.write_block(0, 0, block_values(store, 0, seed=1))
    store.write_block(0, 0, block_values(store, 0, seed=2))
    expected = block_values(store, 0, seed=2)["curvature"]
    np.testing.assert_array_equal(store.read("curvature", 0)[:4], expected)


def test_files_left_by_an_interrupted_write_do_not_count_as_blocks(store):
    store.write_block(0, 1, block_values(store, 1))
    strays = ["0.abc123.partial", "2.0123.partial", ".3.swp", "7", "x"]
    for stray in strays:
        chunk(store, "status", 0, 0).with_name(stray).write_bytes(b"")
    chunk(store, "status", 1, 0).parent.mkdir(parents=True)
    assert store.done_blocks().tolist() == [[False, True, False], [False, False, False]]


def test_an_empty_status_left_by_a_power_cut_does_not_count_as_a_block(store):
    # A file that was renamed into place but not synced can come back with its name and no data.
    store.write_block(0, 1, block_values(store, 1))
    chunk(store, "status", 0, 1).write_bytes(b"")
    assert not store.done_blocks().any()
    assert not store.is_done(0, 1)


@pytest.mark.parametrize(("row", "block"), [(0, 3), (0, -1), (2, 0), (-1, 0)])
def test_a_block_that_the_store_does_not_have_is_refused(store, row, block):
    before = files_below(store.path)
    with pytest.raises(StoreError) as refusal:
        store.write_block(row, block, inactive_values(4))
    assert str(store.path) in str(refusal.value)
    assert f"block {block} in row {row}" in str(refusal.value)
    assert files_below(store.path) == before


@pytest.mark.parametrize("name", ["curvature", "prediction", "status"])
@pytest.mark.parametrize("wrong", [np.zeros(3), np.zeros(5), np.zeros((4, 1)), np.float32(0)])
def test_values_that_do_not_fill_the_block_are_refused(store, name, wrong):
    before = files_below(store.path)
    with pytest.raises(StoreError, match=name):
        store.write_block(0, 1, {**inactive_values(4), name: wrong})
    assert files_below(store.path) == before


def test_the_last_block_takes_only_the_samples_that_are_left(store):
    with pytest.raises(StoreError):
        store.write_block(0, 2, inactive_values(4))
    store.write_block(0, 2, inactive_values(3))
    assert store.is_done(0, 2)


@pytest.mark.parametrize("name", ["curvature", "prediction", "status"])
def test_a_flipped_bit_is_refused_on_reading(store, name):
    store.write_block(0, 0, block_values(store, 0))
    path = chunk(store, name, 0, 0)
    intact = path.read_bytes()
    for position in range(len(intact)):
        damaged = bytearray(intact)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with pytest.raises((StoreError, ValueError, RuntimeError)):
            store.read(name, 0)
    path.write_bytes(intact)
    assert store.read(name, 0)[0] == block_values(store, 0)[name][0]


def test_a_damaged_chunk_is_a_store_error_naming_where_it_is(store):
    store.write_block(0, 0, block_values(store, 0))
    path = chunk(store, "curvature", 0, 0)
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    with pytest.raises(StoreError) as refusal:
        store.read("curvature", 0)
    assert str(store.path) in str(refusal.value)
    assert "curvature" in str(refusal.value)


# Epochs


def test_added_epochs_are_appended_and_keep_what_is_there(store):
    written = fill_row(store, 0)
    store.add_epochs(epoch_columns(100, 50))
    store.add_epochs(epoch_columns(1000))
    for reader in (store, ResultsStore.open(store.path)):
        assert reader.rows == {0: 0, 200: 1, 100: 2, 50: 3, 1000: 4}
        for name, values in epoch_columns(0, 200, 100, 50, 1000).items():
            np.testing.assert_array_equal(reader.read(name), values)
        for name in PER_SAMPLE:
            np.testing.assert_array_equal(reader.read(name, 0), written[name])
        assert reader.done_blocks().sum(axis=1).tolist() == [3, 0, 0, 0, 0]
    store.write_block(4, 0, block_values(store, 0))
    assert ResultsStore.open(store.path).is_done(4, 0)


def test_a_store_takes_more_epochs_than_fit_into_one_chunk(tmp_path):
    epochs = range(schema.EPOCH_CHUNK + 3)
    store = make_store(tmp_path / "s", *epochs)
    store.add_epochs(epoch_columns(10_000))
    assert list(store.rows) == [*epochs, 10_000]
    assert store.read("checkpoint")[-1] == "index-0_epoch-10000.pt"


@pytest.mark.parametrize("repeated", [(0,), (300, 200), (300, 300)])
def test_an_epoch_is_never_added_twice(store, repeated):
    before = files_below(store.path)
    with pytest.raises(StoreError, match=str(repeated[-1])) as refusal:
        store.add_epochs(epoch_columns(*repeated))
    assert str(store.path) in str(refusal.value)
    assert files_below(store.path) == before
    assert ResultsStore.open(store.path).rows == {0: 0, 200: 1}


class Crash(BaseException):
    """The process is gone."""


def assert_as_before(store: ResultsStore, written: dict[str, np.ndarray]) -> None:
    dataset = xr.open_zarr(store.path)
    assert dataset.epoch.values.tolist() == [0, 200]
    assert dict(dataset.sizes) == {"epoch": 2, "sample": N}
    for name in PER_SAMPLE:
        np.testing.assert_array_equal(dataset[name].sel(epoch=0), written[name])
    for name, values in epoch_columns(0, 200).items():
        np.testing.assert_array_equal(dataset[name].values, values)
    assert open_results(store.path).epoch.values.tolist() == [0, 200]
    assert ResultsStore.open(store.path).rows == {0: 0, 200: 1}


@pytest.mark.parametrize("reopened", [True, False])
def test_a_crash_before_the_deciding_file_leaves_the_store_as_it_was(store, monkeypatch, reopened):
    def crash(path: Path) -> None:
        raise Crash

    written = fill_row(store, 0)
    with monkeypatch.context() as patch:
        patch.setattr("daskcurv.storage.working.consolidate", crash)
        with pytest.raises(Crash):
            store.add_epochs(epoch_columns(400, 600, 800))
    assert_as_before(store, written)

    again = ResultsStore.open(store.path) if reopened else store
    again.add_epochs(epoch_columns(300))
    again.add_epochs(epoch_columns(400))
    for reader in (again, ResultsStore.open(store.path)):
        assert reader.rows == {0: 0, 200: 1, 300: 2, 400: 3}
        for name, values in epoch_columns(0, 200, 300, 400).items():
            np.testing.assert_array_equal(reader.read(name), values)
        assert reader.done_blocks().sum(axis=1).tolist() == [3, 0, 0, 0]
    dataset = xr.open_zarr(store.path)
    assert dataset.epoch.values.tolist() == [0, 200, 300, 400]
    assert dataset.curvature.shape == (4, N)


def test_a_crash_anywhere_while_adding_epochs_leaves_the_store_as_it_was(store, writes):
    written = fill_row(store, 0)
    writes.keys.clear()
    copy = store.path.with_name("copy")
    shutil.copytree(store.path, copy)
    ResultsStore.open(copy).add_epochs(epoch_columns(400))
    count = len(writes.keys)
    for full_after in range(0, count, 5):
        writes.keys.clear()
        writes.full_after = full_after
        with pytest.raises(StoreWriteError):
            ResultsStore.open(store.path).add_epochs(epoch_columns(400, 600))
        assert_as_before(store, written)
    writes.full_after = None
    ResultsStore.open(store.path).add_epochs(epoch_columns(400))
    assert xr.open_zarr(store.path).epoch.values.tolist() == [0, 200, 400]


def test_progress_of_an_epoch_is_recorded(store):
    store.set_epoch(1, complete=True, compute_seconds=12.5, num_workers=3)
    opened = ResultsStore.open(store.path)
    assert opened.read("complete").tolist() == [False, True]
    assert opened.read("compute_seconds").tolist() == [0, 12.5]
    assert opened.read("num_workers").tolist() == [0, 3]


def test_progress_that_cannot_be_written_is_a_store_write_error(store, writes):
    writes.full_from = "complete"
    with pytest.raises(StoreWriteError) as refusal:
        store.set_epoch(0, complete=True)
    assert str(store.path) in str(refusal.value)


# Querying


def test_results_are_sorted_by_epoch_in_whatever_order_they_were_added(store):
    store.add_epochs(epoch_columns(100))
    written = {epoch: fill_row(store, row) for epoch, row in store.rows.items()}
    for row in range(3):
        store.set_epoch(row, complete=True)
    dataset = open_results(store.path, incomplete="raise")
    assert dataset.epoch.values.tolist() == [0, 100, 200]
    assert dataset.checkpoint.values.tolist() == [
        f"index-0_epoch-{epoch}.pt" for epoch in (0, 100, 200)
    ]
    for epoch, values in written.items():
        for name in PER_SAMPLE:
            np.testing.assert_array_equal(dataset[name].sel(epoch=epoch), values[name])


def test_only_what_is_selected_is_read(store, monkeypatch):
    written = {epoch: fill_row(store, row) for epoch, row in store.rows.items()}
    asked = []
    read = Stored.read

    def reading(self: Stored, key: Any) -> np.ndarray:
        asked.append(key)
        return read(self, key)

    monkeypatch.setattr(Stored, "read", reading)
    dataset = open_results(str(store.path), incomplete="include")
    chosen = dataset.loss.sel(epoch=200).isel(sample=slice(2, 5))
    assert asked == []
    np.testing.assert_array_equal(chosen, written[200]["loss"][2:5])
    (key,) = asked
    assert key[0] == 1
    assert list(range(N))[key[1]] == [2, 3, 4]


def test_selections_of_every_kind_agree_with_numpy(store):
    store.add_epochs(epoch_columns(100))
    rows = {epoch: fill_row(store, row) for epoch, row in store.rows.items()}
    expected = np.stack([rows[epoch]["curvature"] for epoch in (0, 100, 200)])
    curvature = open_results(store.path).curvature
    where = np.array([7, 2, 2])
    for key in (
        (0, 3), (slice(None), 3), (1, slice(None)), (slice(None, None, -1), slice(1, 9, 3)),
        (slice(None), where), ([2, 0], slice(None)), (-1, -1), (slice(0, 0), slice(None)),
    ):  # fmt: skip
        np.testing.assert_array_equal(curvature[key], expected[key])
    np.testing.assert_array_equal(
        curvature[[0, 2], where], expected[np.ix_(np.array([0, 2]), where)]
    )
    points = xr.DataArray([0, 2, 1], dims="point"), xr.DataArray(where, dims="point")
    np.testing.assert_array_equal(curvature[points], expected[[0, 2, 1], where])


def test_results_come_in_pieces_for_dask_on_request(store):
    written = fill_row(store, 0)
    for incomplete in ("mask", "include"):
        dataset = open_results(store.path, incomplete=incomplete, chunks={"sample": 4})
        for name in PER_SAMPLE:
            assert isinstance(dataset[name].data, dask.array.Array)
            assert dataset[name].data.numblocks == (1, 3)
        np.testing.assert_array_equal(dataset.loss.sel(epoch=0), written["loss"])


def test_classes_have_names_where_they_are_known(tmp_path):
    names = ["a", "bee", "c", "dee", "e"]
    store = make_store(tmp_path / "s", 0, attrs={"class_names": names})
    assert open_results(store.path).class_name.values.tolist() == [names[i] for i in LABELS]
    assert "class_name" not in open_results(make_store(tmp_path / "t", 0).path)


def test_every_variable_says_what_it_is(store):
    for name, variable in open_results(store.path).variables.items():
        assert variable.attrs.get("long_name"), name


def interrupt_block(store: ResultsStore, writes: Writes, row: int, block: int) -> None:
    """Write a block up to, and without, its status."""
    writes.full_from = "status"
    with pytest.raises(StoreWriteError):
        store.write_block(row, block, block_values(store, block))
    writes.full_from = None


def test_values_of_an_interrupted_block_are_masked(store, writes):
    store.write_block(0, 0, block_values(store, 0))
    interrupt_block(store, writes, 0, 1)
    dataset = open_results(store.path)
    shown = block_values(store, 0)
    for name, fill in [(variable.name, variable.fill) for variable in MEASURES]:
        row = dataset[name].sel(epoch=0).values
        np.testing.assert_array_equal(row[:4], shown[name])
        np.testing.assert_array_equal(row[4:], np.full(7, fill))
        assert row.dtype == shown[name].dtype
        assert dataset[name].attrs == xr.open_zarr(store.path)[name].attrs
    assert dataset.status.sel(epoch=0).values.tolist() == [1, 1, 1, 2] + [0] * 7


def test_values_of_an_interrupted_block_are_shown_on_request(store, writes):
    interrupt_block(store, writes, 0, 1)
    dataset = open_results(store.path, incomplete="include")
    row = dataset.curvature.sel(epoch=0).values
    np.testing.assert_array_equal(row[4:8], block_values(store, 1)["curvature"])


def test_unfinished_epochs_are_refused_and_named_on_request(store):
    store.add_epochs(epoch_columns(100))
    fill_row(store, 0)
    store.set_epoch(0, complete=True)
    with pytest.raises(StoreError, match=r"\[100, 200\]") as refusal:
        open_results(store.path, incomplete="raise")
    assert str(store.path) in str(refusal.value)


def test_the_standard_error_is_that_of_the_mean_over_probes(tmp_path):
    store = make_store(tmp_path / "s.zarr", 0)
    norms = np.random.default_rng(0).uniform(0.01, 0.02, (10, N))
    for block in range(store.num_blocks):
        part = slice(*store.bounds(block))
        values = block_values(store, block)
        values["curvature"] = norms.mean(axis=0)[part]
        values["curvature_sq"] = (norms**2).mean(axis=0)[part]
        store.write_block(0, block, values)
    found = open_results(store.path, incomplete="include").curvature_stderr.sel(epoch=0)
    expected = norms.std(axis=0, ddof=1) / np.sqrt(10)
    np.testing.assert_allclose(found, expected, rtol=1e-4)
    assert found.dtype == np.float32
    assert found.attrs["units"] == store_units("curvature")


def test_a_pair_of_probes_of_the_zeroth_order_method_is_one_draw(tmp_path):
    estimator = {"method": "zeroth-order", "h": 0.001, "n_probes": 10}
    store = make_store(tmp_path / "s.zarr", 0, identity={**IDENTITY, "estimator": estimator})
    fill_row(store, 0)
    values = {
        "curvature": np.full(N, 3.0, np.float32),
        "curvature_sq": np.full(N, 25.0, np.float32),
    }
    for block in range(store.num_blocks):
        part = slice(*store.bounds(block))
        block_of = {**block_values(store, block), **{n: v[part] for n, v in values.items()}}
        store.write_block(0, block, block_of)
    found = open_results(store.path).curvature_stderr
    # 5 draws with variance 25 - 9 = 16: the square root of 16 / (5 - 1).
    assert (found == 2).all()
    assert "from 5 draws" in found.attrs["long_name"]


def store_units(name: str) -> str:
    return str(next(v.units for v in MEASURES if v.name == name))


def test_an_unknown_way_to_treat_unfinished_epochs_is_refused(store):
    with pytest.raises(ConfigError, match="'drop'"):
        open_results(store.path, incomplete="drop")  # type: ignore[arg-type]


# Damaged columns


@pytest.mark.parametrize("variable", schema.COLUMNS, ids=lambda variable: variable.name)
@pytest.mark.parametrize("damage", ["lost", "garbled"])
def test_a_damaged_column_is_noticed_and_written_anew(store, variable, damage):
    fill_row(store, 0)
    store.set_epoch(0, complete=True)
    assert damaged_columns(store) == []
    before = store.read(variable.name)
    (path,) = column_files(store, variable)
    if damage == "lost":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-3])
    store = ResultsStore.open(store.path)
    assert damaged_columns(store) == [variable]
    assert store.rows == {0: 0, 200: 1}
    restore_columns(store, sample_columns(), epoch_columns(200, 0))
    assert damaged_columns(store) == []
    np.testing.assert_array_equal(store.read(variable.name), before)


def test_no_column_passes_for_another(tmp_path):
    store = make_store(tmp_path / "s", 0, 200)
    files = [column_files(store, variable)[0] for variable in schema.COLUMNS]
    contents = [path.read_bytes() for path in files]
    for variable, path, own in zip(schema.COLUMNS, files, contents, strict=True):
        for other, content in zip(schema.COLUMNS, contents, strict=True):
            if other == variable:
                continue
            path.write_bytes(content)
            with pytest.raises(StoreError, match=f"{variable.name} of"):
                store.read(variable.name)
        path.write_bytes(own)
    assert damaged_columns(store) == []


def test_numbers_in_the_place_of_texts_are_noticed_before_memory_is_asked_for(tmp_path):
    store = make_store(tmp_path / "s", 0, 200)
    texts, times = (
        column_files(store, schema.COLUMN[name])[0]
        for name in ("checkpoint", "checkpoint_mtime_ns")
    )
    # What a process that was killed while it wrote has left is no part of the column.
    for number in range(6):
        texts.with_name(f"0.a{number}.partial").write_bytes(times.read_bytes()[:number])
    assert store.read("checkpoint").tolist() == epoch_columns(0, 200)["checkpoint"]
    texts.write_bytes(times.read_bytes())
    with pytest.raises(StoreError, match=rf"{texts} holds \d+ texts; expected \d+"):
        store.read("checkpoint")
