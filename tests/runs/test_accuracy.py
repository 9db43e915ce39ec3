"""The accuracy that is shown before anything is computed."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from daskcurv.config import EstimatorConfig
from daskcurv.experiment.curriculum import Curriculum, Schedule
from daskcurv.experiment.data import Arrays
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.networks import Factory
from daskcurv.runs.accuracy import Accuracy, measure, say_accuracy

CLASSES, SAMPLES = 4, 40


def brightness(classes: int) -> nn.Module:
    """Output c is the brightness of channel c."""
    head = nn.Linear(classes, classes)
    nn.init.eye_(head.weight)
    nn.init.zeros_(head.bias)
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    """Images whose brightest channel is their label, but for every fifth."""
    labels = np.arange(SAMPLES) % CLASSES
    images = np.zeros((SAMPLES, CLASSES, 4, 4), np.uint8)
    shown = np.where(np.arange(SAMPLES) % 5 == 4, (labels + 1) % CLASSES, labels)
    images[np.arange(SAMPLES), shown] = 255
    paths = {epoch: tmp_path / f"{epoch}.pt" for epoch in (0, 3, 8)}
    for epoch, path in paths.items():
        weights = brightness(CLASSES).state_dict()
        if epoch == 8:  # outputs in another order than the labels
            weights["2.weight"] = weights["2.weight"].roll(1, 0)
        torch.save(weights, path)
    return Experiment(
        dataset=Arrays(images, labels, mean=(0.5,) * CLASSES, std=(0.2,) * CLASSES),
        checkpoints=paths,
        network=Factory.of(brightness, CLASSES, classes=CLASSES),
        curriculum=Curriculum((3, 1, 0, 2), Schedule(2, 2, 2)),
        estimator=EstimatorConfig(method="finite-difference", precision="float32"),
        validation_per_class=2,
    )


def test_it_is_counted_for_training_and_held_out_samples(experiment):
    found = list(measure(experiment))
    assert [(one.epoch, one.split) for one in found] == [
        (epoch, split) for epoch in (0, 3, 8) for split in ("training", "held-out")
    ]
    # At epoch 0 classes 3 and 1 are active, ten samples each, the first two of each held out.
    ids = np.arange(SAMPLES)
    right = ids % 5 != 4
    held_out = ids < 2 * CLASSES
    early = np.isin(ids % CLASSES, (3, 1))
    for one, among in zip(
        found, (early & ~held_out, early & held_out, ~held_out, held_out), strict=False
    ):
        assert (one.samples, one.correct) == (among.sum(), (among & right).sum())
    assert [one.active for one in found] == [2, 2, 4, 4, 4, 4]


def test_a_network_that_guesses_is_warned_of_with_the_usual_causes(experiment, caplog):
    caplog.set_level("INFO")
    record = say_accuracy(experiment)
    # The logits are 2.5 for the channel that is bright, and -2.5 for the others.
    right = -math.log(math.exp(2.5) / (math.exp(2.5) + 3 * math.exp(-2.5)))
    assert record[0] == {
        "epoch": 0, "split": "training", "correct": 12, "samples": 16, "active": 2,
        "loss": pytest.approx(right + 4 / 16 * 5, rel=1e-6),
    }  # fmt: skip
    assert "accuracy at epoch 3: 78.1% (61.2% to 89.0%) of 32 training samples, mean loss " in (
        caplog.text
    )
    (warning,) = (one.getMessage() for one in caplog.records if one.levelname == "WARNING")
    assert "at epoch 8 the network is not better than chance (1 of 4 classes)" in warning
    assert "outputs in another order than the labels (--outputs class_order" in warning


def test_outputs_in_the_order_of_additions_are_mapped(experiment, caplog):
    """At epoch 8 output j is class j - 1."""
    order = Curriculum((3, 0, 1, 2), experiment.curriculum.schedule)
    last = {8: experiment.checkpoints[8]}
    mapped = replace(experiment, checkpoints=last, curriculum=order, outputs="class_order")
    found = list(measure(mapped))
    assert [(one.correct, one.samples) for one in found] == [(25, 32), (7, 8)]
    say_accuracy(mapped)
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


@pytest.mark.parametrize(("correct", "samples"), [(0, 10), (5, 10), (10, 10), (250, 512)])
def test_the_interval_is_that_of_wilson(correct, samples):
    one = Accuracy(0, "training", correct, samples, 10, loss=1.0)
    expected = binomtest(correct, samples).proportion_ci(method="wilson")
    assert one.interval == pytest.approx((expected.low, expected.high), abs=1e-6)
