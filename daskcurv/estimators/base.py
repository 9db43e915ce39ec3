"""What every estimator is given, and what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig

Measures = dict[str, Tensor]
"""One value per sample, keyed by the store's variable names."""

MEASURES = ("curvature", "curvature_sq", "directional_eig", "loss", "grad_norm", "prediction")


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
        self.classes = None if classes is None else torch.as_tensor(classes, dtype=torch.int64)

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
        if self.classes is not None:
            classes = self.classes.to(logits.device)
            labels = (labels[:, None] == classes).to(torch.int64).argmax(dim=1)
            logits = logits[:, classes]
        return F.cross_entropy(logits.double() / self.temperature, labels, reduction="none")

    def predict(self, logits: Tensor) -> Tensor:
        """Return the output with the largest logit among `classes`, as a class index, (N,)."""
        if self.classes is None:
            return logits.argmax(dim=1)
        classes = self.classes.to(logits.device)
        return classes[logits[:, classes].argmax(dim=1)]


class Estimator(Protocol):
    """A way to compute the measures of a batch of samples.

    Instances are made once per model, so that whatever a method has to prepare (tracing, folding,
    compiling) is shared by all batches. The model is in eval mode, on the right device, and its
    parameters require no gradient; calls happen inside
    :func:`~daskcurv.estimators.precision.true_float32`.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig) -> None: ...

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> Measures:
        """Return a value per sample for each name in :data:`MEASURES`.

        Parameters
        ----------
        images : Tensor of float, shape (N, *input)
            Normalised inputs.
        labels : Tensor of int64, shape (N,)
        sample_ids : Tensor of int64, shape (N,)
            Indices of the samples; they select the probes.
        """
        ...
