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

from pathlib import Path

METADATA = "metadata.json"
IMPORTED_METADATA = "imported/metadata"
"""Variable of an imported store that holds the text of each epoch's metadata file."""

GRADIENT_POWERS = {"curvature": 1, "directional_eig": 1, "curvature_sq": 2, "grad_norm": 1}
"""The power of the batch size by which a mean-reduced loss would have divided each measure."""
DOCUMENTED = ("curvature", "directional_eig")
EXTRAS = ("curvature_sq", "loss", "grad_norm", "prediction", "status")


def epoch_directory(out: Path, epoch: int) -> Path:
    """Return where an epoch is exported to."""
    return out / f"epoch_{epoch:04d}"


def array_path(directory: Path, name: str) -> Path:
    """Return the file of a variable in an epoch's directory."""
    return directory / f"per_image_{name}.npy"
