"""Class folders: a directory for each class, with its images."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Dataset
from daskcurv.experiment.data.decoding import SUFFIXES
from daskcurv.experiment.data.encoded import read_encoded
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import listed

log = logging.getLogger(__name__)

_SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval"}


def recognises(path: Path) -> bool:
    """Return whether a path has directories with images, or its ``train`` has."""
    return _has_classes(path)


def read(path: Path, preprocessing: Preprocessing) -> Dataset:
    """Read the images of all classes; a class's label is its place among the sorted names.

    Parameters
    ----------
    path : Path
        Holds a directory for each class, or ``train`` that does. Images can be in directories
        within that of their class; those of a class are in the order of their paths. Names that
        begin with a dot do not count.
    preprocessing : Preprocessing

    Raises
    ------
    DataError
        If a class has no images, a directory cannot be listed, the directories are parts of a data
        set rather than classes, or the images cannot be used.
    """
    root = path
    if _has_classes(path / "train"):
        root = path / "train"
        log.info("%s: the training set is in train", path)
    classes = _directories(root)
    if all(directory.name.casefold() in _SPLITS for directory in classes):
        raise DataError(
            f"the directories of {root} are parts of a data set by their names, not classes: "
            f"{listed([directory.name for directory in classes])}. Point --data_path at the one "
            "with the class folders of the training set, or call that train"
        )
    images: list[str] = []
    labels: list[int] = []
    empty: list[str] = []
    others = 0
    for label, directory in enumerate(classes):
        files = sorted(_files(directory), key=lambda file: file.parts)
        found = [file for file in files if _is_image(file)]
        others += len(files) - len(found)
        images += [file.relative_to(root).as_posix() for file in found]
        labels += [label] * len(found)
        empty += [] if found else [directory.name]
    if empty:
        raise DataError(
            f"{root} has directories without images among its {len(classes)} class folders: "
            f"{listed(empty)}. Take them away, or put images there "
            f"({', '.join(sorted(s.removeprefix('.') for s in SUFFIXES))})"
        )
    names = [directory.name for directory in classes]
    log.info("%s: %d images in %d class folders (%s)", root, len(images), len(names), listed(names))
    if others:
        log.info("%s: %d files in class folders are not images by their names", root, others)
    below = "" if root == path else f"{root.name}/"
    return read_encoded(
        root,
        _Files(root, images),
        np.array(labels, np.int64),
        preprocessing,
        tuple(names),
        tuple(below + _text(file) for file in images),
    )


@dataclass(frozen=True)
class _Files:
    """Image files; see `Sources`. As text, as a million paths take a gigabyte."""

    root: Path
    files: list[str]

    def __len__(self) -> int:
        return len(self.files)

    def encoded(self, i: int) -> Path:
        return self.root / self.files[i]

    def called(self, i: int) -> str:
        return self.files[i]

    def stamp(self, i: int) -> str:
        status = self.encoded(i).stat()
        return f"{_text(self.files[i])} {status.st_size} {status.st_mtime_ns}"


def _text(name: str) -> str:
    """Return a name as text that can be stored, also if its bytes are not UTF-8."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def _has_classes(root: Path) -> bool:
    if not root.is_dir():
        return False
    return any(_is_image(file) for directory in _directories(root) for file in _files(directory))


def _directories(root: Path) -> list[Path]:
    try:
        paths = sorted(root.iterdir())
    except OSError as error:
        raise _unlisted(error) from error
    return [path for path in paths if path.is_dir() and not path.name.startswith(".")]


def _files(directory: Path) -> Iterator[Path]:
    """Yield what is in a directory and those within it."""

    def fail(error: OSError) -> None:
        raise _unlisted(error) from error

    for parent, below, files in os.walk(directory, onerror=fail, followlinks=True):
        below[:] = [name for name in below if not name.startswith(".")]
        yield from (Path(parent, name) for name in files if not name.startswith("."))


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in SUFFIXES


def _unlisted(error: OSError) -> DataError:
    return DataError(
        f"{error.filename} cannot be listed: {error.strerror}. Change its permissions, or take it "
        "out of the data set"
    )
