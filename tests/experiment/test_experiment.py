"""The training run as an object: what it records of itself, and what follows from it."""

from __future__ import annotations

import pickle
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from daskcurv import score_samples
from daskcurv.config import EstimatorConfig, fingerprint
from daskcurv.errors import ConfigError, DataError, StoreError
from daskcurv.experiment.curriculum import Curriculum, Schedule
from daskcurv.experiment.data import Arrays
from daskcurv.experiment.data.prepared import prepare
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.identity import Recorded
from daskcurv.runs.inputs import experiment_of
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage import ResultsStore
from tests.support.builders import TINY, make_model, write_checkpoints

FORMAT1 = Path(__file__).parents[1] / "data" / "format1" / "format1.tar.xz"
ORDER = (2, 0, 1, 4, 3, 9, 8, 7, 6, 5)
CIFAR_MEAN, CIFAR_STD = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (30, 3, 32, 32)).astype(np.uint8)
    labels = np.arange(30) % 10
    return Experiment(
        dataset=Arrays(images, labels, mean=CIFAR_MEAN, std=CIFAR_STD),
        checkpoints=write_checkpoints(tmp_path, [0, 2]),
        network=TINY,
        curriculum=Curriculum(ORDER, Schedule(4, 4, 2)),
        estimator=EstimatorConfig(method="finite-difference", precision="float32", n_probes=2),
        validation_per_class=1,
    )


def test_the_identity_of_the_first_experiment_is_the_one_that_its_stores_have(
    tmp_path, monkeypatch
):
    """The store was made by version 0.1.0."""
    with tarfile.open(FORMAT1) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    store = ResultsStore.open(Path("curvature.zarr"))
    options = LaunchOptions(
        epochs="all",
        data_path=Path("cifar-100-python"),
        model_dir=Path("model_parameters"),
        class_order=Path("regenerate"),
        schedule=Schedule(4, 4, 2),
        validation_per_class=1,
        store=store.path,
        estimator=EstimatorConfig(n_probes=4),
    )
    found = experiment_of(options)
    assert found.identity() == store.identity
    assert fingerprint(found.identity()) == store.fingerprint
    for name, values in found.sample_columns().items():
        np.testing.assert_array_equal(values, store.read(name), err_msg=name)
    again = Experiment.from_identity(
        store.identity, dataset=found.dataset, checkpoints=found.checkpoints
    )
    assert again.identity() == store.identity
    assert again.curriculum == found.curriculum
    assert again.network == found.network


def test_another_normalisation_or_data_set_is_not_the_recorded_experiment(experiment):
    images, labels = experiment.dataset.images, experiment.dataset.labels
    others = {
        "dataset.mean": Arrays(images, labels, mean=(0.5, 0.5, 0.5), std=CIFAR_STD),
        "dataset.sha256": Arrays(images, labels[::-1].copy(), mean=CIFAR_MEAN, std=CIFAR_STD),
    }
    for field, other in others.items():
        with pytest.raises(DataError, match=field):
            Experiment.from_identity(experiment.identity(), dataset=other, checkpoints={})


def test_imported_results_are_no_experiment(experiment):
    identity = {
        "estimator": {"method": "imported", "n_probes": 1},
        "classes": {"order": [0, 1]},
        "imported": {"metadata_sha256": "", "multiplied_by": 4},
    }
    with pytest.raises(StoreError, match="imported"):
        Experiment.from_identity(identity, dataset=experiment.dataset, checkpoints={})
    recorded = Recorded.of(identity)
    assert recorded.estimator is None
    assert recorded.multiplied_by == 4
    assert recorded.curriculum.first_epochs_trained(np.array([0, 1, -1])).tolist() == [-1, -1, -1]


@pytest.mark.parametrize(("epoch", "count"), [(0, 4), (1, 4), (2, 8), (3, 8), (4, 10), (99, 10)])
def test_a_sample_is_active_if_its_class_is(experiment, epoch, count):
    classes = ORDER[:count]
    assert experiment.active_classes(epoch) == classes
    expected = [label in classes for label in experiment.dataset.labels]
    assert experiment.active(epoch).tolist() == expected
    counts = experiment.active_per_block([epoch], block_size=7)
    blocks = [sum(expected[start : start + 7]) for start in range(0, 30, 7)]
    assert counts.tolist() == [blocks]
    first = experiment.sample_columns()["first_epoch_active"]
    assert (first <= epoch).tolist() == expected


@pytest.mark.parametrize("head", ["all", "active"])
def test_its_scorer_gives_what_score_samples_gives(experiment, head):
    ids = np.flatnonzero(experiment.active(2))[:5]
    scores = replace(experiment, head=head).scorer(2).score(*experiment.dataset.inputs(ids))
    mean, std = (np.array(v).reshape(3, 1, 1) for v in (CIFAR_MEAN, CIFAR_STD))
    expected = score_samples(
        make_model(seed=1002),
        ((experiment.dataset.images[ids] / 255 - mean) / std).astype(np.float32),
        experiment.dataset.labels[ids],
        sample_ids=ids,
        n_probes=2,
        method="finite-difference",
        classes=ORDER[:8] if head == "active" else None,
    )
    np.testing.assert_allclose(scores.loss, expected.loss, rtol=1e-4)
    np.testing.assert_allclose(scores.curvature, expected.curvature, rtol=1e-2)


def test_it_travels_without_arrays_and_opens_the_copy(experiment, tmp_path):
    copy = prepare(experiment.dataset, tmp_path / "shared")
    sent = pickle.dumps(experiment.travelling(copy))
    assert len(sent) < 2000
    arrived = pickle.loads(sent)
    assert arrived == experiment.travelling(copy)
    np.testing.assert_array_equal(arrived.dataset.images, experiment.dataset.images)
    assert len(pickle.dumps(arrived)) == len(sent)
    assert arrived.identity() == experiment.identity()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"network": replace(TINY, num_classes=9)}, "has label 9, but .* has 9 outputs"),
        ({"curriculum": Curriculum((0, 1, 2), Schedule())}, "the class order has 3 entries"),
    ],
)
def test_parts_that_do_not_belong_together_are_refused(experiment, change, message):
    with pytest.raises((DataError, ConfigError), match=message):
        replace(experiment, **change).check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": (0.5,)}, "mean has 1 values; expected one for each of the 3 channels"),
        ({"std": (1.0, 0.0, 1.0)}, r"std is .*; expected numbers above 0"),
        ({"images": np.zeros((2, 3, 4, 4))}, "dtype float64; expected"),
        ({"labels": np.array([0])}, r"the labels have shape \(1,\)"),
        ({"labels": np.array([0, -1])}, "expected one class index from 0"),
    ],
)
def test_arrays_that_make_no_data_set_are_refused(change, message):
    arrays = {
        "images": np.zeros((2, 3, 4, 4), np.uint8),
        "labels": np.array([0, 1]),
        "mean": (0.5, 0.5, 0.5),
        "std": (1.0, 1.0, 1.0),
    }
    with pytest.raises(DataError, match=message):
        Arrays(**{**arrays, **change})


@pytest.mark.parametrize(("shape", "channels"), [((5, 1, 28, 28), 1), ((5, 3, 8, 9), 3)])
def test_images_of_any_shape_are_normalised_by_channel(shape, channels):
    images = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    mean, std = tuple(np.linspace(0.3, 0.6, channels)), tuple(np.linspace(0.2, 0.4, channels))
    found = Arrays(images, np.arange(5), mean=mean, std=std).normalise(images)
    assert found.dtype == torch.float32
    for channel in range(channels):
        expected = (images[:, channel] / 255 - mean[channel]) / std[channel]
        np.testing.assert_allclose(found[:, channel], expected, atol=1e-6)
