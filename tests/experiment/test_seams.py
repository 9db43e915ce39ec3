"""Another network, other data, other names: one new object each, and everything works with it.

Each goes through launch, queries, verification (computing results again), export and report.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from daskcurv import score_samples
from daskcurv.audit.provenance import checkpoint_damage, disagreement, recompute
from daskcurv.cli import main
from daskcurv.clusters import ClusterOptions
from daskcurv.config import EstimatorConfig
from daskcurv.errors import ConfigError, DataError
from daskcurv.experiment.curriculum import Curriculum, Schedule
from daskcurv.experiment.data import (
    FORMATS,
    Arrays,
    Dataset,
    Format,
    Preprocessing,
    read_dataset,
)
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.naming import Naming
from daskcurv.experiment.networks import Factory, network_of
from daskcurv.experiment.search import discover
from daskcurv.runs.launch import launch_experiment
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage import ResultsStore
from daskcurv.storage.integrity.verify import verify
from daskcurv.storage.read import open_results
from tests.support.builders import TINY, make_model, write_checkpoints

CLASSES, SAMPLES = 4, 24


def vgg(widths: list[int], channels: int = 1, outputs: int = CLASSES) -> nn.Module:
    """A small VGG with batch normalisation, for images of any size."""
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
        layers += [nn.MaxPool2d(2)]
        channels = width
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, outputs)
    )


def not_a_network() -> int:
    return 3


@dataclass(frozen=True)
class Checkerboards(Dataset):
    """Grey images of 12 × 20 pixels, made when asked for."""

    mean: tuple[float, ...] = (0.4,)
    std: tuple[float, ...] = (0.3,)
    class_names: tuple[str, ...] = ("one", "two", "three", "four")

    @property
    def labels(self):
        return np.arange(SAMPLES) % CLASSES

    @property
    def images(self):
        generator = np.random.default_rng(1)
        rows, columns = np.indices((12, 20))
        board = (rows // (self.labels[:, None, None] + 1) + columns) % 2
        noise = generator.integers(0, 100, (SAMPLES, 12, 20))
        return (board * 120 + noise).astype(np.uint8)[:, None]


def small_cifar() -> Arrays:
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (SAMPLES, 3, 32, 32)).astype(np.uint8)
    labels = np.arange(SAMPLES) % CLASSES
    return Arrays(images, labels, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))


def experiment(**parts: object) -> Experiment:
    standard = {
        "dataset": small_cifar(),
        "network": replace(TINY, num_classes=CLASSES),
        "curriculum": Curriculum((3, 1, 0, 2), Schedule(2, 2, 5)),
        "estimator": EstimatorConfig(n_probes=2, method="finite-difference", precision="float32"),
        "validation_per_class": 1,
    }
    return Experiment(**{**standard, **parts})  # type: ignore[arg-type]


def save_vgg(path: Path, seed: int, **arguments: int) -> nn.Module:
    torch.manual_seed(seed)
    model = vgg([4, 8], **arguments).eval()
    torch.save(model.state_dict(), path)
    return model


def goes_through_everything(run: Experiment, directory: Path, models: dict[int, nn.Module]) -> None:
    """Launch, query, verify, compute again, export, report."""
    store, tree = directory / "curvature.zarr", directory / "tree"
    options = LaunchOptions(
        store=store, save_base_dir=tree, batch_size=8, block_size=10,
        cluster=ClusterOptions(workers=1, device="cpu"),
    )  # fmt: skip
    assert launch_experiment(run, options).exit_code == 0
    dataset = open_results(store, incomplete="raise").load()
    mean, std = (np.reshape(v, (-1, 1, 1)) for v in (run.dataset.mean, run.dataset.std))
    images = ((run.dataset.images / 255 - mean) / std).astype(np.float32)
    for epoch, model in models.items():
        active = np.isin(run.dataset.labels, run.curriculum.order[: 2 if epoch < 5 else 4])
        row = dataset.sel(epoch=epoch)
        np.testing.assert_array_equal(row.status == 1, active)
        expected = score_samples(
            model,
            images[active],
            run.dataset.labels[active],
            sample_ids=np.flatnonzero(active),
            n_probes=2,
            method="finite-difference",
        )
        np.testing.assert_allclose(row.loss[active], expected.loss, rtol=1e-3)
        np.testing.assert_allclose(row.curvature[active], expected.curvature, rtol=2e-2)
        exported = np.load(tree / f"epoch_{epoch:04d}" / "per_image_curvature.npy")
        np.testing.assert_array_equal(exported, row.curvature.values)

    opened = ResultsStore.open(store, identity=run.identity())
    assert verify(opened).damage == []
    assert checkpoint_damage(opened, run.checkpoints) == ([], [])
    again = recompute(opened, run.checkpoints, run.dataset, 12)
    assert len(again) == 12
    assert disagreement(again) == ""
    page = directory / "report.html"
    assert main(["report", str(store), "-o", str(page)]) == 0
    assert page.stat().st_size > 10_000
    # Continued, there is nothing to do.
    assert launch_experiment(run, options).exit_code == 0


def test_another_network_is_a_factory_and_its_arguments(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {epoch: tmp_path / f"index-0_epoch-{epoch}.pt" for epoch in (0, 6)}
    models = {epoch: save_vgg(path, epoch, channels=3) for epoch, path in paths.items()}
    network = Factory.of(vgg, CLASSES, widths=[4, 8], channels=3)
    assert network_of(network.to_dict()) == network
    goes_through_everything(experiment(network=network, checkpoints=paths), tmp_path, models)


def test_another_data_set_is_one_that_gives_images_and_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = {3: tmp_path / "index-0_epoch-3.pt"}
    models = {epoch: save_vgg(path, epoch) for epoch, path in paths.items()}
    network = Factory.of(vgg, CLASSES, widths=[4, 8])
    run = experiment(dataset=Checkerboards(), network=network, checkpoints=paths)
    goes_through_everything(run, tmp_path, models)


def test_another_naming_is_a_pattern(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    spec = replace(TINY, num_classes=CLASSES)
    for epoch, path in write_checkpoints(tmp_path / "weights", [1, 7], spec).items():
        path.rename(path.with_name(f"run3-{epoch:03d}.weights"))
    (tmp_path / "weights" / "best.weights").touch()
    paths = discover(tmp_path / "weights", 3, Naming(("run{experiment}-{epoch}.weights",)))
    assert {epoch: path.name for epoch, path in paths.items()} == {
        1: "run3-001.weights",
        7: "run3-007.weights",
    }
    models = {epoch: make_model(spec, seed=1000 + epoch) for epoch in paths}
    goes_through_everything(experiment(checkpoints=paths, experiment_index=3), tmp_path, models)


def test_another_format_is_recognised_by_its_own_function(tmp_path, monkeypatch):
    held = small_cifar()
    for name, array in (("pixels.bin", held.images), ("classes.bin", held.labels)):
        array.tofile(tmp_path / name)

    def recognises(path: Path) -> bool:
        return (path / "pixels.bin").exists()

    def read(path: Path, preprocessing: Preprocessing) -> Arrays:
        images = np.fromfile(path / "pixels.bin", np.uint8).reshape(held.images.shape)
        return preprocessing.arrays(path, images, np.fromfile(path / "classes.bin", np.int64))

    plain = Format("plain bytes (pixels.bin, classes.bin)", recognises, read, held.mean, held.std)
    with pytest.raises(DataError, match="none of the formats"):
        read_dataset(tmp_path)
    monkeypatch.setattr("daskcurv.experiment.data.FORMATS", [*FORMATS, plain])
    read_back = read_dataset(tmp_path)
    assert read_back.digest() == held.digest()
    assert read_back.mean == held.mean
    assert read_dataset(tmp_path, std=0.5).std == (0.5,) * held.images.shape[1]


def test_a_pattern_with_two_epochs_is_refused():
    with pytest.raises(ConfigError, match=r"can have \{epoch\} .* only once"):
        Naming(("{epoch}-{epoch}.pt",))


def test_a_factory_that_workers_cannot_import_is_refused():
    with pytest.raises(ConfigError, match="cannot be imported by workers"):
        Factory.of(lambda: vgg([4]), CLASSES)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factory": "nowhere.at_all:net"}, "factory nowhere.at_all:net cannot be imported"),
        ({"factory": f"{__name__}:absent"}, "absent cannot be imported"),
        ({"source_sha256": "0" * 64}, "is not the one recorded"),
        ({"factory": f"{__name__}:not_a_network", "arguments": {}}, "returned a int; expected"),
    ],
)
def test_a_factory_that_gives_another_network_is_refused(change, message):
    network = Factory.of(vgg, CLASSES, widths=[4])
    with pytest.raises(ConfigError, match=re.escape(message) if "(" in message else message):
        replace(network, **change).build()
