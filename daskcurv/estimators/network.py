"""A network as a list of layers that differences can be propagated through."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from daskcurv.estimators.builder import Builder
from daskcurv.estimators.kernels import Kernels, total
from daskcurv.estimators.layers import Parts
from daskcurv.estimators.reading import Step
from daskcurv.estimators.tracing import UnsupportedError, first_line


class Network:
    """A network in eval mode, decomposed into layers.

    Parameters
    ----------
    model : nn.Module
        In eval mode, in the dtype of the clean pass.
    example : Tensor, shape (N, *input)
        Two or more samples, in the model's dtype and on its device.
    h : float
        Step of the finite difference.
    dtype : torch.dtype
        Of the differences.
    kernels : Kernels

    Raises
    ------
    UnsupportedError
        Naming the module or function that there is no rule for.
    """

    def __init__(
        self, model: nn.Module, example: Tensor, h: float, dtype: torch.dtype, kernels: Kernels
    ):
        builder = Builder(model, example, h, dtype, kernels)
        self._input, self._output = builder.build()
        self._steps = builder.steps

    def clean(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, *input)."""
        return self._through("clean", images)

    def clean_gradient(self, gradient: Tensor) -> Tensor:
        """Return the input gradient (N, *input), given that of the logits (N, C)."""
        return self._back_through("clean_gradient", gradient)

    def forward(self, delta: Tensor) -> Tensor:
        """Return the differences of the logits (P N, C), given those of the input."""
        return self._through("forward", delta)

    def backward(self, gamma: Tensor) -> Tensor:
        """Return the input's gradient differences (P N, *input), given those of the logits."""
        return self._back_through("backward", gamma)

    def _through(self, how: str, values: Tensor) -> Tensor:
        known = {self._input: values}
        for step in self._steps:
            operands = [[known[name] for name in terms] for terms in step.operands]
            known[step.name] = _run(step, how, operands)
        return total([known[name] for name in self._output])

    def _back_through(self, how: str, gradient: Tensor) -> Tensor:
        known: defaultdict[str, Parts] = defaultdict(list)
        for name in self._output:
            known[name].append(gradient)
        for step in reversed(self._steps):
            # A step that does not lead to the output has no gradient.
            if parts := known.pop(step.name, None):
                results = _run(step, how, [parts])
                each = results if isinstance(results, tuple) else (results,)
                for terms, result in zip(step.operands, each, strict=True):
                    for name in terms:
                        known[name].append(result)
        return total(known[self._input])


def _run(step: Step, how: str, operands: list[Parts]) -> Any:
    try:
        return getattr(step.layer, how)(*operands)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise UnsupportedError(
            f"the rule for {step.operation} failed ({how}): {first_line(error)}"
        ) from error
