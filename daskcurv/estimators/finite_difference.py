r"""Curvature by direct finite differences of input gradients.

For a sample :math:`x` with label :math:`y`, its own loss :math:`L`, and Rademacher probes
:math:`v_1 … v_n`,

.. math::

    Δg_k = ∇_x L(x + h v_k) - ∇_x L(x)

and the measures are means over the probes:

* ``curvature`` = mean of :math:`‖Δg_k‖_2`, as in the released code of the method;
* ``curvature_sq`` = mean of :math:`‖Δg_k‖_2^2`, eq. 14 of Garg, Ravikumar & Roy, "Memorization
  through the lens of curvature of loss function around samples", ICML 2024;
* ``directional_eig`` = mean of :math:`(h v_k)·Δg_k`.

The clean gradient is computed once and shared by all probes. Parameters take no gradient, so one
input gradient costs two forward passes' worth of arithmetic, and a sample 2 (n + 1) of them.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.base import Measures, ProbeMeans, SampleLoss
from daskcurv.estimators.clean import CleanPass, clean_measures
from daskcurv.estimators.logits import input_gradient
from daskcurv.estimators.probes import draw_probe
from daskcurv.estimators.tracing import folded, some


class FiniteDifference:
    """Direct finite differences; see the module docstring for the definition.

    Parameters
    ----------
    model : nn.Module
        In eval mode, parameters frozen.
    loss : SampleLoss
    config : EstimatorConfig
    """

    method = "finite-difference"

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig):
        self._model = model
        self._folded: nn.Module | None = None
        self._loss = loss
        self._config = config

    def __call__(
        self, images: Tensor, labels: Tensor, sample_ids: Tensor, probes: Sequence[int]
    ) -> Measures:
        """Return the measures of a batch; shapes as in :class:`~.base.Estimator`."""
        if self._folded is None:
            self._folded = folded(self._model, some(images))
        h, seed = self._config.h, self._config.seed
        network = self._folded
        clean, losses, logits = input_gradient(network, images, labels, self._loss)
        means = ProbeMeans(len(images), h, images.device)
        for k in probes:
            probe = draw_probe(sample_ids, k, images.shape[1:], seed).to(images.dtype)
            shifted, _, _ = input_gradient(network, images + h * probe, labels, self._loss)
            means.add((shifted - clean).double(), probe)
        found = CleanPass(self._loss, labels, logits, losses, clean)
        return means.means() | clean_measures(found)
