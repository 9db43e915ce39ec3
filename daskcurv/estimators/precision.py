"""Float32 products in full float32, whatever the settings of the process.

Frameworks trade float32 for something faster behind the caller's back: cuDNN convolutions use
TF32 by default, ``torch.set_float32_matmul_precision`` turns matrix products into TF32 or bf16 (on
CPUs too), and autocast replaces the dtype altogether. A difference of two nearly equal gradients
does not survive any of these, so the estimators choose their precision themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

_REDUCTION = "allow_bf16_reduced_precision_reduction"
_FLOAT32_SUM = 2.0**-15
"""What hundreds of roundings stay below, and one factor rounded to 11 bits does not."""


@contextmanager
def tensor_float32(allowed: bool) -> Iterator[None]:
    """Allow TF32 for convolutions and matrix products on CUDA, or leave things as they are.

    For use inside `true_float32`, which restores the settings in the end.
    """
    backends: Any = torch.backends
    knobs = (backends.cuda.matmul, backends.cudnn.conv) if allowed else ()
    for knob in knobs:
        knob.fp32_precision = "tf32"
    try:
        yield
    finally:
        for knob in knobs:
            knob.fp32_precision = "ieee"


@contextmanager
def true_float32(device: torch.device) -> Iterator[None]:
    """Compute in IEEE float32 with autograd on; restore the process's settings afterwards.

    Inside, TF32 and bf16 substitutes are off for convolutions and matrix products on CUDA and on
    the CPU, autocast, inference mode and anomaly detection are off, and what else a process can set
    is as it is in a fresh one, but that cuDNN takes deterministic algorithms and attention its
    plain definition. The number of threads is left alone: it is what a machine has, and decides
    only the order in which float32 sums are rounded.

    Parameters
    ----------
    device : torch.device
        Where the computation runs (autocast is a setting per device type).
    """
    with ExitStack() as stack:
        stack.enter_context(_ieee())
        stack.enter_context(_plain_kernels())
        stack.enter_context(_plain_tensors())
        for kind in {device.type, "cpu"}:
            stack.enter_context(torch.autocast(kind, enabled=False))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autograd.set_detect_anomaly(False))
        yield


@contextmanager
def _ieee() -> Iterator[None]:
    """Switch substitutes for float32 off."""
    backends: Any = torch.backends
    knobs = (
        backends.cuda.matmul,
        backends.cudnn.conv,
        backends.cudnn.rnn,
        backends.mkldnn.matmul,
        backends.mkldnn.conv,
        backends.mkldnn.rnn,
    )
    previous = [knob.fp32_precision for knob in knobs]
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        yield
    finally:
        for knob, value in zip(knobs, previous, strict=True):
            # "none" means: as the more general setting says, which may be where the value was from.
            knob.fp32_precision = "none"
            if knob.fp32_precision != value:
                knob.fp32_precision = value


@contextmanager
def _plain_kernels() -> Iterator[None]:
    """Fix which implementations of an operation are chosen from.

    They differ in rounding, and those without a gradient more than that. How bfloat16 products are
    summed is left at the framework's default.
    """
    backends: Any = torch.backends
    matmul = backends.cuda.matmul
    settings = (
        (backends.cudnn, "enabled", True),
        (backends.cudnn, "benchmark", False),
        (backends.cudnn, "deterministic", True),
        (backends.mkldnn, "enabled", True),
        (matmul, "allow_fp16_accumulation", False),
    )
    previous = [getattr(owner, name) for owner, name, _ in settings]
    fast_path = backends.mha.get_fastpath_enabled()
    reduced, split = (getattr(matmul, _REDUCTION + end, None) for end in ("", "_split_k"))
    try:
        for owner, name, value in settings:
            setattr(owner, name, value)
        setattr(matmul, _REDUCTION, True)
        backends.mha.set_fastpath_enabled(False)
        with sdpa_kernel([SDPBackend.MATH]):
            yield
    finally:
        for (owner, name, _), value in zip(settings, previous, strict=True):
            setattr(owner, name, value)
        setattr(matmul, _REDUCTION, reduced if split is None else (reduced, split))
        backends.mha.set_fastpath_enabled(fast_path)


@contextmanager
def _plain_tensors() -> Iterator[None]:
    """Make tensors of no stated dtype or device as a fresh process does; keep denormals."""
    dtype, flushed = torch.get_default_dtype(), _flushes_denormals()
    torch.set_default_dtype(torch.float32)
    try:
        if flushed:
            torch.set_flush_denormal(False)
        # A mode that every operation passes through, so only where it changes something.
        plain = torch.get_default_device().type == "cpu"
        with nullcontext() if plain else torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        if flushed:
            torch.set_flush_denormal(True)


def _flushes_denormals() -> bool:
    smallest = torch.full((1,), 5e-324, dtype=torch.float64, device="cpu")
    return bool((smallest * 1).item() == 0)


@cache
def lowered_precision(device: torch.device) -> str:
    """Return which float32 products have a lower precision despite `true_float32`, empty if none.

    Environment variables can set this in libraries, independently of the framework. It shows in a
    product of two numbers just above 1.

    Parameters
    ----------
    device : torch.device

    Returns
    -------
    str
        As ``"convolutions and matrix products"``.
    """
    value = 1 + 2.0**-12  # 1 in any format with fewer than 12 bits
    with true_float32(device):
        images = torch.full((2, 32, 8, 8), value, device=device, requires_grad=True)
        output = torch.conv2d(images, torch.full((32, 32, 3, 3), value, device=device))
        (back,) = torch.autograd.grad(output, images, torch.full_like(output, value))
        product = torch.full((64, 512), value, device=device).matmul(
            torch.full((512, 64), value, device=device)
        )
    terms = {
        "convolutions": (output[0, 0, 3, 3] / 288, back[0, 0, 3, 3] / 288),
        "matrix products": (product[0, 0] / 512,),
    }
    lowered = [
        name
        for name, results in terms.items()
        if any(abs(result.item() / value**2 - 1) > _FLOAT32_SUM for result in results)
    ]
    return " and ".join(lowered)
