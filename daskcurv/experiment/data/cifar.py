"""CIFAR-100's python format, read safely.

The published data set is a directory ``cifar-100-python`` of pickles. Subsets and relabelled
variants in the same format are normal inputs. Pickles are opened by an unpickler that knows the
few functions a NumPy array needs and refuses everything else, so that a data set from elsewhere
cannot run code.
"""

from __future__ import annotations

import hashlib
import logging
import pickle
import re
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Arrays
from daskcurv.places import exists, leads_nowhere, listed, names_in

log = logging.getLogger(__name__)

MEAN = (0.5071, 0.4865, 0.4409)
STD = (0.2673, 0.2564, 0.2762)
"""Per-channel normalisation of the training run, on pixels scaled to 0 … 1."""

IMAGE_SHAPE = (3, 32, 32)
DIRECTORY = "cifar-100-python"
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


class _Dtype:
    """Stands in for ``numpy.dtype`` while unpickling: plain numbers only."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        self._code = code
        self._order: Any = "|"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self._order = state[1]

    def build(self) -> np.dtype[Any]:
        """Return the dtype, or raise `UnpicklingError` if it is not one of plain numbers."""
        if not re.fullmatch("[biuf][1248]", self._code):
            raise pickle.UnpicklingError(f"it holds an array of {self._code!r}, not of numbers")
        return np.dtype(self._code).newbyteorder(self._order)


class _Array:
    """Stands in for ``numpy.ndarray`` while unpickling."""

    def __init__(self, *arguments: Any):
        self.values: NDArray[Any] = np.empty(0)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, data = state
        raw = data.encode("latin1") if isinstance(data, str) else data
        values = np.frombuffer(raw, dtype.build())
        self.values = values.reshape(shape, order="F" if fortran else "C")


def _array_from_buffer(data: bytes, dtype: _Dtype, shape: tuple[int, ...], order: str) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, order == "F", data))
    return array


def _scalar(dtype: _Dtype, data: bytes | str) -> Any:
    raw = data.encode("latin1") if isinstance(data, str) else data
    return np.frombuffer(raw, dtype.build())[0].item()


def _empty_bytes() -> bytes:
    return b""


# Everything a pickled array can name, and what is called instead. NumPy's own functions would
# trust the pickle with memory: an array of "objects" made of bytes is an array of wild pointers.
_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy", "dtype"): _Dtype,
    ("numpy", "ndarray"): _Array,
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_from_buffer,
    ("numpy._core.numeric", "_frombuffer"): _array_from_buffer,
    ("_codecs", "encode"): str.encode,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles containers, numbers, strings and arrays of numbers; refuses anything else."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _STAND_INS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it tries to import {module}.{name}, which does not belong in a data set"
            ) from None


def _read_pickle(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            # latin1 maps Python 2 byte strings one to one, array data included.
            content = _ArrayUnpickler(file, encoding="latin1").load()
    except OSError as error:
        raise DataError(_unreadable(path, error)) from error
    except Exception as error:
        # A damaged or hostile pickle can raise nearly anything; all of it means the same here.
        raise DataError(
            f"{path} cannot be read as a CIFAR-100 pickle: {error or type(error).__name__}. "
            "Replace the file (--download fetches the published one into an empty directory)"
        ) from error
    if not isinstance(content, dict):
        raise DataError(f"{path} holds a {type(content).__name__}; expected a dictionary")
    return {_text(key): content[key] for key in content}


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


def _text(value: Any) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def _numbers(path: Path, name: str, value: Any) -> NDArray[Any]:
    try:
        return value.values if isinstance(value, _Array) else np.asarray(value)
    except ValueError as error:
        raise DataError(f"{path}: {name!r} is not an array of numbers: {error}") from None


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
    content = _read_pickle(path)
    for key in ("data", "fine_labels"):
        if key not in content:
            raise DataError(
                f"{path} has no {key!r}; expected 'data' and 'fine_labels' (it has: "
                f"{', '.join(sorted(content))})"
            )
    data = _numbers(path, "data", content["data"])
    labels = _numbers(path, "fine_labels", content["fine_labels"])
    if data.ndim != 2 or data.shape[1] != np.prod(IMAGE_SHAPE) or data.dtype != np.uint8:
        raise DataError(
            f"{path}: 'data' has shape {data.shape} and dtype {data.dtype}; expected (N, 3072) "
            "and uint8"
        )
    if len(data) == 0:
        raise DataError(f"{path} holds no samples")
    if labels.shape != (len(data),) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{path}: 'fine_labels' has shape {labels.shape} and dtype {labels.dtype}; expected "
            f"one class index for each of the {len(data)} images"
        )
    if labels.min() < 0:
        raise DataError(f"{path}: 'fine_labels' has {labels.min()}; expected indices from 0")
    with open(path, "rb") as file:
        md5 = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return Cifar(
        images=np.ascontiguousarray(data).reshape(-1, *IMAGE_SHAPE),
        labels=labels.astype(np.int64),
        class_names=_class_names(directory / "meta"),
        published=md5 == _PUBLISHED_TRAIN_MD5,
    )


def _class_names(meta: Path) -> tuple[str, ...]:
    if not exists(meta, "data set file") and not leads_nowhere(meta):
        return ()
    names = _read_pickle(meta).get("fine_label_names", [])
    if not isinstance(names, list | tuple):
        raise DataError(f"{meta}: 'fine_label_names' is {names!r:.60}; expected a list of names")
    return tuple(map(_text, names))


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
