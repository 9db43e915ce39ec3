"""The pointwise arithmetic of difference propagation, fused if a C++ compiler is available.

The four functions act on flat views: ``(P, n)`` for what belongs to P probes, ``(n,)`` for what
belongs to the clean pass. So each is compiled once for all layers of all networks. They compute in
float32 (float64 if an argument is) and round once, on the way out.

Unfused, every operation in them is a trip of all activations through memory, and together they take
longer than the convolutions between them.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
from torch import Tensor

from daskcurv.estimators.native import Functions, native

log = logging.getLogger(__name__)

COMPILE_AFTER_SECONDS = 0.5
"""Of work in uncompiled functions on a CPU. Compiling takes a second, and they are several times as
fast then. On a GPU it takes 10 s and saves two thirds of all time, so it is done at once."""


_EXACT: dict[str, Any] = {"use_fast_math": False}
"""Option of PyTorch's compiler that a process could have set otherwise."""


def dense(values: Tensor) -> Tensor:
    """Return `values` without gaps, in the layout for their dtype and device."""
    return values.contiguous(memory_format=layout(values.ndim, values.dtype, values.device))


def layout(ndim: int, dtype: torch.dtype, device: torch.device) -> torch.memory_format:
    """Return the memory format in which convolutions are best.

    Channels last is the fast one on GPUs, and on CPUs for bfloat16. For float32, CPUs are as fast
    without, and a convolution's rounding error is smaller by a third.
    """
    last = ndim == 4 and (dtype == torch.bfloat16 or device.type == "cuda")
    return torch.channels_last if last else torch.contiguous_format


def total(parts: list[Tensor]) -> Tensor:
    """Return the sum of tensors of one shape and dtype, rounded once."""
    if len(parts) == 1:
        return parts[0]
    return _wide_total(parts).to(parts[0].dtype)


def wide(values: Tensor) -> Tensor:
    """Return `values` in float32, or as they are in float64."""
    return values if values.dtype == torch.float64 else values.float()


def _wide_total(parts: list[Tensor]) -> Tensor:
    result = wide(parts[0])
    for part in parts[1:]:
        result = result + wide(part)
    return result


def clean_rectify(inputs: list[Tensor], h: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return ReLU(a) and s = a/h, in `dtype`, where a is the sum of `inputs`, shape (n,)."""
    value = _wide_total(inputs)
    return value.clamp(min=0), (value / h).to(dtype)


def clean_rectify_gradient(
    gradients: list[Tensor], scaled: Tensor, h: float
) -> tuple[Tensor, Tensor]:
    """Return the clean gradient before a ReLU, and G/h behind it in the dtype of s.

    Parameters
    ----------
    gradients : list of Tensor, shape (n,)
        Their sum is the clean gradient G behind the ReLU.
    scaled : Tensor, shape (n,)
        s = a/h, which has the sign of a.
    h : float
    """
    gradient = _wide_total(gradients)
    return torch.where(scaled > 0, gradient, 0.0), (gradient / h).to(scaled.dtype)


def rectify(deltas: list[Tensor], scaled: Tensor) -> Tensor:
    """Return the difference behind a ReLU: max(δ, −s) − max(−s, 0).

    Parameters
    ----------
    deltas : list of Tensor, shape (P, n)
        Their sum is the difference δ before the ReLU.
    scaled : Tensor, shape (n,)
        s = a/h, with the clean value a before the ReLU.
    """
    bound = -wide(scaled)
    delta = torch.maximum(_wide_total(deltas), bound) - bound.clamp(min=0)
    return delta.to(deltas[0].dtype)


def rectify_gradient(
    gammas: list[Tensor], rectified: Tensor, scaled: Tensor, gradient: Tensor
) -> Tensor:
    """Return the gradient difference before a ReLU: m' Γ + (m' − m) G/h.

    Parameters
    ----------
    gammas : list of Tensor, shape (P, n)
        Their sum is the gradient difference Γ behind the ReLU.
    rectified : Tensor, shape (P, n)
        What `rectify` returned. The perturbed mask m' need not be kept beside it: where the ReLU is
        shut, the difference behind it is min(−s, 0), and larger where it is open.
    scaled : Tensor, shape (n,)
        s = a/h; the clean mask m is where it is positive.
    gradient : Tensor, shape (n,)
        G/h, with the clean gradient G behind the ReLU.
    """
    gamma, jump = _wide_total(gammas), wide(gradient)
    is_open = wide(rectified) > (-wide(scaled)).clamp(max=0)
    was_open = wide(scaled) > 0
    if_open = torch.where(was_open, gamma, gamma + jump)
    if_shut = torch.where(was_open, -jump, 0.0)
    return torch.where(is_open, if_open, if_shut).to(gammas[0].dtype)


class Kernels:
    """The four functions; compiled, once they have been in use for long enough to be worth it.

    On a CPU, compiled and not, they give the same bits.
    """

    def __init__(self) -> None:
        plain = (clean_rectify, clean_rectify_gradient, rectify, rectify_gradient)
        self._plain: Functions = {f.__name__: f for f in plain}
        self._decided: dict[str, Functions] = {}
        self._seconds = 0.0

    def warm_up(self, device: torch.device) -> None:
        """Note that work begins on a device; compile if that is worth it by now."""
        worth = device.type == "cuda" or self._seconds >= COMPILE_AFTER_SECONDS
        if worth and device.type not in self._decided:
            self.compile(device)

    def compile(self, device: torch.device) -> None:
        """Compile for a device, if that works on this machine; if not, say so."""
        if device.type != "cpu":
            # Happens at the first call.
            self._decided[device.type] = _by_pytorch(self._plain)
            return
        try:
            self._decided["cpu"] = native(self._plain)
        except OSError as error:
            self._give_up("cpu", error)

    def clean_rectify(
        self, inputs: list[Tensor], h: float, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """See the function of this name; shapes are those of the layer."""
        inputs = [dense(part) for part in inputs]
        value, scaled = self._call("clean_rectify", [_flat(part) for part in inputs], h, dtype)
        return _shaped(value, inputs[0]), _shaped(scaled, inputs[0])

    def clean_rectify_gradient(
        self, gradients: list[Tensor], scaled: Tensor, h: float
    ) -> tuple[Tensor, Tensor]:
        """See the function of this name; shapes are those of the layer."""
        gradients = [dense(part) for part in gradients]
        flat = [_flat(part) for part in gradients]
        before, kept = self._call("clean_rectify_gradient", flat, _flat(scaled), h)
        return _shaped(before, gradients[0]), _shaped(kept, gradients[0])

    def rectify(self, deltas: list[Tensor], scaled: Tensor) -> Tensor:
        """See the function of this name; shapes are those of the layer."""
        deltas = [dense(part) for part in deltas]
        rows = [_rows(part, scaled) for part in deltas]
        return _shaped(self._call("rectify", rows, _flat(scaled)), deltas[0])

    def rectify_gradient(
        self, gammas: list[Tensor], rectified: Tensor, scaled: Tensor, gradient: Tensor
    ) -> Tensor:
        """See the function of this name; shapes are those of the layer."""
        gammas = [dense(part) for part in gammas]
        rows = [_rows(part, scaled) for part in gammas]
        clean = _flat(scaled), _flat(gradient)
        result = self._call("rectify_gradient", rows, _rows(rectified, scaled), *clean)
        return _shaped(result, gammas[0])

    def _call(self, name: str, *arguments: Any) -> Any:
        device = arguments[0][0].device.type
        functions = self._decided.get(device)
        if functions is None:
            started = time.perf_counter()
            result = self._plain[name](*arguments)
            self._seconds += time.perf_counter() - started
            return result
        try:
            return functions[name](*arguments)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if functions is self._plain:
                raise
            # A missing or failing compiler shows in many ways.
            self._give_up(device, error)
            return self._plain[name](*arguments)

    def _give_up(self, device: str, error: Exception) -> None:
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        log.warning("kernels cannot be compiled here; continuing without that, slower: %s", reason)
        self._decided[device] = self._plain


def _by_pytorch(plain: Functions) -> Functions:
    import torch._dynamo  # takes a second

    # Its remark that a CUDA toolkit was found and no GPU is of no use to anyone.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    # Precisions, batch sizes and numbers of probes each have their own compiled version. Beyond the
    # usual limit of 8, which the doctor reaches, PyTorch would give up.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, 64)
    return {
        name: torch.compile(function, dynamic=True, fullgraph=True, options=_EXACT)
        for name, function in plain.items()
    }


def _flat(values: Tensor) -> Tensor:
    return values.as_strided((values.numel(),), (1,))


def _rows(values: Tensor, clean: Tensor) -> Tensor:
    """Return a view of `values` with one row for each probe, given the clean pass's tensor."""
    size = clean.numel()
    return values.as_strided((values.numel() // size, size), (size, 1))


def _shaped(flat: Tensor, like: Tensor) -> Tensor:
    return flat.as_strided(like.shape, like.stride())


KERNELS = Kernels()
"""Shared by all networks of a process."""
