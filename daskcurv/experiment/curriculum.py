"""Which classes are active at which epoch: the class order of an experiment and its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from daskcurv.config import check_positive
from daskcurv.declared import check_choices, documented, setting
from daskcurv.errors import ConfigError, DataError
from daskcurv.experiment.schedules import Steps
from daskcurv.places import leads_nowhere

Partition = Literal["entering", "trained"]
PARTITIONS: tuple[str, ...] = get_args(Partition)

TRAIN, VALIDATION = 0, 1
"""Codes of the `split` coordinate."""


@documented
@dataclass(frozen=True)
class Schedule:
    """How the number of active classes grows with the epoch.

    The checkpoint of an epoch at which classes are added holds weights that have not seen them; the
    documented table counts them as active at that epoch already.
    """

    initial_classes: int = setting(5, "number of classes that are active at epoch 0")
    class_increment: int = setting(5, "number of classes that each task adds")
    class_frequency: int = setting(200, "number of epochs per task")
    class_partition: str = setting(
        "entering",
        "entering: new classes are active from the epoch at which they are added; trained: from "
        "the next epoch on, the first that was trained on them",
        choices=PARTITIONS,
    )

    def __post_init__(self) -> None:
        check_positive(
            initial_classes=self.initial_classes,
            class_increment=self.class_increment,
            class_frequency=self.class_frequency,
        )
        check_choices(self)

    def task(self, epoch: int, num_classes: int) -> int:
        """Return how many times classes have been added by `epoch`; 0 at the start."""
        if self.class_partition == "trained":
            epoch = max(epoch - 1, 0)
        last = max(0, -(-(num_classes - self.initial_classes) // self.class_increment))
        return min(epoch // self.class_frequency, last)

    def num_active(self, epoch: int, num_classes: int) -> int:
        """Return the number of active classes at `epoch`, at most `num_classes`."""
        return min(
            num_classes, self.initial_classes + self.class_increment * self.task(epoch, num_classes)
        )

    def first_epoch_active(self, num_classes: int) -> NDArray[np.int64]:
        """Return, for each position in the class order, the first epoch at which it is active."""
        trained = self.first_epoch_trained(num_classes)
        entering = trained - 1
        return np.where((entering > 0) & (self.class_partition == "trained"), trained, entering)

    def first_epoch_trained(self, num_classes: int) -> NDArray[np.int64]:
        """Return, for each position in the class order, the first epoch that trained on it.

        Its checkpoint is the first whose weights have seen the class. The weights of epoch 0 have
        seen none, and those of an epoch at which classes are added have not seen these, whatever
        the `class_partition`.
        """
        position = np.arange(num_classes)
        task = np.maximum(0, -(-(position - self.initial_classes + 1) // self.class_increment))
        return task * self.class_frequency + 1

    def steps(self, num_classes: int, ahead: int) -> Steps:
        """Return the same schedule for checkpoints with other numbers; see `Steps.ahead`."""
        tasks = range(self.task(2**31, num_classes) + 1)
        epochs = tuple(self.class_frequency * task for task in tasks)
        counts = tuple(
            min(num_classes, self.initial_classes + self.class_increment * task) for task in tasks
        )
        return Steps(epochs, counts, self.class_partition, ahead)

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as a JSON-able dictionary."""
        return asdict(self)


@dataclass(frozen=True)
class Curriculum:
    """The classes of an experiment, in the order in which they become active.

    Attributes
    ----------
    order : tuple of int
        All classes.
    schedule : Schedule, Steps or None
        None if it is not known when they become active, as of results that were imported.
    """

    order: tuple[int, ...]
    schedule: Schedule | Steps | None = None

    @classmethod
    def of(cls, classes: Mapping[str, Any]) -> Curriculum:
        """Return what a store's identity records under ``classes``; see `to_dict`."""
        order = tuple(classes.get("order", ()))
        terms = {field.name for field in fields(Schedule)}
        if terms <= classes.keys():
            return cls(order, Schedule(**{name: classes[name] for name in terms}))
        if "counts" in classes:
            epochs, counts = tuple(classes["epochs"]), tuple(classes["counts"])
            return cls(order, Steps(epochs, counts, classes["class_partition"], classes["ahead"]))
        return cls(order)

    def to_dict(self) -> dict[str, Any]:
        """Return order and schedule as a JSON-able dictionary."""
        return {"order": list(self.order), **(self.schedule.to_dict() if self.schedule else {})}

    def task(self, epoch: int) -> int:
        """Return how many times classes have been added by `epoch`."""
        return self._known.task(epoch, len(self.order))

    def active_classes(self, epoch: int) -> tuple[int, ...]:
        """Return the classes that are active at `epoch`."""
        return self.order[: self._known.num_active(epoch, len(self.order))]

    def active(self, epoch: int, labels: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of these labels are of classes that are active at `epoch`."""
        member = np.zeros(len(self.order), dtype=bool)
        member[list(self.active_classes(epoch))] = True
        found: NDArray[np.bool_] = member[labels]
        return found

    def position(self, labels: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the position of each label in the order."""
        positions: NDArray[np.int64] = np.argsort(np.array(self.order, np.int64))[labels]
        return positions

    def first_epoch_active(self) -> NDArray[np.int64]:
        """Return the first epoch at which the class at each position is active."""
        return self._known.first_epoch_active(len(self.order))

    def first_epochs_trained(self, class_position: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Return the first epoch whose weights had been trained on each sample's class.

        Parameters
        ----------
        class_position : ndarray of int, shape (N,)
            Position of each sample's class in the order; -1 if it is not known.

        Returns
        -------
        ndarray of int64, shape (N,)
            -1 if it is unknown, because the position or the schedule is unknown.
        """
        if self.schedule is None:
            return np.full(len(class_position), -1, np.int64)
        # A position of -1 takes the last element.
        by_position = np.append(self.schedule.first_epoch_trained(len(self.order)), -1)
        first: NDArray[np.int64] = by_position[class_position]
        return first

    @property
    def _known(self) -> Schedule | Steps:
        if self.schedule is None:
            raise ConfigError("it is not known when the classes of imported results were active")
        return self.schedule


def class_order_of(experiment_index: int, num_classes: int = 100) -> NDArray[np.int64]:
    """Regenerate the class order of an experiment.

    The training run draws its seed and then a permutation from generators whose states depend on
    the experiment index alone (source: the loss-of-plasticity code, incremental CIFAR experiment).

    Parameters
    ----------
    experiment_index : int
        0 … 99,999.
    num_classes : int

    Returns
    -------
    ndarray of int64, shape (num_classes,)
        A permutation of 0 … num_classes−1; for index 0 and 100 classes it begins 8, 44, 23, 58.
    """
    if not 0 <= experiment_index < 100_000:
        raise ConfigError(f"experiment_index is {experiment_index}; expected 0 to 99999")
    import torch

    generator = torch.Generator().manual_seed(42)
    seeds = torch.randperm(100_000, generator=generator, dtype=torch.int32)
    # The run used NumPy's legacy generator; no other reproduces its permutation.
    legacy = np.random.RandomState(int(seeds[experiment_index]))
    return np.asarray(legacy.permutation(num_classes), dtype=np.int64)


def read_class_order(path: Path, num_classes: int) -> NDArray[np.int64]:
    """Read a class order from an ``.npy`` file.

    Raises
    ------
    DataError
        If the file is not a permutation of 0 … num_classes−1.
    """
    try:
        with open(path, "rb") as file:
            order = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        reason = leads_nowhere(path) or error.strerror
        raise DataError(f"class order {path} cannot be read as an .npy file: {reason}") from error
    except Exception as error:
        # A damaged header can fail in the tokenizer, the decoder or the reader.
        raise DataError(f"class order {path} cannot be read as an .npy file: {error}") from error
    if order.dtype.kind not in "iu":
        raise DataError(f"class order {path} has dtype {order.dtype}; expected integers")
    if order.shape != (num_classes,):
        raise DataError(
            f"class order {path} has shape {order.shape}; expected ({num_classes},), one entry "
            "for each output of the network"
        )
    if not np.array_equal(np.sort(order), np.arange(num_classes)):
        raise DataError(
            f"class order {path} is not a permutation of 0 … {num_classes - 1}: some class is "
            "missing, repeated or out of range"
        )
    return np.asarray(order, dtype=np.int64)


def held_out_split(labels: NDArray[np.int64], per_class: int) -> NDArray[np.uint8]:
    """Return which samples the training run held out for validation.

    Parameters
    ----------
    labels : ndarray of int64, shape (N,)
        In data-set order.
    per_class : int
        The first `per_class` samples of each class were held out.

    Returns
    -------
    ndarray of uint8, shape (N,)
        `VALIDATION` or `TRAIN`.
    """
    split = np.full(len(labels), TRAIN, dtype=np.uint8)
    for label in np.unique(labels):
        split[np.flatnonzero(labels == label)[:per_class]] = VALIDATION
    return split


def active_samples(
    first_epoch_active: NDArray[np.int64], epochs: Sequence[int], block_size: int
) -> NDArray[np.int64]:
    """Count the active samples of each block.

    Parameters
    ----------
    first_epoch_active : ndarray of int, shape (N,)
    epochs : sequence of int
    block_size : int

    Returns
    -------
    ndarray of int64, shape (epochs, blocks)
    """
    starts = np.arange(0, len(first_epoch_active), block_size)
    # The active set only changes at a few epochs; count once for each distinct set.
    changes = np.unique(first_epoch_active)
    counts = [np.zeros(len(starts), np.int64)]
    for change in changes:
        counts.append(np.add.reduceat(first_epoch_active <= change, starts, dtype=np.int64))
    return np.stack(counts)[np.searchsorted(changes, epochs, side="right")]
