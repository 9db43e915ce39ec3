"""A store that lost a file says so, and makes up no numbers for it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import numpy as np
import pytest

from daskcurv.cli import main
from daskcurv.errors import StoreError
from daskcurv.measures import MEASURES
from daskcurv.runs.status import describe, read_status
from daskcurv.storage import ResultsStore, schema
from daskcurv.storage.compact import compact
from daskcurv.storage.integrity.columns import discard_column
from daskcurv.storage.integrity.lost import lost_files
from daskcurv.storage.read import open_results
from tests.support.stores import PER_SAMPLE, chunk, fill_row, finish, make_store


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Two finished epochs of 11 samples, in blocks of 4, 4 and 3."""
    return finish(make_store(tmp_path / "curvature.zarr", 0, 200))


@pytest.fixture
def compacted(store: ResultsStore, monkeypatch: pytest.MonkeyPatch) -> ResultsStore:
    """A compact store in which a sample is read from the layout by sample."""
    monkeypatch.setattr("daskcurv.storage.compact.SAMPLES_PER_CHUNK", 2)
    out = store.path.with_name("compact.zarr")
    compact(store, out)
    return ResultsStore.open(out)


def shard(store: ResultsStore, name: str) -> Path:
    (path,) = (path for path in (store.path / name / "c").rglob("*") if path.is_file())
    return path


@pytest.mark.parametrize("name", PER_SAMPLE)
@pytest.mark.parametrize("chunks", [None, {}], ids=["numpy", "dask"])
def test_a_block_that_lost_a_file_is_shown_as_missing_in_every_variable(
    store, caplog, name, chunks
):
    before = open_results(store.path).load()
    chunk(store, name, 1, 1).unlink()
    found = open_results(store.path, chunks=chunks).load()
    lost = np.zeros((2, 11), dtype=bool)
    lost[1, 4:8] = True
    assert (found.status.values[lost] == schema.MISSING).all()
    assert (found.prediction.values[lost] == -1).all()
    fractions = [measure.name for measure in MEASURES if measure.dtype == "float32"]
    for variable in (*fractions, "curvature_stderr"):
        assert np.isnan(found[variable].values[lost]).all()
    for key, values in found.data_vars.items():
        np.testing.assert_array_equal(values.values[~lost], before[key].values[~lost])
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert f"epoch 200 block 1: {name}" in warnings[0]


@pytest.mark.parametrize("name", PER_SAMPLE)
def test_a_lost_file_stops_who_asked_to_be_stopped_where_it_is_needed(store, name):
    chunk(store, name, 1, 1).unlink()
    results = open_results(store.path, incomplete="raise")
    for elsewhere in (results.sel(epoch=0), results.sel(epoch=200, sample=[0, 3, 8, 10])):
        assert (elsewhere.load().status != schema.MISSING).all()
    for variable in ("loss", "status", name):
        with pytest.raises(StoreError, match=f"epoch 200 block 1: {name}"):
            results[variable].sel(sample=5).load()


def test_what_is_there_is_shown_on_request(store):
    chunk(store, "prediction", 1, 1).unlink()
    shown = open_results(store.path, incomplete="include").sel(epoch=200).load()
    assert (shown.prediction[4:8] == -1).all()
    assert (shown.status != schema.MISSING).all()


@pytest.mark.parametrize("layout", ["", "by_sample/"])
def test_a_compact_store_that_lost_a_file_is_masked_or_refused(store, compacted, caplog, layout):
    shard(compacted, f"{layout}prediction").unlink()
    key = {"epoch": 200} if not layout else {"sample": 3}
    with pytest.raises(StoreError, match=f"epochs 0 to 200, .*: {layout}prediction"):
        open_results(compacted.path, incomplete="raise").loss.sel(key).load()
    found = open_results(compacted.path).sel(key).load()
    assert (found.status == schema.MISSING).all()
    assert found.loss.isnull().all()
    assert f"{layout}prediction" in caplog.text


def test_a_block_that_is_not_done_yet_is_no_loss(tmp_path, caplog):
    store = make_store(tmp_path / "s.zarr", 0, 200)
    fill_row(store, 0)
    chunk(store, "status", 0, 1).unlink()
    assert lost_files(store) == []
    found = open_results(store.path).sel(epoch=0).load()
    assert (found.status.values == schema.MISSING).tolist() == [False] * 4 + [True] * 4 + [
        False
    ] * 3
    assert not caplog.records


def test_a_block_of_an_unfinished_epoch_is_on_record_by_its_status(tmp_path):
    store = make_store(tmp_path / "s.zarr", 0)
    fill_row(store, 0)
    chunk(store, "loss", 0, 2).unlink()
    assert [str(one) for one in lost_files(store)] == ["epoch 0 block 2: loss"]
    assert store.done_blocks().tolist() == [[True, True, False]]
    assert not store.is_done(0, 2)


COMMANDS = {
    "analyze": ["out"],
    "report": ["-o", "r.html"],
    "export": ["t.parquet"],
    "export_npy": ["tree"],
    "compact": ["k.zarr"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("name", ["status", "prediction", "curvature"])
def test_every_command_that_answers_names_the_block_and_stops(
    store, tmp_path, monkeypatch, capfd, command, name
):
    monkeypatch.chdir(tmp_path)
    chunk(store, name, 1, 1).unlink()
    before = {path.name for path in tmp_path.iterdir()}
    assert main([command, "curvature.zarr", *COMMANDS[command]]) == 2
    said = capfd.readouterr().err
    assert f"epoch 200 block 1: {name}" in said
    assert "verify curvature.zarr --repair" in said
    assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "compact"])
def test_every_command_that_answers_stops_at_a_compact_store_that_lost_a_file(
    compacted, tmp_path, monkeypatch, capfd, command
):
    monkeypatch.chdir(tmp_path)
    shard(compacted, "curvature").unlink()
    assert main([command, "compact.zarr", *COMMANDS[command]]) == 2
    said = capfd.readouterr().err
    assert "epochs 0 to 200, samples 0 to 10: curvature" in said
    assert "Make it again with daskcurv compact" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_is_cut_is_named_in_one_message(store, tmp_path, monkeypatch, capfd, command):
    monkeypatch.chdir(tmp_path)
    path = chunk(store, "curvature", 1, 1)
    path.write_bytes(path.read_bytes()[:-5])
    assert main([command, "curvature.zarr", *COMMANDS[command]]) == 2
    said = capfd.readouterr().err
    assert "epoch 200 block 1" in said
    assert "curvature" in said
    assert "Traceback" not in said


def test_a_cut_shard_of_any_length_is_one_message(compacted):
    for name in ("loss", "by_sample/loss"):
        path = shard(compacted, name)
        whole = path.read_bytes()
        for length in range(0, len(whole), max(1, len(whole) // 40)):
            path.write_bytes(whole[:length])
            with pytest.raises(StoreError, match=f"epochs 0 to 200, .*: {name}"):
                compacted.read(name)
        path.write_bytes(whole)


def test_analyses_go_on_without_the_block_if_told_to(store, tmp_path, capsys):
    chunk(store, "status", 1, 1).unlink()
    assert main(["analyze", str(store.path), str(tmp_path / "out"), "--leave_out_missing"]) == 0
    assert "epoch 200 block 1: status" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["label", "complete", "epoch"])
@pytest.mark.parametrize("damage", ["lost", "cut"])
def test_a_damaged_column_stops_every_reader(store, tmp_path, capfd, name, damage):
    path = store.path / name / "c" / "0"
    if damage == "lost":
        discard_column(store, schema.COLUMN[name])
    else:
        path.write_bytes(path.read_bytes()[:-3])
    for incomplete in ("mask", "raise"):
        with pytest.raises(StoreError, match=name):
            open_results(store.path, incomplete=incomplete)
    assert main(["export", str(store.path), str(tmp_path / "t.parquet")]) == 2
    said = capfd.readouterr().err
    assert name in said
    assert "Traceback" not in said


def test_status_counts_what_is_whole_and_names_what_is_gone(store, compacted):
    chunk(store, "loss", 1, 1).unlink()
    status = read_status(store.path)
    assert status["store"]["blocks"] == {"done": 5, "of": 6}
    assert status["store"]["lost"] == ["epoch 200 block 1: loss"]
    assert "epoch 200 block 1: loss" in describe(status)
    shard(compacted, "by_sample/loss").unlink()
    assert "by_sample/loss" in describe(read_status(compacted.path))


def test_verify_and_repair_speak_of_the_lost_file(store, capfd):
    chunk(store, "grad_norm", 1, 1).unlink()
    assert main(["verify", str(store.path)]) == 1
    assert "epoch 200 block 1: grad_norm is lost" in capfd.readouterr().err
    assert main(["verify", str(store.path), "--repair"]) == 0
    assert lost_files(ResultsStore.open(store.path)) == []
    assert store.done_blocks().tolist() == [[True] * 3, [True, False, True]]


def test_a_store_that_is_read_after_a_change_of_directory_is_the_same(store, tmp_path, monkeypatch):
    expected = open_results(store.path).load()
    monkeypatch.chdir(tmp_path)
    results = open_results("curvature.zarr")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert results.load().equals(expected)
    shutil.rmtree(tmp_path / "elsewhere", ignore_errors=True)
