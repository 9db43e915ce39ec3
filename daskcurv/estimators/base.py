"""The inputs and results of every estimator."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig

Measures = dict[str, Tensor]
"""One value per sample, by the names in the table of measures."""


class SampleLoss:
    """Cross-entropy of each sample alone, over all outputs of the network or some of them.

    There is no mean over the batch: dividing by the batch size would make every gradient, and so
    every curvature, depend on how the samples happen to be grouped.

    The softmax is taken in float64. For a sample that the network is sure of, the loss and its
    gradient are what remains of 1 − p; in float32 that difference has an absolute error of 6e-8,
    which is more than the whole of it for samples learned by heart.

    Parameters
    ----------
    temperature : float
        The logits are divided by it.
    classes : sequence of int, optional
        The outputs that take part in the softmax; None means all.
    """

    def __init__(self, temperature: float = 1.0, classes: Sequence[int] | None = None):
        self.temperature = temperature
        self.classes = (
            None if classes is None else torch.as_tensor(classes, dtype=torch.int64, device="cpu")
        )

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each sample.

        Parameters
        ----------
        logits : Tensor, shape (N, C)
        labels : Tensor of int64, shape (N,)
            Each must be among `classes`.

        Returns
        -------
        Tensor of float64, shape (N,)
        """
        return F.cross_entropy(self._scaled(logits), self._positions(labels), reduction="none")

    def with_gradient(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Return the loss of each sample, (N,), and its gradient, (N, C); both float64."""
        scaled, positions = self._scaled(logits), self._positions(labels)
        losses = F.cross_entropy(scaled, positions, reduction="none")
        slope = scaled.softmax(dim=1)
        slope[torch.arange(len(slope), device=slope.device), positions] -= 1
        return losses, self._spread(slope / self.temperature, logits)

    def gradient_difference(self, logits: Tensor, delta: Tensor, h: float) -> Tensor:
        """Return by how much the loss's gradient changes as the logits do, divided by h.

        Parameters
        ----------
        logits : Tensor, shape (N, C)
        delta : Tensor, shape (P N, C)
            For each of P probes, the change of the logits divided by h.
        h : float

        Returns
        -------
        Tensor of float64, shape (P N, C)
        """
        chance = self._scaled(logits).softmax(dim=1)
        # p' − p = p (e^d − 1 − E) / (1 + E), with d the change of the scaled logits and E the mean
        # of e^d − 1 under p: unlike the difference of two softmaxes, this does not cancel.
        rise = torch.expm1(self._scaled(delta) * h).view(-1, *chance.shape)
        mean = (chance * rise).sum(dim=2, keepdim=True)
        change = chance * (rise - mean) / (1 + mean) / (h * self.temperature)
        return self._spread(change.flatten(0, 1), delta)

    def _scaled(self, logits: Tensor) -> Tensor:
        if self.classes is not None:
            logits = logits[:, self._classes_on(logits.device)]
        return logits.double() / self.temperature

    def _positions(self, labels: Tensor) -> Tensor:
        """Return where among `classes` the labels are."""
        if self.classes is None:
            return labels
        matches = labels[:, None] == self._classes_on(labels.device)
        return matches.to(torch.int64).argmax(dim=1)

    def _spread(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """Return `gradient` with zeros for the outputs that do not take part."""
        if self.classes is None:
            return gradient
        full = torch.zeros_like(logits, dtype=gradient.dtype)
        full[:, self._classes_on(logits.device)] = gradient
        return full

    def predict(self, logits: Tensor) -> Tensor:
        """Return the output with the largest logit among `classes`, as a class index, (N,)."""
        if self.classes is None:
            return logits.argmax(dim=1)
        classes = self._classes_on(logits.device)
        return classes[logits[:, classes].argmax(dim=1)]

    def _classes_on(self, device: torch.device) -> Tensor:
        assert self.classes is not None
        if self.classes.device != device:
            self.classes = self.classes.to(device)
        return self.classes


class ProbeMeans:
    """Means over probes of the measures of a change Δg of the input gradient.

    Sums over pixels and probes run in float64: they are a negligible part of the work, and keep the
    accuracy of the result that of Δg.

    Parameters
    ----------
    count : int
        Samples.
    h : float
        Step of the finite difference.
    device : torch.device
    """

    def __init__(self, count: int, h: float, device: torch.device):
        self._h = h
        self._drawn = 0
        self._norm = torch.zeros(count, dtype=torch.float64, device=device)
        self._square, self._along = torch.zeros_like(self._norm), torch.zeros_like(self._norm)

    def add(self, change: Tensor, probes: Tensor) -> None:
        """Take in one or more probes of every sample.

        Parameters
        ----------
        change : Tensor of float64, shape (P N, *input)
            Δg, probe by probe.
        probes : Tensor, shape (P N, *input)
        """
        change = change.flatten(1)
        square = change.square().sum(dim=1).view(-1, len(self._norm))
        along = (change * probes.flatten(1)).sum(dim=1).view_as(square)
        self._drawn += len(square)
        self._norm += square.sqrt().sum(dim=0)
        self._square += square.sum(dim=0)
        self._along += self._h * along.sum(dim=0)

    def means(self) -> Measures:
        """Return `curvature`, `curvature_sq` and `directional_eig`."""
        return {
            "curvature": self._norm / self._drawn,
            "curvature_sq": self._square / self._drawn,
            "directional_eig": self._along / self._drawn,
        }


class Estimator(Protocol):
    """A way to compute the measures of a batch of samples.

    Instances are made once per model, so that whatever a method has to prepare (tracing, folding,
    compiling) is shared by all batches. The model is in eval mode, on the right device, and its
    parameters require no gradient; calls happen inside
    :func:`~daskcurv.estimators.precision.true_float32`.

    Attributes
    ----------
    method : str
        Name, and precision where there is a choice, as recorded with the results.
    """

    @property
    def method(self) -> str:
        """How results are computed, with the precision; empty while this is not decided."""
        ...

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig) -> None: ...

    def __call__(
        self, images: Tensor, labels: Tensor, sample_ids: Tensor, probes: Sequence[int]
    ) -> Measures:
        """Return a value per sample for each of `daskcurv.measures.MEASURES`.

        Parameters
        ----------
        images : Tensor of float, shape (N, *input)
            Normalised inputs.
        labels : Tensor of int64, shape (N,)
        sample_ids : Tensor of int64, shape (N,)
            Indices of the samples; with the index of a probe they select its signs.
        probes : sequence of int
            Indices of the probes to take means over.
        """
        ...
