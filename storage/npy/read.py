"""A tree of npy files, as older scripts and `daskcurv.storage.npy.write` write it, read in."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv import measures as table
from daskcurv.errors import DataError
from daskcurv.storage import schema
from daskcurv.storage.npy.layout import METADATA, array_path, documented, extras


def _dtype(name: str) -> np.dtype[Any]:
    if name in ("labels", "sample_ids"):
        return np.dtype(np.int64)
    return np.dtype(_variable(name).dtype)


def _fill(name: str) -> Any:
    return schema.INACTIVE if name == "status" else _variable(name).fill


def _variable(name: str) -> schema.Variable:
    return next(one for one in schema.per_sample(table.MEASURES) if one.name == name)


@dataclass(frozen=True)
class EpochFiles:
    """One epoch's directory.

    Attributes
    ----------
    directory : Path
    epoch : int
    text : str
        Of ``metadata.json``.
    metadata : dict
        What that says.
    classes : list of int
        The active ones, in class order.
    """

    directory: Path
    epoch: int
    text: str
    metadata: dict[str, Any]
    classes: list[int]


@dataclass(frozen=True)
class Tree:
    """A whole tree, its epochs consistent with each other.

    Attributes
    ----------
    epochs : list of EpochFiles
        In order.
    inactive : {"nan", "zero", "drop"}
        What samples of inactive classes have; as for `export_epoch`.
    extras : tuple of str
        Variables there are beside the documented ones.
    labels : ndarray of int64, shape (N,)
        −1 where no epoch tells.
    first_active : ndarray of int64, shape (N,)
        First epoch at which the sample is active; −1 if it never is.
    """

    epochs: list[EpochFiles]
    inactive: str
    extras: tuple[str, ...]
    labels: NDArray[np.int64]
    first_active: NDArray[np.int64]

    @property
    def order(self) -> list[int]:
        """The class order: that of the last epoch, then classes that are never active."""
        active = self.epochs[-1].classes
        count = max([*active, int(self.labels.max())]) + 1
        return [*active, *(label for label in range(count) if label not in active)]

    def active(self, epoch: int) -> NDArray[np.bool_]:
        """Return which samples are active at an epoch."""
        active: NDArray[np.bool_] = (self.first_active >= 0) & (self.first_active <= epoch)
        return active


def read_tree(path: Path) -> Tree:
    """Read everything of a tree but its values.

    Parameters
    ----------
    path : Path
        Holds ``epoch_…`` directories.

    Returns
    -------
    Tree

    Raises
    ------
    DataError
        Naming the first file that is absent, damaged, or does not fit the others.
    """
    if not path.is_dir():
        raise DataError(f"{path} is not a directory; name one that holds epoch_… directories")
    directories = [entry for entry in path.glob("epoch_*") if entry.is_dir()]
    if not directories:
        raise DataError(f"{path} has no epoch_… directory; name one that holds them")
    epochs = sorted((_read_metadata(one) for one in directories), key=lambda files: files.epoch)
    for before, after in pairwise(epochs):
        if before.epoch == after.epoch:
            raise DataError(
                f"{before.directory} and {after.directory} are both epoch {after.epoch}"
            )
        if after.classes[: len(before.classes)] != before.classes:
            raise DataError(
                f"{after.directory / METADATA} has allowed_classes that do not begin with those of "
                f"epoch {before.epoch}; expected classes to be added at the end only"
            )
    first = epochs[0].directory
    filtered = array_path(first, "sample_ids").exists()
    found = tuple(name for name in extras(table.MEASURES) if array_path(first, name).exists())
    labels, first_active = (_read_filtered if filtered else _read_full)(epochs)
    tree = Tree(epochs, "drop" if filtered else "nan", found, labels, first_active)
    if not filtered and _has_zeros(tree):
        tree = Tree(epochs, "zero", found, labels, first_active)
    return tree


def read_values(tree: Tree, files: EpochFiles) -> dict[str, NDArray[Any]]:
    """Read an epoch's values.

    Returns
    -------
    dict
        For each variable that there is, shape (N,) and with the store's fill value where the sample
        is not active.

    Raises
    ------
    DataError
    """
    active = tree.active(files.epoch)
    count = int(active.sum()) if tree.inactive == "drop" else len(active)
    for name in extras(table.MEASURES):
        if array_path(files.directory, name).exists() != (name in tree.extras):
            raise DataError(
                f"{array_path(files.directory, name)} is there at some epochs and absent at others"
            )
    values = {}
    for name in (*documented(table.MEASURES), *tree.extras):
        path = array_path(files.directory, name)
        column = np.full(len(active), _fill(name), _dtype(name))
        found = _load(path, name, count)
        if tree.inactive == "drop":
            column[active] = found
        else:
            column[active] = found[active]
            _check_inactive(path, name, found[~active], tree.inactive)
        if name == "curvature" and np.isnan(column[active]).any():
            raise DataError(
                f"{path} has NaN for {np.isnan(column[active]).sum()} samples of allowed_classes; "
                "expected a value for each of them"
            )
        values[name] = column
    status = np.where(active, schema.COMPUTED, schema.INACTIVE).astype(np.uint8)
    if tree.inactive == "drop":
        values["status"] = status
    elif not np.array_equal(values.setdefault("status", status), status):
        path = array_path(files.directory, "status")
        raise DataError(f"{path} does not agree with allowed_classes of {METADATA}")
    return values


def _read_metadata(directory: Path) -> EpochFiles:
    path = directory / METADATA
    number = directory.name.removeprefix("epoch_")
    try:
        text = path.read_bytes().decode()
        metadata = json.loads(text)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as JSON: {error}; restore it, or move {directory} away"
        ) from error
    if not isinstance(metadata, dict):
        raise DataError(f"{path} holds no JSON object; expected one with epoch and allowed_classes")
    if not number.isdecimal() or metadata.get("epoch") != int(number):
        raise DataError(
            f"{path} has epoch {metadata.get('epoch')!r}; expected the number in the name of its "
            f"directory, {directory.name}"
        )
    classes = metadata.get("allowed_classes")
    numbers = isinstance(classes, list) and all(type(c) is int and c >= 0 for c in classes)
    if not isinstance(classes, list) or not numbers or len({*classes}) != len(classes):
        raise DataError(f"{path} has no list of distinct class numbers under allowed_classes")
    return EpochFiles(directory, int(number), text, metadata, classes)


def _read_full(epochs: list[EpochFiles]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return label and first active epoch of each sample."""
    labels = _load(array_path(epochs[0].directory, "labels"), "labels")
    if len(labels) == 0 or labels.min() < 0:
        raise DataError(f"{array_path(epochs[0].directory, 'labels')} needs labels from 0 on")
    first_active = np.full(len(labels), -1)
    for files in epochs:
        path = array_path(files.directory, "labels")
        if array_path(files.directory, "sample_ids").exists():
            raise DataError(f"{files.directory} has sample ids, and {epochs[0].directory} has not")
        if not np.array_equal(_load(path, "labels", len(labels)), labels):
            raise DataError(f"{path} differs from that of epoch {epochs[0].epoch}")
        first_active[np.isin(labels, files.classes) & (first_active < 0)] = files.epoch
    return labels, first_active


def _read_filtered(epochs: list[EpochFiles]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the same, from epochs that hold active samples only."""
    totals = [files.metadata.get("total_samples") for files in epochs]
    known = [total for total in totals if type(total) is int]
    ids = [_sample_ids(files) for files in epochs]
    count = max([*known, *(int(one[-1]) + 1 for one in ids if len(one))], default=0)
    if not any(len(one) for one in ids):
        raise DataError(f"no epoch of {epochs[0].directory.parent} holds a sample")
    labels, first_active = np.full(count, -1), np.full(count, -1)
    for files, rows in zip(epochs, ids, strict=True):
        path = array_path(files.directory, "labels")
        found = _load(path, "labels", len(rows))
        if (strange := ~np.isin(found, files.classes)).any():
            raise DataError(f"{path} has label {found[strange][0]}, not one of allowed_classes")
        if ((labels[rows] >= 0) & (labels[rows] != found)).any():
            raise DataError(f"{path} gives samples other labels than epochs before")
        labels[rows] = found
        first_active[rows[first_active[rows] < 0]] = files.epoch
        if len(rows) != (first_active >= 0).sum():
            raise DataError(
                f"{array_path(files.directory, 'sample_ids')} lacks samples that epochs before had"
            )
    return labels, first_active


def _sample_ids(files: EpochFiles) -> NDArray[np.int64]:
    path = array_path(files.directory, "sample_ids")
    ids = _load(path, "sample_ids")
    if len(ids) and (ids[0] < 0 or (np.diff(ids) <= 0).any()):
        raise DataError(f"{path} has numbers below 0, repeated or out of order")
    return ids


def _load(path: Path, name: str, length: int | None = None) -> NDArray[Any]:
    """Read a one-dimensional array of the documented type, and of a length if one is given."""
    try:
        values = np.load(path, allow_pickle=False)
    except FileNotFoundError as error:
        raise DataError(f"{path} does not exist; each epoch needs it") from error
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as an npy file: {error}") from error
    if not isinstance(values, np.ndarray) or values.dtype != _dtype(name) or values.ndim != 1:
        found = getattr(values, "dtype", "no array"), getattr(values, "shape", ())
        raise DataError(
            f"{path} holds {found[0]} of shape {found[1]}; expected {_dtype(name)}, (N,)"
        )
    if length is not None and len(values) != length:
        raise DataError(f"{path} has {len(values)} values; expected {length}")
    return values


def _has_zeros(tree: Tree) -> bool:
    """Return whether inactive samples have zeros, by the first epoch that has such samples."""
    for files in tree.epochs:
        inactive = ~tree.active(files.epoch)
        if inactive.any():
            path = array_path(files.directory, "curvature")
            return bool((_load(path, "curvature", len(inactive))[inactive] == 0).all())
    return False


def _check_inactive(path: Path, name: str, values: NDArray[Any], inactive: str) -> None:
    expected = _fill(name)
    if values.dtype.kind == "f" and inactive == "zero":
        expected = 0
    if not np.isclose(values, expected, rtol=0, atol=0, equal_nan=True).all():
        raise DataError(
            f"{path} has values other than {expected} for samples of classes that are not in "
            f"allowed_classes of {METADATA}"
        )
