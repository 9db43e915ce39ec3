"""How often the network is right, at a few epochs, before anything is computed.

Pixels scaled otherwise than in training, another order of channels or outputs, weights of another
data set: none of these raises an error, and all of them show here.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from daskcurv.experiment.curriculum import TRAIN
from daskcurv.experiment.experiment import Experiment
from daskcurv.spread import evenly

log = logging.getLogger(__name__)

SAMPLES = 512
"""At each epoch, of the training and the held-out samples together."""

_BATCH = 128
_Z = 1.959964
"""Of a 95 % interval."""


@dataclass(frozen=True)
class Accuracy:
    """How many of some samples the weights of an epoch classify as labelled.

    Attributes
    ----------
    epoch : int
    split : {"training", "held-out"}
    correct, samples : int
    active : int
        Active classes.
    loss : float
        Mean cross-entropy, in nats; unlike the share, it depends on the scale of the pixels.
    """

    epoch: int
    split: str
    correct: int
    samples: int
    active: int
    loss: float

    @property
    def share(self) -> float:
        """Share of correct samples."""
        return self.correct / self.samples

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of the share [1]_.

        References
        ----------
        .. [1] Wilson, "Probable inference, the law of succession, and statistical inference",
           Journal of the American Statistical Association 22 (1927).
        """
        n, p = self.samples, self.share
        centre = (p + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
        half = _Z / (1 + _Z**2 / n) * math.sqrt(p * (1 - p) / n + _Z**2 / (4 * n * n))
        return centre - half, centre + half

    @property
    def no_better_than_chance(self) -> bool:
        """Whether guessing among the active classes may be as good."""
        return self.active > 1 and self.interval[0] <= 1 / self.active

    def __str__(self) -> str:
        low, high = self.interval
        share = f"{self.share:.1%} ({low:.1%} to {high:.1%})"
        return f"{share} of {self.samples} {self.split} samples, mean loss {self.loss:.3g}"


def measure(experiment: Experiment) -> Iterator[Accuracy]:
    """Classify samples with the first, a middle and the last weights.

    Samples are spread evenly over those of active classes. Outputs are those that take part in the
    loss.
    """
    epochs = sorted(experiment.checkpoints)
    split = experiment.split
    for epoch in sorted({epochs[0], epochs[len(epochs) // 2], epochs[-1]}):
        active = experiment.active(epoch)
        parts = {
            "training": np.flatnonzero(active & (split == TRAIN)),
            "held-out": np.flatnonzero(active & (split != TRAIN)),
        }
        filled = {name: ids for name, ids in parts.items() if len(ids)}
        if not filled:
            continue
        model = experiment.model(epoch).eval()
        classes = experiment.active_classes(epoch)
        every = range(experiment.network.num_classes)
        columns = torch.tensor(list(classes if experiment.head == "active" else every))
        for name, ids in filled.items():
            chosen = ids[evenly(len(ids), SAMPLES // len(filled))]
            correct, loss = 0, 0.0
            for start in range(0, len(chosen), _BATCH):
                images, labels, _ = experiment.dataset.inputs(chosen[start : start + _BATCH])
                with torch.no_grad():
                    logits = model(images)[:, columns].double()
                wanted = (columns == labels[:, None]).int().argmax(1)
                correct += int((logits.argmax(1) == wanted).sum())
                loss += float(F.cross_entropy(logits, wanted, reduction="sum"))
            yield Accuracy(epoch, name, correct, len(chosen), len(classes), loss / len(chosen))


def say_accuracy(experiment: Experiment) -> list[dict[str, Any]]:
    """Log the accuracy, with a warning if it is that of guessing; return it as JSON values."""
    found = []
    for one in measure(experiment):
        found.append(one)
        log.info("accuracy at epoch %d: %s", one.epoch, one)
    trained = [one for one in found if one.split == "training"]
    if trained and trained[-1].no_better_than_chance:
        last = trained[-1]
        log.warning(
            "at epoch %d the network is not better than chance (1 of %d classes): %s. Usual "
            "causes: --mean and --std of another training run; images with channels in another "
            "order; outputs in another order than the labels (--outputs class_order if in that of "
            "the classes' additions); weights of other data; an untrained network",
            last.epoch,
            last.active,
            last,
        )
    return [asdict(one) for one in found]
