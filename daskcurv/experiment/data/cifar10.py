"""CIFAR-10's python format: a directory of pickles, one for each batch of the training set."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from daskcurv.errors import DataError
from daskcurv.experiment.data.cifar import read_file, read_names
from daskcurv.experiment.data.dataset import Arrays
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import exists, leads_nowhere

log = logging.getLogger(__name__)

VERSION = "CIFAR-10"
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]


def recognises(directory: Path) -> bool:
    """Return whether a directory holds a training set of this format."""
    return any(_is_there(directory / name) for name in (*BATCHES, "batches.meta"))


def read(directory: Path, preprocessing: Preprocessing) -> Arrays:
    """Read the batches that are there, in their order.

    Parameters
    ----------
    directory : Path
        Holds ``data_batch_1`` … ``data_batch_5`` or consecutive ones of them, and ``batches.meta``
        if the classes are named.
    preprocessing : Preprocessing

    Raises
    ------
    DataError
        If a batch between others is missing, or a file is damaged, refers to a foreign class, or
        has other contents.
    """
    there = [number for number, name in enumerate(BATCHES) if _is_there(directory / name)]
    if not there:
        raise DataError(
            f"{directory} has batches.meta but none of CIFAR-10's training batches; put "
            f"{BATCHES[0]} … {BATCHES[-1]} there"
        )
    chosen = BATCHES[there[0] : there[-1] + 1]
    if absent := [name for name in chosen if not _is_there(directory / name)]:
        raise DataError(
            f"{directory} has no {', '.join(absent)}, but batches before and after it; expected "
            "consecutive ones. Put it there, or take those after it away"
        )
    parts = [read_file(directory / name, "labels", VERSION) for name in chosen]
    log.info(
        "%s: %d of CIFAR-10's %d training batches (%s)",
        directory,
        len(chosen),
        len(BATCHES),
        ", ".join(chosen),
    )
    images, labels = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    names = read_names(directory / "batches.meta", "label_names", VERSION)
    return preprocessing.arrays(directory, images, labels, names)


def _is_there(path: Path) -> bool:
    # A link to nothing is a batch that is to be restored, not one that was never there.
    return exists(path, "data set file") or bool(leads_nowhere(path))
