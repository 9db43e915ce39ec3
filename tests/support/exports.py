"""A store whose export is known to the last number."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, schema

N, BLOCK = 10, 4
ORDER = [3, 1, 4, 0, 2]
LABELS = np.array([3, 1, 4, 0, 2, 2, 0, 4, 1, 3])
ACTIVE_CLASSES = {0: 2, 200: 4, 1000: 5}


def active(epoch: int) -> np.ndarray:
    return np.isin(LABELS, ORDER[: ACTIVE_CLASSES[epoch]])


def epoch_values(epoch: int) -> dict[str, np.ndarray]:
    """What the store holds for an epoch: random, and the fill values where not active."""
    generator = np.random.default_rng(epoch)
    values = {
        variable.name: generator.normal(size=N).astype(variable.dtype) for variable in MEASURES
    }
    values["prediction"] = generator.integers(0, 5, N).astype(np.int16)
    for variable in MEASURES:
        values[variable.name][~active(epoch)] = variable.fill
    values["status"] = np.where(active(epoch), schema.COMPUTED, schema.INACTIVE).astype(np.uint8)
    return values


def write_epoch(store: ResultsStore, epoch: int, values: dict[str, np.ndarray]) -> None:
    for block in range(store.num_blocks):
        start, stop = store.bounds(block)
        store.write_block(
            store.rows[epoch], block, {name: column[start:stop] for name, column in values.items()}
        )


def make_store(path: Path, finished: tuple[int, ...] = (0, 200, 1000), h: float = 0.001) -> Path:
    epochs = list(ACTIVE_CLASSES)
    store = ResultsStore.create(
        path,
        identity={"estimator": {"h": h}, "classes": {"order": ORDER}},
        samples={
            "sample": np.arange(N),
            "label": LABELS,
            "split": np.zeros(N),
            "class_position": np.argsort(ORDER)[LABELS],
            "first_epoch_active": np.zeros(N),
        },
        epochs={
            "epoch": epochs,
            "task": [0, 1, 2],
            "num_active_classes": list(ACTIVE_CLASSES.values()),
            "checkpoint": [f"index-0_epoch-{epoch}.pt" for epoch in epochs],
            "checkpoint_sha256": [f"{epoch:064x}" for epoch in epochs],
            "checkpoint_size": [1, 2, 3],
            "checkpoint_mtime_ns": [1, 2, 3],
        },
        block_size=BLOCK,
    )
    for epoch in finished:
        write_epoch(store, epoch, epoch_values(epoch))
        store.set_epoch(
            store.rows[epoch], complete=True, compute_seconds=12.25 + epoch, num_workers=3
        )
    return path
