"""When classes become active, other than by equal increments.

`Steps` has what `daskcurv.experiment.curriculum.Schedule` has, for tasks of any size and length. A
training run that has all its classes from the start is one of a single step.
"""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import ConfigError, DataError


@dataclass(frozen=True)
class Steps:
    """A number of active classes from each of some epochs on.

    Attributes
    ----------
    epochs : tuple of int
        The first is 0; increasing.
    counts : tuple of int
        Active classes from each epoch on; increasing.
    class_partition : {"entering", "trained"}
        See `daskcurv.experiment.curriculum.Schedule`.
    ahead : int
        How many epochs more than its number a checkpoint has been trained for: 1 where it has the
        number of the last epoch, counted from 0.
    """

    epochs: tuple[int, ...]
    counts: tuple[int, ...]
    class_partition: str = "entering"
    ahead: int = 0

    def __post_init__(self) -> None:
        for name, values, least in (("epochs", self.epochs, 0), ("classes", self.counts, 1)):
            if not values or values[0] < least or any(np.diff(values) <= 0):
                raise ConfigError(
                    f"the {name} of the class schedule are {', '.join(map(str, values))}; expected "
                    f"increasing numbers from {least}"
                )
        if self.epochs[0] != 0:
            raise ConfigError(
                f"the class schedule begins at epoch {self.epochs[0]}; expected a row for epoch 0"
            )
        if len(self.epochs) != len(self.counts):
            raise ConfigError("the class schedule needs a number of classes for each epoch")

    def task(self, epoch: int, num_classes: int) -> int:
        """Return how many times classes have been added by `epoch`; 0 at the start."""
        epoch += self.ahead
        if self.class_partition == "trained":
            epoch = max(epoch - 1, 0)
        return int(np.searchsorted(self.epochs, epoch, side="right")) - 1

    def num_active(self, epoch: int, num_classes: int) -> int:
        """Return the number of active classes at `epoch`, at most `num_classes`."""
        return min(num_classes, self.counts[self.task(epoch, num_classes)])

    def first_epoch_active(self, num_classes: int) -> NDArray[np.int64]:
        """Return, for each position in the class order, the first epoch at which it is active."""
        entering = self._starts(num_classes)
        late = (entering > 0) & (self.class_partition == "trained")
        active: NDArray[np.int64] = np.where(late, entering + 1, entering) - self.ahead
        return np.maximum(active, 0)

    def first_epoch_trained(self, num_classes: int) -> NDArray[np.int64]:
        """Return, for each position in the class order, the first epoch that trained on it."""
        trained: NDArray[np.int64] = np.maximum(self._starts(num_classes) + 1 - self.ahead, 0)
        return trained

    def _starts(self, num_classes: int) -> NDArray[np.int64]:
        """Return after how many epochs the class at each position is added."""
        if num_classes > self.counts[-1]:
            raise ConfigError(
                f"the class schedule ends with {self.counts[-1]} classes, but the network has "
                f"{num_classes} outputs; add what is missing"
            )
        step = np.searchsorted(self.counts, np.arange(num_classes), side="right")
        return np.asarray(self.epochs, dtype=np.int64)[step]

    def to_dict(self) -> dict[str, Any]:
        """Return the schedule as a JSON-able dictionary."""
        return {
            "epochs": list(self.epochs),
            "counts": list(self.counts),
            "class_partition": self.class_partition,
            "ahead": self.ahead,
        }


def of_tasks(sizes: tuple[int, ...], length: int, class_partition: str) -> Steps:
    """Return the schedule of tasks that add `sizes` classes each and last `length` epochs."""
    if min(sizes) < 1 or length < 1:
        raise ConfigError(
            f"task_sizes {', '.join(map(str, sizes))} with {length} epochs each; expected numbers "
            "from 1"
        )
    starts = tuple(length * number for number in range(len(sizes)))
    return Steps(starts, tuple(np.cumsum(sizes).tolist()), class_partition)


def read_steps(path: Path, class_partition: str) -> Steps:
    """Read a class schedule: a CSV file with the columns ``epoch`` and ``classes``.

    Raises
    ------
    DataError
        If it cannot be read as one.
    """
    try:
        with open(path, newline="") as file:
            rows = list(csv.DictReader(file))
        epochs, counts = (tuple(int(row[name]) for row in rows) for name in ("epoch", "classes"))
    except OSError as error:
        raise DataError(f"class schedule {path} cannot be read: {error.strerror}") from error
    except (KeyError, TypeError, ValueError, csv.Error) as error:
        raise DataError(
            f"class schedule {path} cannot be read: {error!r}. Expected a CSV file whose first "
            "line is epoch,classes, and then whole numbers such as 0,50"
        ) from error
    return Steps(epochs, counts, class_partition)
