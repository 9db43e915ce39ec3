"""CIFAR-100's python format.

The published data set is a directory ``cifar-100-python`` of pickles. Subsets and relabelled
variants in the same format are normal inputs.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Arrays, class_indices
from daskcurv.experiment.data.pickles import load_pickle, numbers_of, text_of
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import exists, leads_nowhere, listed, names_in

log = logging.getLogger(__name__)

MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)
"""Per-channel normalisation of the training run, on pixels scaled to 0 … 1."""

IMAGE_SHAPE = (3, 32, 32)
DIRECTORY = "cifar-100-python"
VERSION = "CIFAR-100"
_PUBLISHED_TRAIN_MD5 = "16019d7e3df5f24257cddd939b257f8d"


@dataclass(frozen=True, eq=False)
class Cifar(Arrays):
    """A training set in CIFAR-100 format; attributes as of `Dataset`, labels are the fine ones.

    Attributes
    ----------
    published : bool
        Whether the training file is byte for byte the published one.
    """

    mean: tuple[float, ...] = MEAN
    std: tuple[float, ...] = STD
    published: bool = False


def _read_pickle(path: Path, version: str) -> dict[str, Any]:
    try:
        content = load_pickle(path)
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    except Exception as error:
        # A damaged or hostile pickle can raise nearly anything; all of it means the same here.
        fetched = " (--download fetches the published one into an empty directory)"
        raise DataError(
            f"{path} cannot be read as a {version} pickle: {error or type(error).__name__}. "
            f"Replace the file{fetched if version == VERSION else ''}"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return {text_of(key): content[key] for key in content}


def _unreadable(path: Path, error: OSError) -> str:
    if where := leads_nowhere(path):
        return f"{path} cannot be read: {where}. Restore its target, or the link"
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        return f"{path} cannot be read: {error.strerror}"
    there = _names_in(path.parent)
    return (
        f"{path} does not exist; expected the files of CIFAR-100's python version (train, test, "
        "meta). Point --data_path at them, or add --download"
        + (f" (the directory has {listed(there)})" if there else "")
    )


def _names_in(directory: Path) -> list[str]:
    """Return what is in a directory, for messages; nothing where that cannot be said."""
    try:
        return names_in(directory)
    except OSError:
        return []


def recognises(directory: Path) -> bool:
    """Return whether a directory holds a training set of this format."""
    return exists(directory / "train", "data set file")


def read_cifar(directory: Path) -> Cifar:
    """Read the training set of a CIFAR-100-format directory.

    Parameters
    ----------
    directory : Path
        Holds ``train``, and ``meta`` if the classes are named.

    Returns
    -------
    Cifar

    Raises
    ------
    DataError
        If a file is missing, damaged, refers to a foreign class, or has other contents.
    """
    path = directory / "train"
    images, labels = read_file(path, "fine_labels")
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return Cifar(
        images=images,
        labels=labels,
        class_names=read_names(directory / "meta", "fine_label_names"),
        published=md5 == _PUBLISHED_TRAIN_MD5,
    )


def read_as_wished(directory: Path, preprocessing: Preprocessing) -> Cifar:
    """Read it as `read_cifar` does, and have it normalised and resized as the user asks."""
    held = read_cifar(directory)
    mean, std = preprocessing.normalisation(directory, held.images.shape[1])
    images = preprocessing.resized(held.images)
    keys = None if images is held.images else held.keys()
    return replace(held, images=images, mean=mean, std=std, original_keys=keys)


def read_file(
    path: Path, labels_name: str, version: str = VERSION
) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Read images and labels of one pickle.

    Parameters
    ----------
    path : Path
    labels_name : str
        The key of the labels.
    version : str
        What the data set is called in messages.

    Returns
    -------
    images : ndarray of uint8, shape (N, 3, 32, 32)
    labels : ndarray of int64, shape (N,)

    Raises
    ------
    DataError
        If the file is missing, damaged, refers to a foreign class, or has other contents.
    """
    content = _read_pickle(path, version)
    for key in ("data", labels_name):
        if key not in content:
            raise DataError(
                f"{path} has no {key!r}; expected 'data' and {labels_name!r} (it has: "
                f"{', '.join(sorted(content))})"
            )
    data = numbers_of(path, "data", content["data"])
    labels = numbers_of(path, labels_name, content[labels_name])
    if data.ndim != 2 or data.shape[1] != np.prod(IMAGE_SHAPE) or data.dtype != np.uint8:
        raise DataError(
            f"{path}: 'data' has shape {data.shape} and dtype {data.dtype}; expected (N, 3072) "
            "and uint8"
        )
    if len(data) == 0:
        raise DataError(f"{path} holds no samples")
    labels = class_indices(f"{path}: {labels_name!r}", labels, len(data))
    return np.ascontiguousarray(data).reshape(-1, *IMAGE_SHAPE), labels


def read_names(meta: Path, key: str, version: str = VERSION) -> tuple[str, ...]:
    """Read the names of the classes, if there is a file with them.

    Raises
    ------
    DataError
        If it is damaged, refers to a foreign class, or has something else in their place.
    """
    if not exists(meta, "data set file") and not leads_nowhere(meta):
        return ()
    names = _read_pickle(meta, version).get(key, [])
    if not isinstance(names, list | tuple):
        raise DataError(f"{meta}: {key!r} is {names!r:.60}; expected a list of names")
    return tuple(map(text_of, names))


def download(directory: Path) -> None:
    """Fetch CIFAR-100 with torchvision, unless `directory` already has it.

    Parameters
    ----------
    directory : Path
        Must be called ``cifar-100-python``, the name inside the published archive.
    """
    if recognises(directory):
        return
    # What is there may be the user's own data set, which the published one must not replace.
    if alike := [name for name in _names_in(directory) if name.casefold().startswith("train")]:
        raise DataError(
            f"--download would put the published data set beside {listed(alike)} of {directory}, "
            "which cannot be read as train. Rename or restore it, or choose another "
            "--data_path"
        )
    if directory.name != DIRECTORY:
        raise DataError(
            f"--download unpacks a directory called {DIRECTORY!r}; --data_path is {directory}. "
            f"Use --data_path {directory / DIRECTORY}"
        )
    from torchvision.datasets import CIFAR100

    log.info("downloading CIFAR-100 into %s", directory.parent)
    try:
        CIFAR100(directory.parent, train=True, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        raise DataError(
            f"CIFAR-100 could not be downloaded into {directory.parent}: {error}. Fetch the python "
            f"version elsewhere and unpack it as {directory}"
        ) from error
