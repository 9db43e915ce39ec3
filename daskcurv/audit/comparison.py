"""What each method makes of the same samples: error against float64, and speed."""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.scoring import Scorer
from daskcurv.estimators.selection import compared, direct
from daskcurv.estimators.tracing import CONVOLUTIONS

TF32_BITS = 10
"""Explicit bits of a TF32 significand."""


@dataclass(frozen=True)
class Comparison:
    """How one method fared.

    Attributes
    ----------
    name : str
    median_error, worst_error : float
        Of the curvature, relative to float64 with the same probes.
    samples_per_second : float
        NaN if the method is shown for its error only.
    """

    name: str
    median_error: float
    worst_error: float
    samples_per_second: float = float("nan")


def compare(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    sample_ids: Tensor,
    config: EstimatorConfig,
    *,
    device: torch.device,
    batch_size: int | None = None,
) -> list[Comparison]:
    """Score a few samples by every method.

    Parameters
    ----------
    model : nn.Module
    images : Tensor of float32, shape (N, *input)
    labels, sample_ids : Tensor of int64, shape (N,)
    config : EstimatorConfig
        Its method and precision are replaced.
    device : torch.device
    batch_size : int, optional
        Samples per micro-batch; the samples are repeated to fill one for the timing.

    Returns
    -------
    list of Comparison
        Difference propagation, direct finite differences, and these with TF32's rounding (emulated,
        so that it can be seen on any machine), as a script has them that leaves the framework's
        default for recent GPUs alone.
    """
    sample = images, labels, sample_ids
    true = Scorer(model, direct(config), device=device, batch_size=len(images), dtype=torch.float64)
    expected = true.score(*sample).curvature

    results = []
    for name, chosen in compared(config, device).items():
        scorer = Scorer(model, chosen, device=device, batch_size=batch_size)
        rows = torch.arange(scorer.batch_size) % len(images)
        full = images[rows], labels[rows], sample_ids[rows]
        scores = scorer.score(*full)
        started = time.perf_counter()
        scorer.score(*full)
        rate = len(rows) / (time.perf_counter() - started)
        results.append(Comparison(name, *_errors(scores.curvature[: len(images)], expected), rate))
    rounded = with_tf32_convolutions(model)
    scorer = Scorer(rounded, direct(config), device=device, batch_size=len(images))
    found = scorer.score(*sample).curvature
    results.append(Comparison("direct, TF32 convolutions", *_errors(found, expected)))
    return results


def _errors(found: NDArray[np.float64], expected: NDArray[np.float64]) -> tuple[float, float]:
    with np.errstate(divide="ignore", invalid="ignore"):
        errors = np.abs(found - expected) / expected
    return float(np.median(errors)), float(errors.max())


class _Tf32Convolution(nn.Module):
    """A convolution whose factors are rounded to TF32, forward and backward.

    The hardware multiplies TF32 numbers and adds in float32, so rounding what goes into a product
    is what TF32 does to it.
    """

    def __init__(self, convolution: nn.Module):
        super().__init__()
        self._convolution = convolution

    def forward(self, values: Tensor) -> Tensor:
        """Return the convolution of `values`."""
        rounded: Tensor = _RoundForward.apply(values)
        result: Tensor = _RoundBackward.apply(self._convolution(rounded))
        return result


class _RoundForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return round_to_tf32(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class _RoundBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return round_to_tf32(gradient)


def round_to_tf32(values: Tensor) -> Tensor:
    """Round float32 numbers to the nearest with TF32's 10-bit significand, ties to even."""
    bits = values.contiguous().view(torch.int32)
    dropped = 23 - TF32_BITS
    to_even = (bits >> dropped) & 1
    rounded = (bits + (1 << (dropped - 1)) - 1 + to_even) >> dropped << dropped
    return rounded.view(torch.float32)


def with_tf32_convolutions(model: nn.Module) -> nn.Module:
    """Return a copy of a float32 network that computes as with TF32 convolutions."""
    model = copy.deepcopy(model).requires_grad_(False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, CONVOLUTIONS) and not isinstance(parent, _Tf32Convolution):
                child.weight.copy_(round_to_tf32(child.weight))
                setattr(parent, name, _Tf32Convolution(child))
    return model
