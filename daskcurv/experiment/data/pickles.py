"""Pickles of data sets, read safely.

They are opened by an unpickler that knows the few functions a NumPy array needs and refuses
everything else, so that a data set from elsewhere cannot run code.
"""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError


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


def load_pickle(path: Path) -> Any:
    """Read a pickle of containers, numbers, strings and arrays of numbers.

    Python 2's byte strings become text, one character a byte.

    Raises
    ------
    OSError
        If it cannot be opened.
    Exception
        Of nearly any kind, if it is damaged or hostile.
    """
    with open(path, "rb") as file:
        # latin1 maps Python 2 byte strings one to one, array data included.
        return _ArrayUnpickler(file, encoding="latin1").load()


def text_of(value: Any) -> str:
    """Return a name that was pickled as text or as bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


def numbers_of(path: Path, name: str, value: Any) -> NDArray[Any]:
    """Return the array of an entry, or raise `DataError` if it is none."""
    try:
        return value.values if isinstance(value, _Array) else np.asarray(value)
    except ValueError as error:
        raise DataError(f"{path}: {name!r} is not an array of numbers: {error}") from None
