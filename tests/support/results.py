"""Results that were never computed, for what is asked of results."""

from __future__ import annotations

import numpy as np
import xarray as xr

from daskcurv.storage.schema import COMPUTED, INACTIVE, MISSING

EPOCHS, SAMPLES, CLASSES = 7, 40, 6


def results(seed: int = 0, with_nan: bool = False) -> xr.Dataset:
    """Classes arrive in twos at epochs 0, 400 and 800, and are trained on from the epoch after.

    A sample is never active, one is missing.
    """
    generator = np.random.default_rng(seed)
    epoch = 200 * np.arange(EPOCHS)
    label = generator.integers(0, CLASSES, SAMPLES)
    position = np.argsort(generator.permutation(CLASSES))[label]
    first = 400 * (position // 2)
    first[0] = 10_000
    trained = first + 1
    status = np.where(first[None, :] <= epoch[:, None], COMPUTED, INACTIVE).astype(np.uint8)
    status[3, 5] = MISSING
    shape = status.shape
    # Values where nothing was computed must not matter, whatever they are.
    columns = {
        name: generator.uniform(0.1, 2, shape).astype(np.float32)
        for name in ("curvature", "loss", "grad_norm")
    }
    if with_nan:
        for values in columns.values():
            values[4, 7:9] = np.nan
    columns["prediction"] = np.where(
        generator.random(shape) < 0.5, label, generator.integers(0, CLASSES, shape)
    ).astype(np.int16)
    return xr.Dataset(
        {name: (("epoch", "sample"), values) for name, values in columns.items()}
        | {"status": (("epoch", "sample"), status)},
        coords={
            "epoch": epoch,
            "sample": np.arange(SAMPLES),
            "label": ("sample", label),
            "class_name": ("sample", np.array(list("abcdef"))[label]),
            "class_position": ("sample", position),
            "first_epoch_active": ("sample", first),
            "first_epoch_trained": ("sample", trained),
            "trained": (("epoch", "sample"), epoch[:, None] >= trained[None, :]),
            "split": ("sample", generator.integers(0, 2, SAMPLES)),
            "task": ("epoch", epoch // 400),
        },
    )
