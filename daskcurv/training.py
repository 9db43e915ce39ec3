"""The demo's training run, which can be interrupted and continues after its last complete epoch."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from daskcurv.atomic import whole_file
from daskcurv.experiment.curriculum import TRAIN, Schedule, class_order_of, held_out_split
from daskcurv.experiment.data.cifar import DIRECTORY, read_cifar
from daskcurv.experiment.resnet18 import ModelSpec

log = logging.getLogger(__name__)

SEED = 0
BATCH = 16
LEARNING_RATE = 0.05
DECAY = 0.3
"""Factor of the learning rate from one epoch of a task to the next."""

WEIGHTS = "model_parameters"
STATE = "training_state.pt"


@dataclass(frozen=True)
class TrainingRun:
    """The network, schedule and length of a training run.

    Attributes
    ----------
    spec : ModelSpec
    schedule : Schedule
    last_epoch : int
    validation_per_class : int
        Samples of each class that are held out.
    """

    spec: ModelSpec
    schedule: Schedule
    last_epoch: int
    validation_per_class: int


def train(directory: Path, run: TrainingRun) -> None:
    """Train class-incrementally, keeping every epoch's weights, unless this is already done.

    As in the full-size run: plain SGD with momentum, cross-entropy over the active outputs, a
    learning rate that starts again with every task, and each epoch's file written before the next
    classes are added. After every epoch the state of the training is saved too: an interrupted
    training continues from there and gives the same weights, bit for bit.

    Parameters
    ----------
    directory : Path
        Holds the data set; the run adds the directories ``model_parameters`` and ``class_order``.
    run : TrainingRun
    """
    target, building = directory / WEIGHTS, directory / f"{WEIGHTS}.partial"
    if target.exists():
        (target / STATE).unlink(missing_ok=True)
        return
    dataset = read_cifar(directory / DIRECTORY)
    order = class_order_of(0, run.spec.num_classes)
    (directory / "class_order").mkdir(exist_ok=True)
    np.save(directory / "class_order" / "index-0.npy", order)
    images, labels = dataset.normalise(dataset.images), torch.from_numpy(dataset.labels)
    split = held_out_split(dataset.labels, run.validation_per_class)
    trained_on = torch.from_numpy(split == TRAIN)

    resumed = _resumed(building, run)
    if resumed is None:
        training, done = _Training(run.spec), 0
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        training.save(building, run, epoch=0)
    else:
        training, done = resumed
        log.info("training continues after epoch %d of %d", done, run.last_epoch)
    while_training = replace(run.schedule, class_partition="trained")
    epochs = range(done + 1, run.last_epoch + 1)
    progress = {"initial": done, "total": run.last_epoch, "unit": " epochs", "disable": None}
    for epoch in tqdm(epochs, desc="training", **progress):
        active = torch.from_numpy(order[: while_training.num_active(epoch, run.spec.num_classes)])
        pool = torch.nonzero(trained_on & torch.isin(labels, active))[:, 0]
        position = (epoch - 1) % run.schedule.class_frequency
        loss, accuracy = training.epoch(
            images, labels, active, pool, LEARNING_RATE * DECAY**position
        )
        training.save(building, run, epoch)
        log.info(
            "training epoch %d of %d: %d classes, loss %.3f, accuracy %.1f %%",
            epoch,
            run.last_epoch,
            len(active),
            loss,
            100 * accuracy,
        )
    building.rename(target)
    (target / STATE).unlink()
    log.info("%s: weights of %d epochs", target, run.last_epoch + 1)


class _Training:
    """A network in training: its weights and all that decides how they go on."""

    def __init__(self, spec: ModelSpec):
        self._generator = torch.Generator().manual_seed(SEED)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self._model = spec.build()
        self._optimiser = torch.optim.SGD(
            self._model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
        )

    def epoch(
        self, images: Tensor, labels: Tensor, active: Tensor, pool: Tensor, learning_rate: float
    ) -> tuple[float, float]:
        """Train for an epoch; return mean loss and accuracy over it, as seen in training."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate
        self._model.train()
        loss_sum, correct = 0.0, 0
        shuffled = pool[torch.randperm(len(pool), generator=self._generator)]
        for batch in shuffled.split(BATCH):
            targets = (labels[batch][:, None] == active).to(torch.int64).argmax(dim=1)
            logits = self._model(images[batch])[:, active]
            loss = F.cross_entropy(logits, targets)
            self._optimiser.zero_grad()
            loss.backward()
            self._optimiser.step()
            loss_sum += len(batch) * loss.item()
            correct += int((logits.argmax(dim=1) == targets).sum())
        return loss_sum / len(pool), correct / len(pool)

    def save(self, directory: Path, run: TrainingRun, epoch: int) -> None:
        """Write an epoch's weights, then the state from which the next epoch starts."""
        state = {
            "epoch": epoch,
            "run": _settings(run),
            "model": self._model.state_dict(),
            "optimiser": self._optimiser.state_dict(),
            "generator": self._generator.get_state(),
        }
        for name, content in ((_weights(epoch), state["model"]), (STATE, state)):
            with whole_file(directory / name) as file:
                torch.save(content, file)

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self._model.load_state_dict(state["model"])
        self._optimiser.load_state_dict(state["optimiser"])
        self._generator.set_state(state["generator"])


def _resumed(directory: Path, run: TrainingRun) -> tuple[_Training, int] | None:
    """Return an interrupted training and the last epoch that it finished, if there is one."""
    path = directory / STATE
    if not path.exists():
        return None
    training = _Training(run.spec)
    try:
        state = torch.load(path, weights_only=True)
        if state["run"] != _settings(run):
            raise ValueError("it was written with other settings")
        training.load_state(state)
        epoch = int(state["epoch"])
    except Exception as error:
        # A damaged file fails in zipfile, pickle or torch, each in its own way.
        log.warning("%s cannot be used: %s; the training starts again", path, error)
        return None
    if absent := [n for n in range(epoch + 1) if not (directory / _weights(n)).exists()]:
        log.warning(
            "%s lacks the weights of epoch %d; the training starts again", directory, absent[0]
        )
        return None
    return training, epoch


def _weights(epoch: int) -> str:
    return f"index-0_epoch-{epoch}.pt"


def _settings(run: TrainingRun) -> dict[str, Any]:
    return {**asdict(run), "seed": SEED, "batch": BATCH, "lr": LEARNING_RATE, "decay": DECAY}
