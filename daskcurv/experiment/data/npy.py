"""NumPy arrays: an npz file, or a directory with ``images.npy`` and ``labels.npy``."""

from __future__ import annotations

import logging
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Arrays
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import exists, leads_nowhere, listed

log = logging.getLogger(__name__)

PAIRS = [
    ("train_images", "train_labels"),
    ("x_train", "y_train"),
    ("images", "labels"),
    ("data", "labels"),
]
FILES = ("images.npy", "labels.npy")
_CHANNELS = (1, 3)


def recognises_npz(path: Path) -> bool:
    """Return whether a path is an npz file, also if its name does not say so."""
    if not path.is_file():
        return False
    return path.suffix.lower() == ".npz" or any(name.endswith(".npy") for name in _members(path))


def recognises_directory(path: Path) -> bool:
    """Return whether a directory holds arrays of images or labels."""
    return any(exists(path / name, "data set file") or leads_nowhere(path / name) for name in FILES)


def read_npz(path: Path, preprocessing: Preprocessing) -> Arrays:
    """Read the pair of arrays that an npz file has under one of the usual names.

    Parameters
    ----------
    path : Path
        Holds one of `PAIRS`; other arrays, such as those of a test set, are not read.
    preprocessing : Preprocessing

    Raises
    ------
    DataError
        If it is damaged, has no such pair or several, or its arrays cannot be used.
    """
    with _explained(path), open(path, "rb") as file:
        content = np.load(file, allow_pickle=False)
        if not isinstance(content, np.lib.npyio.NpzFile):
            raise ValueError("it is one array, not an archive of several")
        with content:
            names = _pair(path, content.files)
            arrays = {name: content[name] for name in names}
    return _dataset(path, arrays, preprocessing)


def read_directory(directory: Path, preprocessing: Preprocessing) -> Arrays:
    """Read ``images.npy`` and ``labels.npy``.

    Raises
    ------
    DataError
        If one is missing or damaged, or they cannot be used.
    """
    arrays = {}
    for name in FILES:
        with _explained(directory / name), open(directory / name, "rb") as file:
            array = np.load(file, allow_pickle=False)
            if not isinstance(array, np.ndarray):
                raise ValueError("it is an archive of several arrays, not one")
            arrays[name] = array
    return _dataset(directory, arrays, preprocessing)


def _pair(path: Path, names: list[str]) -> tuple[str, str]:
    there = [pair for pair in PAIRS if set(pair) <= set(names)]
    if len(there) == 1:
        return there[0]
    pairs = " or ".join(", ".join(pair) for pair in there or PAIRS)
    if there:
        raise DataError(
            f"{path} has several pairs of images and labels: {pairs}. Save the training set alone "
            "(numpy.savez)"
        )
    raise DataError(
        f"{path} has no pair of images and labels: {listed(sorted(names)) or 'nothing'}. Save the "
        f"training set as {pairs} (numpy.savez)"
    )


def _members(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError):
        return []


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        reason = leads_nowhere(path) or getattr(error, "strerror", None) or error
        if "allow_pickle" in str(error):
            reason = "it holds Python objects, or is no file of NumPy's"
        raise DataError(
            f"{path} cannot be read: {reason}. Save the arrays again (numpy.save, numpy.savez): "
            "images as uint8, labels as integers"
        ) from error


def _dataset(path: Path, arrays: dict[str, NDArray[Any]], preprocessing: Preprocessing) -> Arrays:
    (name, stored), (labels_name, labels) = arrays.items()
    images = channels_first(f"{path}: {name}", stored)
    if labels.shape == (len(images), 1):
        labels = labels[:, 0]
    log.info("%s: %d images (%s, %s)", path, len(images), name, labels_name)
    return preprocessing.arrays(path, images, labels)


def channels_first(where: str, images: NDArray[Any]) -> NDArray[np.uint8]:
    """Return images as (N, channels, height, width), which they may be stored as or not.

    Parameters
    ----------
    where : str
        File and array, for messages.
    images : ndarray of uint8, shape (N, H, W), (N, H, W, 1 or 3) or (N, 1 or 3, H, W)

    Raises
    ------
    DataError
        If they have another shape or dtype, or the shape can be read in two ways.
    """
    if images.dtype != np.uint8:
        scaled = " (if they are scaled to 0 … 1: (images * 255).round().astype('uint8'))"
        raise DataError(
            f"{where} has dtype {images.dtype}; expected pixels as uint8, 0 … 255. Convert them"
            f"{scaled if images.dtype.kind == 'f' else ''}, and leave normalising to --mean and "
            "--std"
        )
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in _CHANNELS for axis in (1, 3))
    if first and last:
        raise DataError(
            f"{where} has shape {images.shape}: the channels could be the second axis or the last. "
            "Save the images as (N, H, W) if they are grey, or with a height and width above 3"
        )
    if not first and not last:
        raise DataError(
            f"{where} has shape {images.shape}; expected (N, H, W), (N, H, W, channels) or "
            "(N, channels, H, W), with 1 or 3 channels. Reshape the images and save them again"
        )
    return images if first else images.transpose(0, 3, 1, 2)
