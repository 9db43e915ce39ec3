"""Float32 that is float32, whatever the process has been told.

Frameworks trade float32 for something faster behind the caller's back: cuDNN convolutions use
TF32 by default, ``torch.set_float32_matmul_precision`` turns matrix products into TF32 or bf16 (on
CPUs too), and autocast replaces the dtype altogether. A difference of two nearly equal gradients
does not survive any of these, so the estimators choose their precision themselves.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


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
    the CPU, autocast and inference mode are off, and cuDNN takes deterministic algorithms.

    Parameters
    ----------
    device : torch.device
        Where the computation runs (autocast is a setting per device type).
    """
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
    cudnn = backends.cudnn.benchmark, backends.cudnn.deterministic
    try:
        for knob in knobs:
            knob.fp32_precision = "ieee"
        backends.cudnn.benchmark, backends.cudnn.deterministic = False, True
        with (
            torch.autocast(device.type, enabled=False),
            torch.inference_mode(False),
            torch.enable_grad(),
        ):
            yield
    finally:
        for knob, value in zip(knobs, previous, strict=True):
            # "none" means: as the more general setting says, which may be where the value was from.
            knob.fp32_precision = "none"
            if knob.fp32_precision != value:
                knob.fp32_precision = value
        backends.cudnn.benchmark, backends.cudnn.deterministic = cudnn
