"""The measures of the clean pass: the evaluation of a network at the samples themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from daskcurv.estimators.base import Measures, SampleLoss


@dataclass(frozen=True)
class CleanPass:
    """What a clean pass gives.

    Attributes
    ----------
    loss : SampleLoss
    labels : Tensor of int64, shape (N,)
    logits : Tensor, shape (N, C)
    losses : Tensor of float64, shape (N,)
    gradient : Tensor, shape (N, *input), or None
        Of the losses with respect to the input; None if the estimator takes no gradients.
    """

    loss: SampleLoss
    labels: Tensor
    logits: Tensor
    losses: Tensor
    gradient: Tensor | None

    @property
    def gradient_norm(self) -> Tensor:
        """Norm of the gradient, float64 of shape (N,); NaN without one."""
        if self.gradient is None:
            return torch.full_like(self.losses, torch.nan)
        norms: Tensor = self.gradient.flatten(1).double().norm(dim=1)
        return norms


FORMULAS: dict[str, Callable[[CleanPass], Tensor]] = {
    "loss": lambda clean: clean.losses,
    "grad_norm": lambda clean: clean.gradient_norm,
    "prediction": lambda clean: clean.loss.predict(clean.logits),
}
"""One for each row of `daskcurv.measures.MEASURES` that is computed in the clean pass."""


def clean_measures(clean: CleanPass) -> Measures:
    """Return a value per sample, (N,), for each of `FORMULAS`."""
    return {name: formula(clean) for name, formula in FORMULAS.items()}
