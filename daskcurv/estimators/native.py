"""The pointwise arithmetic of difference propagation, compiled for the CPU at hand."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

_SOURCE = Path(__file__).with_name("kernels.cpp")
_OPTIONS = (
    "-std=c++17", "-O3", "-march=native", "-ffp-contract=off", "-fno-fast-math",
    "-fPIC", "-shared", "-pthread",
)  # fmt: skip
_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}

Functions = Mapping[str, Callable[..., Any]]


def compiler() -> str | None:
    """Return the path of a C++ compiler, if there is one."""
    return shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


def native(plain: Functions) -> Functions:
    """Compile the functions of ``kernels.cpp``, which takes a second.

    For this process alone: a file that others could use would have to be trusted, and be for their
    processor too.

    Parameters
    ----------
    plain : mapping of str to function
        The same functions in PyTorch, for tensors in float64.

    Returns
    -------
    mapping of str to function
        With the arguments and results of `plain`, and the same bits. Tensors have no gaps.

    Raises
    ------
    OSError
        If there is no compiler, it fails, or its result cannot be loaded.
    """
    command = compiler()
    if command is None:
        raise OSError("no C++ compiler (c++, g++ or clang++) was found")
    with TemporaryDirectory(prefix="daskcurv-") as directory:
        path = Path(directory) / "kernels.so"
        run = subprocess.run(
            [command, *_OPTIONS, str(_SOURCE), "-o", str(path)], capture_output=True, text=True
        )
        if run.returncode:
            reason = next(iter(run.stderr.splitlines()), f"exit code {run.returncode}")
            raise OSError(f"{command} failed: {reason}")
        library = ctypes.CDLL(str(path))
    return _functions(library, plain)


def _functions(library: ctypes.CDLL, plain: Functions) -> Functions:
    def call(name: str, dtype: torch.dtype, *arguments: Any) -> None:
        function = getattr(library, f"{name}_{_NAMES[dtype]}")
        function(*arguments, ctypes.c_int(torch.get_num_threads()))

    def clean_rectify(inputs: list[Tensor], h: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if not _known(dtype, *inputs):
            result: tuple[Tensor, Tensor] = plain["clean_rectify"](inputs, h, dtype)
            return result
        rectified = torch.empty_like(inputs[0])
        scaled = torch.empty_like(inputs[0], dtype=dtype)
        size = ctypes.c_int64(rectified.numel())
        call(
            "clean_rectify", dtype, *_all(inputs), ctypes.c_float(h), _at(rectified), _at(scaled),
            size,
        )  # fmt: skip
        return rectified, scaled

    def clean_rectify_gradient(
        gradients: list[Tensor], scaled: Tensor, h: float
    ) -> tuple[Tensor, Tensor]:
        if not _known(scaled.dtype, *gradients):
            result: tuple[Tensor, Tensor] = plain["clean_rectify_gradient"](gradients, scaled, h)
            return result
        before, kept = torch.empty_like(gradients[0]), torch.empty_like(scaled)
        size = ctypes.c_int64(before.numel())
        call(
            "clean_rectify_gradient", scaled.dtype, *_all(gradients), _at(scaled),
            ctypes.c_float(h), _at(before), _at(kept), size,
        )  # fmt: skip
        return before, kept

    def rectify(deltas: list[Tensor], scaled: Tensor) -> Tensor:
        out = torch.empty_like(deltas[0])
        if not _alike(*deltas, scaled):
            result: Tensor = plain["rectify"](deltas, scaled)
            return result
        call("rectify", out.dtype, *_all(deltas), _at(scaled), _at(out), *_shape(out))
        return out

    def rectify_gradient(
        gammas: list[Tensor], rectified: Tensor, scaled: Tensor, gradient: Tensor
    ) -> Tensor:
        out = torch.empty_like(gammas[0])
        if not _alike(*gammas, rectified, scaled, gradient):
            result: Tensor = plain["rectify_gradient"](gammas, rectified, scaled, gradient)
            return result
        clean = _at(rectified), _at(scaled), _at(gradient)
        call("rectify_gradient", out.dtype, *_all(gammas), *clean, _at(out), *_shape(out))
        return out

    return {
        function.__name__: function
        for function in (clean_rectify, clean_rectify_gradient, rectify, rectify_gradient)
    }


def _known(dtype: torch.dtype, *clean: Tensor) -> bool:
    """Whether there is a function for differences in `dtype` and these of the clean pass."""
    return dtype in _NAMES and all(values.dtype == torch.float32 for values in clean)


def _alike(*differences: Tensor) -> bool:
    """Whether there is a function for differences in their dtype."""
    return {values.dtype for values in differences} <= {differences[0].dtype} & _NAMES.keys()


def _at(values: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(values.data_ptr())


def _all(parts: list[Tensor]) -> tuple[Any, ctypes.c_int]:
    pointers = (ctypes.c_void_p * len(parts))(*(part.data_ptr() for part in parts))
    return pointers, ctypes.c_int(len(parts))


def _shape(values: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    rows, size = values.shape
    return ctypes.c_int64(rows), ctypes.c_int64(size)
