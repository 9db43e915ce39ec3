"""A small store of results, filled with numbers that are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from daskcurv.experiment.curriculum import Schedule
from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, schema

N, BLOCK, CLASSES = 11, 4, 5
LABELS = np.arange(N) % CLASSES
IDENTITY = {
    "estimator": {"method": "finite-difference", "h": 0.001, "n_probes": 10},
    "head": "all",
    "classes": {"order": [0, 1, 2, 3, 4], "initial": 2},
}
PER_SAMPLE = [*(variable.name for variable in MEASURES), "status"]


def sample_columns() -> dict[str, np.ndarray]:
    return {
        "sample": np.arange(N),
        "label": LABELS,
        "split": np.arange(N) % 2,
        "class_position": LABELS[::-1],
        "first_epoch_active": 100 * LABELS,
        "sample_key": np.array([f"{number:032x}" for number in range(N)], object),
        "sample_name": np.array([f"é/{number}.png" for number in range(N)], object),
    }


def epoch_columns(*epochs: int) -> dict[str, list[Any]]:
    return {
        "epoch": list(epochs),
        "task": [epoch // 100 for epoch in epochs],
        "num_active_classes": [2 + epoch // 100 for epoch in epochs],
        "checkpoint": [f"index-0_epoch-{epoch}.pt" for epoch in epochs],
        "checkpoint_sha256": [f"{epoch:064x}" for epoch in epochs],
        "checkpoint_size": [1000 + epoch for epoch in epochs],
        "checkpoint_mtime_ns": [1_700_000_000_123_456_789 + epoch for epoch in epochs],
    }


def make_store(path: Path, *epochs: int, **options: Any) -> ResultsStore:
    options = {"identity": IDENTITY, "block_size": BLOCK, **options}
    return ResultsStore.create(
        path, samples=sample_columns(), epochs=epoch_columns(*epochs), **options
    )


def block_values(
    store: ResultsStore, block: int, seed: int = 0, active: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Random values for a block; by default its last sample is inactive."""
    start, stop = store.bounds(block)
    generator = np.random.default_rng([seed, block])
    values: dict[str, np.ndarray] = {
        variable.name: generator.normal(size=stop - start).astype(variable.dtype)
        for variable in store.measures
    }
    values["prediction"] = generator.integers(0, CLASSES, stop - start).astype(np.int16)
    values["status"] = np.full(stop - start, schema.COMPUTED, np.uint8)
    inactive = np.arange(stop - start) == stop - start - 1
    if active is not None:
        inactive = ~active[start:stop]
    for variable in store.measures:
        values[variable.name][inactive] = variable.fill
    values["status"][inactive] = schema.INACTIVE
    return values


def inactive_values(count: int) -> dict[str, np.ndarray]:
    values: dict[str, np.ndarray] = {
        variable.name: np.full(count, variable.fill, variable.dtype) for variable in MEASURES
    }
    values["status"] = np.full(count, schema.INACTIVE, np.uint8)
    return values


def fill_row(
    store: ResultsStore, row: int, active: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Write all blocks of a row; return what they hold, joined."""
    blocks = [block_values(store, block, row, active) for block in range(store.num_blocks)]
    for block, values in enumerate(blocks):
        store.write_block(row, block, values)
    return {name: np.concatenate([values[name] for values in blocks]) for name in PER_SAMPLE}


def finish(store: ResultsStore) -> ResultsStore:
    """Write what is active by the store's coordinates, and mark all epochs as complete."""
    active = sample_columns()["first_epoch_active"]
    for row, epoch in enumerate(store.epochs):
        fill_row(store, row, active <= epoch)
        store.set_epoch(row, complete=True)
    return store


def files_below(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


def chunk(store: ResultsStore, name: str, row: int, block: int) -> Path:
    return store.path / name / "c" / str(row) / str(block)


def scheduled(path: Path, *epochs: int, partition: str = "entering") -> Path:
    """A finished store whose identity records its schedule, as those of launches do."""
    schedule = Schedule(2, 2, 100, partition)
    classes = {"order": list(range(CLASSES)), **schedule.to_dict()}
    return finish(make_store(path, *epochs, identity={**IDENTITY, "classes": classes})).path
