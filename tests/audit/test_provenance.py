"""Whether results are what the checkpoints give: files held against the record, samples again."""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from daskcurv.audit.provenance import checkpoint_damage, disagreement, recompute
from daskcurv.cli import main
from daskcurv.errors import StoreError
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.experiment.search import discover
from daskcurv.storage import ResultsStore
from tests.support.builders import make_model, write_checkpoints, write_cifar
from tests.support.project import Project
from tests.support.stores import make_store


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("launched"))
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    run = project.launch("--no_export", "--n_probes", "4")
    assert run.returncode == 0, run.stdout
    return project


@pytest.fixture
def verify(launched: Project, capfd: pytest.CaptureFixture[str]):
    """Run ``daskcurv verify``; returns its exit code and what it said."""

    def run(*options: str, models: Path = launched.models, data: Path = launched.data):
        words = ["verify", str(launched.store), "--model_dir", str(models), *options]
        code = main([*words, *(["--data_path", str(data)] if "--recompute" in options else [])])
        return code, capfd.readouterr().err

    return run


def test_checkpoints_that_are_as_recorded_agree(verify):
    code, said = verify()
    assert code == 0
    assert "every checkpoint matches the record" in said


def test_a_file_that_was_copied_is_read_and_agrees(launched, verify, tmp_path):
    for path in launched.models.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
        os.utime(tmp_path / path.name, ns=(0, 0))
    assert verify(models=tmp_path)[0] == 0


def copied(launched: Project, directory: Path) -> dict[int, Path]:
    """Copies of all checkpoints, size and time included."""
    return {
        epoch: Path(shutil.copy2(path, directory))
        for epoch, path in discover(launched.models, 0).items()
    }


def test_a_file_exchanged_for_another_of_its_size_and_time_is_noticed(launched, verify, tmp_path):
    paths = copied(launched, tmp_path)
    before = paths[1].stat()
    paths[1].write_bytes(paths[4].read_bytes())
    os.utime(paths[1], ns=(before.st_atime_ns, before.st_mtime_ns))
    after = paths[1].stat()
    assert (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
    code, said = verify(models=tmp_path)
    assert code == 1
    assert "index-0_epoch-1.pt: not the file that the results of epoch 1" in said
    assert "1 file damaged or not matching the record" in said


def test_results_of_a_file_that_was_damaged_already_are_named(launched, tmp_path):
    paths = copied(launched, tmp_path)
    content = bytearray(paths[2].read_bytes())
    content[len(content) // 2] ^= 1
    paths[2].write_bytes(content)
    store = ResultsStore.open(shutil.copytree(launched.store, tmp_path / "s.zarr"))
    store.set_epoch(store.rows[2], checkpoint_sha256=hashlib.sha256(content).hexdigest())
    damage, absent = checkpoint_damage(store, paths)
    assert absent == []
    (one,) = damage
    assert one.where == str(paths[2])
    assert "is damaged" in one.what
    assert one.what.endswith("so are the results of epoch 2")


def test_another_file_and_an_absent_one_are_told_apart(verify, tmp_path):
    write_checkpoints(tmp_path, [0, 1, 2])
    torch.save(make_model(seed=5).state_dict(), tmp_path / "index-0_epoch-1.pt")
    code, said = verify(models=tmp_path)
    assert code == 1
    assert "index-0_epoch-1.pt: not the file that the results of epoch 1" in said
    assert "without a file: 1 epoch, the first 4" in said


def test_results_are_computed_again_and_agree(launched, verify):
    code, said = verify("--recompute", "12")
    assert code == 0, said
    assert "12 results computed again in float64" in said
    store, checkpoints = ResultsStore.open(launched.store), discover(launched.models, 0)
    dataset = read_cifar(launched.data)
    results = recompute(store, checkpoints, dataset, 12)
    assert [(r.epoch, r.sample) for r in results] == sorted({(r.epoch, r.sample) for r in results})
    first_active = store.read("first_epoch_active")
    assert all(first_active[result.sample] <= result.epoch for result in results)
    assert results == recompute(store, checkpoints, dataset, 12)


def test_all_results_can_be_computed_again(launched):
    store = ResultsStore.open(launched.store)
    active = sum(int((store.read("first_epoch_active") <= epoch).sum()) for epoch in store.epochs)
    checkpoints, dataset = discover(launched.models, 0), read_cifar(launched.data)
    results = recompute(store, checkpoints, dataset, active + 1)
    assert len(results) == active
    assert disagreement(results) == ""


@pytest.mark.parametrize(
    ("name", "change"), [("curvature", 2.0), ("loss", 1.01), ("curvature", np.nan)]
)
def test_results_that_are_not_what_the_checkpoints_give_are_noticed(
    launched, monkeypatch, name, change
):
    store = ResultsStore.open(launched.store)
    read = ResultsStore.read

    def changed(self: ResultsStore, variable: str, *where):
        values = read(self, variable, *where)
        return values * np.float32(change) if variable == name else values

    monkeypatch.setattr(ResultsStore, "read", changed)
    checkpoints, dataset = discover(launched.models, 0), read_cifar(launched.data)
    assert "are not what the checkpoints give" in disagreement(
        recompute(store, checkpoints, dataset, 5)
    )


def test_a_small_difference_of_all_is_noticed(launched, monkeypatch):
    store = ResultsStore.open(launched.store)
    read = ResultsStore.read

    def changed(self: ResultsStore, variable: str, *where):
        values = read(self, variable, *where)
        return values * np.float32(1.05) if variable == "curvature" else values

    monkeypatch.setattr(ResultsStore, "read", changed)
    checkpoints, dataset = discover(launched.models, 0), read_cifar(launched.data)
    assert "median difference" in disagreement(recompute(store, checkpoints, dataset, 5))


def test_another_data_set_is_refused(verify, tmp_path):
    write_cifar(tmp_path / "other", seed=7)
    code, said = verify("--recompute", "2", data=tmp_path / "other")
    assert code == 2
    assert "--data_path is not the data set that results store" in said


def test_nothing_to_compute_from_is_refused(launched, verify, tmp_path):
    write_checkpoints(tmp_path, [7])
    code, said = verify("--recompute", "2", models=tmp_path)
    assert code == 2
    assert "no finished epoch with a checkpoint" in said


def test_options_that_do_not_fit_are_refused(launched, capfd):
    assert main(["verify", str(launched.store), "--recompute", "2"]) == 2
    assert "--recompute needs the checkpoints" in capfd.readouterr().err
    words = ["verify", str(launched.store), "--model_dir", str(launched.models)]
    assert main([*words, "--recompute", "0"]) == 2
    assert "recompute is 0" in capfd.readouterr().err


def test_a_store_without_checkpoints_says_so(tmp_path):
    from daskcurv.audit.provenance import experiment_index

    with pytest.raises(StoreError, match="was not computed from checkpoints"):
        experiment_index(make_store(tmp_path / "s", 0))


def test_absent_results_need_no_checkpoint(tmp_path):
    assert checkpoint_damage(make_store(tmp_path / "s", 0), {}) == ([], [])
