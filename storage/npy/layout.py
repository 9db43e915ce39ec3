"""The tree of npy files: names of directories and files, and what they hold.

One directory per epoch::

    epoch_0200/
        per_image_curvature.npy         float32 (N,)   mean over probes of ‖Δg‖
        per_image_directional_eig.npy   float32 (N,)   mean over probes of (h v)·Δg
        per_image_labels.npy            int64   (N,)   class of each sample
        metadata.json

in data-set order, NaN where the sample's class is not active.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from daskcurv.measures import Measure

METADATA = "metadata.json"
IMPORTED_METADATA = "imported/metadata"
"""Variable of an imported store that holds the text of each epoch's metadata file."""


def documented(measures: Iterable[Measure]) -> tuple[str, ...]:
    """Return the names of what every tree has, of these measures."""
    return tuple(measure.name for measure in measures if measure.documented)


def extras(measures: Iterable[Measure]) -> tuple[str, ...]:
    """Return the names of what a tree can have beside: the other measures, and the status."""
    return (*(measure.name for measure in measures if not measure.documented), "status")


def batch_factors(measures: Iterable[Measure], batch_size: int) -> dict[str, np.float32]:
    """Return what a loss averaged over a batch divides each measure by, where it does."""
    return {
        measure.name: np.float32(batch_size**measure.gradient_power)
        for measure in measures
        if measure.gradient_power
    }


def epoch_directory(out: Path, epoch: int) -> Path:
    """Return where an epoch is exported to."""
    return out / f"epoch_{epoch:04d}"


def array_path(directory: Path, name: str) -> Path:
    """Return the file of a variable in an epoch's directory."""
    return directory / f"per_image_{name}.npy"
