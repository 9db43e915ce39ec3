"""Plain data that training code saves beside weights, read as values and not as code.

PyTorch reads a file with ``weights_only=True`` only if every class in it is a tensor container or
was allowed. NumPy's numbers and arrays, the options of a command line and paths are neither. They
are allowed here, but by stand-ins: nothing of NumPy's own unpickling is called with what a file
says. Numbers get their values, as an epoch may be one; arrays are left empty.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np


class _Array:
    """Stands in for an array of NumPy."""

    def __setstate__(self, state: object) -> None:
        pass


class _Kind:
    """Stands in for a dtype of NumPy, which is pickled by its code, and its byte order after."""

    order = "="

    def __init__(self, code: str, *_: object):
        self.code = code

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = state[1]


def _array(*_: object) -> _Array:
    return _Array()


def _number(kind: _Kind, data: bytes) -> Any:
    """Return a number of NumPy; anything else as its bytes."""
    if kind.code[:1] not in "biufc":
        return data
    (number,) = np.frombuffer(data, np.dtype(str(kind.code)).newbyteorder(kind.order))  # type: ignore[arg-type]
    return number


_PATHS = {
    "PosixPath": PurePosixPath,
    "PurePosixPath": PurePosixPath,
    "WindowsPath": PureWindowsPath,
    "PureWindowsPath": PureWindowsPath,
}

# NumPy 1 and Python before 3.13 call the modules something else than their successors do.
STAND_INS: dict[str, Callable[..., Any]] = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": _Kind,
    "numpy.ndarray": _Array,
    **{f"numpy.{m}.multiarray.scalar": _number for m in ("_core", "core")},
    **{f"numpy.{m}.multiarray._reconstruct": _array for m in ("_core", "core")},
    **{f"{m}.{name}": kind for m in ("pathlib", "pathlib._local") for name, kind in _PATHS.items()},
}
"""What is called for each name in a file."""
