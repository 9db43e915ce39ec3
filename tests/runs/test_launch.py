"""What a launch leaves behind, on real workers.

The reference for every comparison is an undisturbed run; comparisons are bit for bit.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import daskcurv
from daskcurv.cli import main
from daskcurv.config import EstimatorConfig
from daskcurv.errors import ClusterError
from daskcurv.experiment.checkpoints import check_all
from daskcurv.experiment.curriculum import class_order_of
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.runs.block import Worker
from daskcurv.runs.tasks import BlockTask
from tests.support.builders import make_model, write_checkpoints, write_cifar
from tests.support.launches import (
    MEASURES,
    assert_ok,
    assert_same_results,
    make_store,
    results,
    run_context,
)
from tests.support.oracles import referee
from tests.support.project import Project

DOCUMENTED_FILES = {
    "per_image_curvature.npy",
    "per_image_directional_eig.npy",
    "per_image_labels.npy",
    "metadata.json",
}


def test_full_size_weights_give_the_documented_tree(tmp_path):
    project = Project(tmp_path)
    _, labels = write_cifar(project.data, num_samples=48, num_classes=100)
    write_checkpoints(project.models, [0, 200, 400], ModelSpec())
    order = class_order_of(0)

    run = project.run(
        "launch", "--data-path", str(project.data), "--model-dir", str(project.models),
        "--store", str(project.store), "--save-base-dir", str(project.tree),
        "--epochs", "0,200,400", "--n_probes", "2", "--batch_size", "8", "--workers", "1",
    )  # fmt: skip
    assert_ok(run)

    assert sorted(p.name for p in project.tree.iterdir()) == [
        "epoch_0000",
        "epoch_0200",
        "epoch_0400",
    ]
    for epoch, num_active in ((0, 5), (200, 10), (400, 15)):
        directory = project.tree / f"epoch_{epoch:04d}"
        assert {p.name for p in directory.iterdir()} == DOCUMENTED_FILES
        curvature = np.load(directory / "per_image_curvature.npy")
        eig = np.load(directory / "per_image_directional_eig.npy")
        exported_labels = np.load(directory / "per_image_labels.npy")
        assert curvature.dtype == eig.dtype == np.float32
        assert exported_labels.dtype == np.int64
        np.testing.assert_array_equal(exported_labels, labels)
        active = np.isin(labels, order[:num_active])
        assert active.any()
        assert not active.all()
        np.testing.assert_array_equal(np.isnan(curvature), ~active)
        np.testing.assert_array_equal(np.isnan(eig), ~active)

        metadata = json.loads((directory / "metadata.json").read_text())
        assert metadata["epoch"] == epoch
        assert metadata["total_samples"] == 48
        assert metadata["num_gpus"] >= 1
        assert metadata["compute_time_seconds"] > 0
        assert metadata["allowed_classes"] == order[:num_active].tolist()
        for name in ("mean", "std", "min", "max"):
            expected = getattr(curvature[active].astype(np.float64), name)()
            assert metadata["curvature_stats"][name] == pytest.approx(expected, rel=1e-12)


def test_the_store_holds_what_score_samples_computes(project):
    assert_ok(project.launch("--block_size", "17"))
    dataset = results(project.store)
    cifar = read_cifar(project.data)
    images, labels = cifar.normalise(cifar.images), cifar.labels
    order = class_order_of(0, 10)
    for epoch, num_active in ((0, 4), (1, 4), (2, 8), (4, 10)):
        active = np.flatnonzero(np.isin(labels, order[:num_active]))
        scores = daskcurv.score_samples(
            make_model(seed=1000 + epoch),
            images[active],
            labels[active],
            n_probes=2,
            sample_ids=active,
            batch_size=8,
        )
        row = dataset.sel(epoch=epoch)
        np.testing.assert_array_equal(np.flatnonzero(row.status == 1), active)
        for name in MEASURES:
            np.testing.assert_allclose(
                row[name].values[active], getattr(scores, name), rtol=1e-4, err_msg=name
            )


def test_results_do_not_depend_on_the_number_of_workers_or_later_epochs(project):
    reference = Project(project.root / "reference")
    reference.root.mkdir()
    reference.data, reference.models = project.data, project.models
    assert_ok(reference.launch("--block_size", "20", "--workers", "2"))

    assert_ok(project.launch("--block_size", "20", "--workers", "1", "--epochs", "1,4"))
    first = results(project.store)
    assert_ok(project.launch("--workers", "1"))
    assert_same_results(results(project.store), results(reference.store))
    both = results(project.store).sel(epoch=[1, 4])
    assert_same_results(both, first)
    assert float(first.compute_seconds.sum()) == float(both.compute_seconds.sum())


def test_results_do_not_depend_on_the_order_of_blocks(project):
    cifar = read_cifar(project.data)
    checkpoint = project.models / "index-0_epoch-4.pt"
    sha256 = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    stores = []
    for name, blocks in (("forward", range(6)), ("backward", reversed(range(6)))):
        store = make_store(project.root / name, cifar, block_size=10)
        context = run_context(
            store.path, cifar, project.root / "inputs", EstimatorConfig(n_probes=2), batch_size=8
        )
        worker = Worker(context)
        for block in blocks:
            result = worker.run(BlockTask(4, 0, block, checkpoint, sha256, samples=10))
            assert result.computed
        assert not worker.run(BlockTask(4, 0, 3, checkpoint, sha256, samples=10)).computed
        stores.append(store)
    for name in MEASURES:
        np.testing.assert_array_equal(stores[0].read(name, 0), stores[1].read(name, 0))


def test_a_worker_takes_no_block_that_might_outlast_its_job(project, monkeypatch):
    cifar = read_cifar(project.data)
    store = make_store(project.root / "store", cifar, block_size=60)
    context = run_context(store.path, cifar, project.root / "inputs")

    def declines(seconds_left: float, longest_block: float) -> bool:
        monkeypatch.setenv("DASKCURV_DEADLINE", str(time.time() + seconds_left))
        worker = Worker(context)
        worker._time_limit.block_took(longest_block)
        return worker.out_of_time

    assert not declines(1000, longest_block=0)
    assert not declines(1000, longest_block=700)
    assert declines(1000, longest_block=900)
    assert declines(10, longest_block=0)
    monkeypatch.delenv("DASKCURV_DEADLINE")
    assert not Worker(context).out_of_time


def test_a_gpu_run_does_not_fall_back_to_cpus_in_silence(project, monkeypatch):
    cifar = read_cifar(project.data)
    store = make_store(project.root / "store", cifar, block_size=60)
    context = run_context(store.path, cifar, project.root / "inputs", device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ClusterError, match="no GPU is visible to worker"):
        Worker(context)


def test_a_changed_checkpoint_of_a_scored_epoch_is_noticed(project):
    assert_ok(project.launch())
    before = results(project.store)
    torch.save(make_model(seed=5).state_dict(), project.models / "index-0_epoch-2.pt")
    run = project.launch()
    assert run.returncode == 2
    assert "checkpoints of epochs 2 have changed" in run.stdout
    assert_same_results(results(project.store), before)


def test_a_block_that_keeps_failing_is_set_aside_and_the_rest_is_finished(
    project, monkeypatch, capsys
):
    def with_a_wrong_digest(*arguments, **options):
        # As if the file were replaced between the check and the work.
        checked = check_all(*arguments, **options)
        return [replace(c, sha256="0" * 64) if c.epoch == 2 else c for c in checked]

    monkeypatch.setattr("daskcurv.runs.opening.check_all", with_a_wrong_digest)
    monkeypatch.chdir(project.root)
    assert main(["launch", *project.launch_arguments()]) == 1
    output = capsys.readouterr().err
    assert "3 of 4 epochs complete" in output
    assert "epoch 2 block 0: checkpoint" in output
    assert "it changed during or before the run" in output
    dataset = daskcurv.open_results(project.store)
    assert dataset.complete.values.tolist() == [True, True, False, True]
    assert np.isnan(dataset.curvature.sel(epoch=2)).all()
    assert not (project.tree / "epoch_0002").exists()


def test_other_settings_are_refused_with_the_fields_that_differ(project):
    assert_ok(project.launch())
    run = project.launch("--h", "0.01", "--seed", "7")
    assert run.returncode == 2
    assert "estimator.h: the store has 0.001, this run has 0.01" in run.stdout
    assert "estimator.seed: the store has 0, this run has 7" in run.stdout
    assert "Traceback" not in run.stdout


def test_a_finished_store_is_exported_again_without_computing(project):
    assert_ok(project.launch())
    files = {p: p.read_bytes() for p in project.tree.rglob("*.npy")}
    assert len(files) == 4 * 3
    shutil.rmtree(project.tree)
    assert_ok(project.launch())
    assert {p: p.read_bytes() for p in project.tree.rglob("*.npy")} == files


def test_options_change_what_is_documented_to_change(project):
    assert_ok(project.launch("--head", "active", "--class_partition", "trained"))
    dataset = results(project.store)
    assert dataset.num_active_classes.values.tolist() == [4, 4, 4, 8]
    order = class_order_of(0, 10)
    active = dataset.status.sel(epoch=2).values == 1
    np.testing.assert_array_equal(active, np.isin(dataset.label.values, order[:4]))
    assert np.isin(dataset.prediction.sel(epoch=2).values[active], order[:4]).all()
    cifar = read_cifar(project.data)
    ids = np.flatnonzero(active)
    sample = cifar.normalise(cifar.images[ids]), torch.from_numpy(cifar.labels[ids])
    classes = order[:4].tolist()
    expected = referee(
        make_model(seed=1002), *sample, n_probes=2, classes=classes, ids=ids.tolist()
    )
    row = dataset.sel(epoch=2, sample=active)
    np.testing.assert_allclose(row.loss, expected["loss"], rtol=1e-4)
    np.testing.assert_allclose(row.grad_norm, expected["grad_norm"], rtol=1e-3)
    for name in ("curvature", "curvature_sq"):
        assert np.median(np.abs(row[name].values / expected[name] - 1)) < 2e-2


def test_a_dry_run_creates_nothing(project):
    before = sorted(project.root.rglob("*"))
    run = project.launch("--dry_run")
    assert_ok(run)
    assert "4 epochs, 4 blocks" in run.stdout
    assert not project.store.exists()
    created = set(project.root.rglob("*")) - set(before)
    assert {p.relative_to(project.root).parts[0] for p in created} <= {"log"}


@pytest.mark.parametrize("count", [3000, pytest.param(50_000, marks=pytest.mark.slow)])
def test_each_of_many_samples_is_scored_exactly_once(tmp_path, count):
    project = Project(tmp_path)
    _, labels = write_cifar(project.data, num_samples=count, num_classes=100)
    write_checkpoints(project.models, [0, 4000], ModelSpec(num_classes=100, width=1))
    run = project.run(
        "launch", "--data_path", str(project.data), "--model_dir", str(project.models),
        "--store", str(project.store), "--save_base_dir", str(project.tree),
        "--epochs", "0,4000", "--n_probes", "1", "--batch_size", "256",
        "--method", "finite-difference",
        "--block_size", str(count // 10),
    )  # fmt: skip
    assert_ok(run)

    dataset = results(project.store)
    initial = np.isin(labels, class_order_of(0)[:5])
    np.testing.assert_array_equal(dataset.status.sel(epoch=0), np.where(initial, 1, 2))
    assert (dataset.status.sel(epoch=4000) == 1).all()
    assert np.isfinite(dataset.curvature.sel(epoch=4000)).all()

    (log,) = (project.root / "log").iterdir()
    computed = [
        line.split(" DEBUG ")[1].split(" BlockResult")[0]
        for line in log.read_text().splitlines()
        if "computed=True" in line
    ]
    assert len(computed) == 20
    assert len(set(computed)) == 20

    # A sample's numbers are its own, wherever it stands.
    chosen = np.array([0, count // 10 - 1, count // 10, 31_415 % count, count - 1])
    cifar = read_cifar(project.data)
    scores = daskcurv.score_samples(
        make_model(ModelSpec(num_classes=100, width=1), seed=5000),
        cifar.normalise(cifar.images[chosen]),
        labels[chosen],
        n_probes=1,
        method="finite-difference",
        sample_ids=chosen,
    )
    np.testing.assert_allclose(
        dataset.curvature.sel(epoch=4000).values[chosen], scores.curvature, rtol=1e-3
    )
