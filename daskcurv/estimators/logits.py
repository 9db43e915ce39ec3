"""Calls a network for all estimators, and checks what it returns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from daskcurv.errors import ConfigError
from daskcurv.estimators.base import SampleLoss


def logits_of(network: nn.Module, images: Tensor) -> Tensor:
    """Return a network's logits.

    Parameters
    ----------
    network : nn.Module
    images : Tensor of float, shape (N, *input)
        The network is given a copy, as it may change its input in place.

    Returns
    -------
    Tensor of float, shape (N, C)

    Raises
    ------
    ConfigError
        If it returns anything else; the text says what.
    """
    output: Any = network(images.clone())
    if problem := _problem(output, images):
        raise ConfigError(f"{type(network).__name__} returns {problem}")
    logits: Tensor = output
    return logits


def input_gradient(
    network: nn.Module, images: Tensor, labels: Tensor, loss: SampleLoss
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the samples' own losses, by autograd.

    Returns
    -------
    gradient : Tensor, shape (N, *input)
    losses : Tensor of float64, shape (N,)
    logits : Tensor, shape (N, C)

    Raises
    ------
    ConfigError
        If the logits have no gradient with respect to the images.
    """
    with torch.enable_grad():
        inputs = images.detach().requires_grad_(True)
        logits = logits_of(network, inputs)
        losses = loss(logits, labels)
        gradient = None
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), inputs, allow_unused=True)
    if gradient is None:
        raise ConfigError(
            f"the logits of {type(network).__name__} have no gradient with respect to its input "
            "(is it detached, rounded or an index on the way?); curvature needs that gradient"
        )
    return gradient, losses.detach(), logits.detach()


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected value; NaN equals NaN."""
    found, expected = found.double(), expected.double()
    same = (found == expected) | (found.isnan() & expected.isnan())
    error = torch.where(same, 0.0, (found - expected).abs()).nan_to_num(nan=torch.inf)
    scale = expected.nan_to_num(posinf=0.0, neginf=0.0).abs().max()
    return 0.0 if not error.any() else (error.max() / scale).item()


def _problem(output: Any, images: Tensor) -> str:
    """Return what is wrong with a network's output, empty if it is logits."""
    wanted = f"expected logits, a tensor of shape ({len(images)}, classes)"
    if not isinstance(output, Tensor):
        return f"{_described(output)}; {wanted}: wrap the model in one that returns them alone"
    if output.ndim != 2 or len(output) != len(images):
        return f"a tensor of shape {tuple(output.shape)} for {len(images)} samples; {wanted}"
    if output.dtype not in (images.dtype, torch.float64):
        return f"{_name(output.dtype)} for images of {_name(images.dtype)}; expected the same dtype"
    return ""


def _described(output: Any) -> str:
    name = type(output).__name__
    if isinstance(output, Mapping):
        return f"a {name} with keys {', '.join(map(str, output))}"
    if isinstance(output, tuple | list):
        return f"a {name} of {len(output)} values"
    return f"a {name} with an attribute logits" if hasattr(output, "logits") else f"a {name}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
