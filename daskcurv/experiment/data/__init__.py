"""Training sets: one module a format.

A format is what it is called and two functions: one that recognises it by what is there, and one
that reads it as a `Dataset`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from daskcurv.errors import DataError
from daskcurv.experiment.data import cifar, cifar10, folders, idx, npy, parquet
from daskcurv.experiment.data.dataset import Arrays, Dataset
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import exists, leads_nowhere, listed, names_in


@dataclass(frozen=True)
class Format:
    """A way in which training sets are stored.

    Attributes
    ----------
    description : str
        What it is called and what it consists of, for the list of those that are accepted.
    recognises : callable
        Whether a path holds a training set of this format.
    read : callable
        Reads it, normalised and resized as asked; raises `DataError` if it is damaged, or not as
        documented.
    mean, std : tuple of float, optional
        The normalisation if the user gives none; it has to be given without.
    """

    description: str
    recognises: Callable[[Path], bool]
    read: Callable[[Path, Preprocessing], Dataset]
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None


def _is_cifar100(path: Path) -> bool:
    # A directory of that name is where others keep the images of their training set.
    return cifar.recognises(path) and not (path / "train").is_dir()


FORMATS = [
    Format(
        "CIFAR-100's python version (train, meta; --download fetches it)",
        _is_cifar100,
        cifar.read_as_wished,
        cifar.MEAN,
        cifar.STD,
    ),
    Format(
        "CIFAR-10's python version (data_batch_1 … data_batch_5, batches.meta)",
        cifar10.recognises,
        cifar10.read,
    ),
    Format(
        "MNIST's idx files (train-images-idx3-ubyte, train-labels-idx1-ubyte, or .gz)",
        idx.recognises,
        idx.read,
    ),
    Format("an npz file (images, labels)", npy.recognises_npz, npy.read_npz),
    Format("NumPy arrays (images.npy, labels.npy)", npy.recognises_directory, npy.read_directory),
    Format("a Parquet file or several (columns image, label)", parquet.recognises, parquet.read),
    Format("class folders (CLASS/IMAGE.png, or in train)", folders.recognises, folders.read),
]


def read_dataset(
    path: Path,
    *,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    image_size: int | None = None,
) -> Dataset:
    """Read a training set in any of the formats.

    Parameters
    ----------
    path : Path
    mean, std : float or sequence of float, optional
        For each channel, or one for all: the normalisation of the training run, on pixels scaled to
        0 … 1. Required unless the format has its own.
    image_size : int, optional
        Resize the shorter side of each image to this, and crop the centre to a square.

    Returns
    -------
    Dataset

    Raises
    ------
    DataError
        If it is in none of the formats, cannot be read, or the values do not fit it.
    """
    form = _format_of(path)
    mean, std = form.mean if mean is None else mean, form.std if std is None else std
    return form.read(path, Preprocessing.of(path, mean, std, image_size))


def recognised(path: Path) -> Format | None:
    """Return the format that a path is in by its content, or None if it is in none."""
    return next((form for form in FORMATS if form.recognises(path)), None)


def _format_of(path: Path) -> Format:
    # Nothing there, or a link that leads nowhere, is taken for the data set of the default path.
    if not exists(path, "data set") or leads_nowhere(path / "train"):
        return FORMATS[0]
    if form := recognised(path):
        return form
    raise DataError(
        f"{path} is in none of the formats of training sets: "
        f"{'; '.join(form.description for form in FORMATS)}. Point --data_path at one "
        f"({_contents(path)})"
    )


def _contents(path: Path) -> str:
    if not path.is_dir():
        return "this is a file"
    return f"the directory has {listed(names_in(path)) or 'nothing'}"


__all__ = ["FORMATS", "Arrays", "Dataset", "Format", "Preprocessing", "read_dataset", "recognised"]
