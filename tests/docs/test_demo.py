"""The demo, as a new user runs it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from sklearn.metrics import roc_auc_score

import daskcurv
from daskcurv import score_samples
from daskcurv.cli import main
from daskcurv.clusters.local import visible_gpus
from daskcurv.demo import FLIPPED_FRACTION, LAST_EPOCH, SPEC
from daskcurv.estimators.selection import has_fast_bfloat16
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.experiment.weight_files import read_state_dict
from daskcurv.storage.attributes import identity_of


def test_the_demo_finds_the_flipped_labels(demo):
    root, output = demo
    line = r"^  ([a-z]+ [a-z]+)(?: \(CSL\))? +([\d.]+) \(([\d.]+) to ([\d.]+)\)$"
    printed = {name: values for name, *values in re.findall(line, output, re.MULTILINE)}
    results = daskcurv.open_results(root / "demo" / "curvature.zarr", incomplete="raise").load()
    flipped = np.load(root / "demo" / "flipped_samples.npy")
    assert len(flipped) == round(FLIPPED_FRACTION * 1797)
    wrong = np.isin(results.sample, flipped)
    # The weights of epoch 0 had seen no class, and those of epoch 6 not the five added there.
    late = np.isin(results.label, identity_of(results)["classes"]["order"][5:])
    trained = results.epoch.values[:, None] > np.where(late, 6, 0)
    curvature, loss = (
        np.where(trained, results[name].values.astype(np.float64), np.nan)
        for name in ("curvature", "loss")
    )
    scores = {
        "cumulative curvature": np.nansum(curvature, axis=0),
        "mean curvature": np.nanmean(curvature, axis=0),
        "median curvature": np.nanmedian(curvature, axis=0),
        "cumulative loss": np.nansum(loss, axis=0),
        "final loss": loss[-1],
    }
    assert printed.keys() == scores.keys()
    pairs = [wrong[part].sum() * (~wrong[part]).sum() for part in (late, ~late)]
    for name, score in scores.items():
        area, low, high = map(float, printed[name])
        areas = [roc_auc_score(wrong[part], score[part]) for part in (late, ~late)]
        assert area == pytest.approx(np.average(areas, weights=pairs), abs=6e-4)
        assert 0.9 < low <= area <= high <= 1  # as printed, rounded


def test_the_flipped_labels_are_the_ones_that_disagree_with_the_digits(demo):
    from sklearn.datasets import load_digits

    root, _ = demo
    cifar = read_cifar(root / "demo" / "cifar-100-python")
    truth = load_digits().target
    flipped = np.load(root / "demo" / "flipped_samples.npy")
    np.testing.assert_array_equal(np.flatnonzero(cifar.labels != truth), flipped)
    assert cifar.class_names[3] == "three"


def test_the_demo_leaves_a_store_a_tree_and_a_picture(demo):
    root, output = demo
    for name in ("demo/curvature.zarr", "demo/per_image_curvature_full", "demo/most_curved.png"):
        assert name in output
        assert (root / name).exists()
    directories = sorted((root / "demo" / "per_image_curvature_full").iterdir())
    assert [d.name for d in directories] == [f"epoch_{e:04d}" for e in range(LAST_EPOCH + 1)]
    metadata = json.loads((directories[-1] / "metadata.json").read_text())
    assert len(metadata["allowed_classes"]) == 10
    picture = imread(root / "demo" / "most_curved.png")
    assert picture[..., :3].std() > 0.05, "the picture is blank"
    assert len(re.findall(r"^  sample +\d+", output, re.MULTILINE)) == 10


def test_the_demo_goes_on_where_it_was(demo, monkeypatch, capsys):
    root, _ = demo
    monkeypatch.chdir(root)
    assert main(["launch", "--demo", "demo"]) == 0
    captured = capsys.readouterr()
    assert "to do: 0 epochs, 0 blocks" in captured.err
    assert "AUROC" in captured.out


def test_the_demo_uses_the_fast_method_and_agrees_with_direct_differences(demo):
    root, _ = demo
    results = daskcurv.open_results(root / "demo" / "curvature.zarr").load()
    fast = has_fast_bfloat16(torch.device("cuda" if visible_gpus() else "cpu"))
    expected = "difference-propagation, bfloat16" if fast else "finite-difference"
    assert set(results.method.values) == {expected}
    cifar = read_cifar(root / "demo" / "cifar-100-python")
    ratios = []
    for epoch in (0, 6, LAST_EPOCH):
        weights, _ = read_state_dict(root / f"demo/model_parameters/index-0_epoch-{epoch}.pt")
        model = SPEC.build()
        model.load_state_dict(weights)
        row = results.sel(epoch=epoch)
        ids = np.flatnonzero(row.status == 1)[::17]
        direct = score_samples(
            model,
            cifar.normalise(cifar.images[ids]),
            cifar.labels[ids],
            sample_ids=ids,
            method="finite-difference",
        )
        error = np.abs(row.curvature.values[ids] - direct.curvature)
        ratios.append(error / row.curvature_stderr.values[ids])
    # Measured over all samples: 0.006 (median).
    assert np.median(np.concatenate(ratios)) <= 0.1
