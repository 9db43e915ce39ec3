"""A store made for reports: every number that it holds is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.experiment.curriculum import Schedule
from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, schema

EPOCHS = np.array([0, 3, 4, 5, 7, 10])
COUNT, PROBES = 90, 6
FIRST_TRAINED = (1, 5, 9)
"""Two classes at first, two more after epoch 4 and the last after epoch 8."""


Values = NDArray[np.float64]


class Made:
    """A store of three cohorts, and what it was filled with, as arrays (epoch, sample).

    Where weights had not been trained on a class, values are far from all others: one that is drawn
    by mistake shows.
    """

    def __init__(self, path: Path, method: str = "finite-difference"):
        generator = np.random.default_rng(1)
        schedule = Schedule(2, 2, 4)
        classes = 6
        self.label = generator.integers(0, classes, COUNT)
        order = generator.permutation(classes)
        self.position = np.argsort(order)[self.label]
        steps = self.position - schedule.initial_classes
        self.cohort = np.where(steps < 0, 0, 1 + steps // schedule.class_increment)
        self.first = schedule.class_frequency * self.cohort
        self.split = (generator.random(COUNT) < 0.3).astype(int)
        self.active = self.first <= EPOCHS[:, None]
        self.trained = self.first < EPOCHS[:, None]
        shape = self.active.shape
        self.curvature = generator.lognormal(-5, 1, shape) * (1 + self.cohort)
        self.curvature[3:, ::17] = 0
        self.square = self.curvature**2 * generator.uniform(1.1, 2, shape)
        self.loss = self.curvature ** generator.uniform(0.5, 1.5, shape) + 0.01
        for values in (self.curvature, self.square, self.loss):
            values[~self.trained] = 1e3
        columns: dict[str, Values] = {
            "curvature": self.curvature, "curvature_sq": self.square, "loss": self.loss,
        }  # fmt: skip
        for name, values in columns.items():
            columns[name] = np.where(self.active, values, np.nan).astype(np.float32)
        self.curvature, self.square, self.loss = (
            values.astype(np.float64) for values in columns.values()
        )
        self.path = path
        store = ResultsStore.create(
            path,
            identity={
                "estimator": {"method": method, "h": 0.001, "n_probes": PROBES},
                "head": "all",
                "classes": {"order": order.tolist(), **schedule.to_dict()},
                "dataset": {"num_samples": COUNT},
            },
            samples={
                "sample": np.arange(COUNT), "label": self.label, "split": self.split,
                "class_position": self.position, "first_epoch_active": self.first,
            },
            epochs={
                "epoch": EPOCHS.tolist(),
                "task": (EPOCHS // schedule.class_frequency).tolist(),
                "num_active_classes": [0] * len(EPOCHS),
                "checkpoint": [f"{epoch}.pt" for epoch in EPOCHS],
                "checkpoint_sha256": ["ab"] * len(EPOCHS),
                "checkpoint_size": [1] * len(EPOCHS),
                "checkpoint_mtime_ns": [1] * len(EPOCHS),
            },
            block_size=COUNT,
        )  # fmt: skip
        for row in range(len(EPOCHS)):
            filled: dict[str, Any] = {
                variable.name: np.full(COUNT, variable.fill, variable.dtype)
                for variable in MEASURES
            }
            filled |= {name: values[row] for name, values in columns.items()}
            status = np.where(self.active[row], schema.COMPUTED, schema.INACTIVE)
            store.write_block(row, 0, filled | {"status": status.astype(np.uint8)})
            store.set_epoch(row, complete=True)

    def mean(self, values: Values) -> Values:
        """Average over the epochs trained on, sample by sample."""
        return np.array([values[self.trained[:, sample], sample].mean() for sample in range(COUNT)])

    def quantiles(self, level: float, values: Values, member: NDArray[np.bool_]) -> Values:
        """Return a quantile at each epoch, over members trained on whose value is finite."""
        found = np.full(len(EPOCHS), np.nan)
        for row in range(len(EPOCHS)):
            some = values[row, member & self.trained[row]]
            some = some[np.isfinite(some)]
            if len(some):
                found[row] = np.quantile(some, level)
        return found
