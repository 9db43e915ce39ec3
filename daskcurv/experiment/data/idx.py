"""MNIST's idx format: images and labels in two files, perhaps compressed.

Both begin with a magic number and the length of each axis, big-endian 32-bit integers.
"""

from __future__ import annotations

import gzip
import logging
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Arrays
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import exists, leads_nowhere

log = logging.getLogger(__name__)

IMAGES, LABELS = ("images", 3), ("labels", 1)
_UNSIGNED_BYTES = 0x0800  # in the magic number, above the number of axes


def recognises(directory: Path) -> bool:
    """Return whether a directory holds a training set of this format."""
    return _found(directory, *IMAGES) is not None or _found(directory, *LABELS) is not None


def read(directory: Path, preprocessing: Preprocessing) -> Arrays:
    """Read the images and labels of the training set.

    Parameters
    ----------
    directory : Path
        Holds ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, or with a dot before
        ``idx``, or compressed with the suffix ``.gz``.
    preprocessing : Preprocessing

    Raises
    ------
    DataError
        If a file is missing or damaged, or the two do not fit each other.
    """
    images_path, labels_path = (_existing(directory, *part) for part in (IMAGES, LABELS))
    images, labels = _array(images_path, IMAGES[1]), _array(labels_path, LABELS[1])
    if len(images) != len(labels):
        raise DataError(
            f"{images_path} has {len(images)} images, but {labels_path} has {len(labels)} labels; "
            "expected as many. Replace the one that is not of this data set"
        )
    log.info("%s: %d images (%s, %s)", directory, len(images), images_path.name, labels_path.name)
    return preprocessing.arrays(directory, images[:, None], labels)


def _names(what: str, axes: int) -> list[str]:
    stems = [f"train-{what}{separator}idx{axes}-ubyte" for separator in "-."]
    return [stem + suffix for suffix in ("", ".gz") for stem in stems]


def _found(directory: Path, what: str, axes: int) -> Path | None:
    paths = [directory / name for name in _names(what, axes)]
    return next((p for p in paths if exists(p, "data set file") or leads_nowhere(p)), None)


def _existing(directory: Path, what: str, axes: int) -> Path:
    if path := _found(directory, what, axes):
        return path
    raise DataError(
        f"{directory} has no {_names(what, axes)[0]}, or as .gz, beside its other idx file; put "
        "both files of the training set there"
    )


def _array(path: Path, axes: int) -> NDArray[np.uint8]:
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        reason = leads_nowhere(path) or getattr(error, "strerror", None) or error
        raise DataError(f"{path} cannot be read: {reason}. Replace the file") from error
    header = np.frombuffer(raw[: 4 * (1 + axes)].ljust(4 * (1 + axes), b"\xff"), ">u4").tolist()
    if header[0] != _UNSIGNED_BYTES + axes:
        raise DataError(
            f"{path} begins with {raw[:4].hex(' ') or 'nothing'}; expected "
            f"{(_UNSIGNED_BYTES + axes).to_bytes(4, 'big').hex(' ')}, the idx format's mark of "
            f"unsigned bytes along {axes} {'axes' if axes > 1 else 'axis'}. Replace the file"
        )
    values = np.frombuffer(raw, np.uint8, offset=min(4 * (1 + axes), len(raw)))
    # In Python's integers: four billion squared does not fit into NumPy's.
    expected = 1
    for length in header[1:]:
        expected *= length
    if len(values) != expected:
        raise DataError(
            f"{path} has {len(values):,} values; expected {' × '.join(map(str, header[1:]))}, as "
            "its header says. Replace the file"
        )
    return values.reshape(header[1:])
