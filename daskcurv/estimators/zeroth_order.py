r"""Curvature from losses alone, for networks without usable gradients.

For a pair of independent Rademacher probes u, v, four losses around the sample give

.. math::

    q = \frac{L(x + hv + hu) - L(x + hv - hu) - L(x - hv + hu) + L(x - hv - hu)}{4 h^2}
      ≈ v^T H u

with the Hessian H of the loss. This is the second difference behind the zeroth-order (black-box)
estimate of input loss curvature in Ravikumar, Soufleri & Roy, "Curvature clues: decoding deep
learning privacy with input loss curvature", NeurIPS 2024. As the entries of u and v have mean 0 and
variance 1, the mean of q² is tr(H²), which is also that of ‖Hv‖². On the scale of the gradient
estimators, with probes 2k and 2k + 1 as the k-th pair, the measures therefore are

* ``curvature_sq`` = mean over the pairs of (h q)², with the same expectation as theirs where the
  loss is smooth;
* ``curvature`` = mean over the pairs of \|h q\|; smaller than theirs, by about √(2/π) = 0.80,
  as q is a nearly Gaussian projection of Hv.

``directional_eig`` and ``grad_norm`` need gradients and are NaN.

A network of ReLUs is piecewise linear, so here too it is the kinks within the step that count. The
losses agree in their first digits: in float32 a rounding error ε of the loss becomes ε/4h² in q.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.base import Measures, SampleLoss
from daskcurv.estimators.clean import CleanPass, clean_measures
from daskcurv.estimators.logits import logits_of
from daskcurv.estimators.probes import draw_probe
from daskcurv.estimators.tracing import folded, some


class ZerothOrder:
    """Second differences of the loss; see the module docstring for the definition.

    Parameters
    ----------
    model : nn.Module
        In eval mode.
    loss : SampleLoss
    config : EstimatorConfig
    """

    method = "zeroth-order"

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig):
        self._model, self._loss, self._config = model, loss, config
        self._folded: nn.Module | None = None

    def __call__(
        self, images: Tensor, labels: Tensor, sample_ids: Tensor, probes: Sequence[int]
    ) -> Measures:
        """Return the measures of a batch; shapes as in :class:`~.base.Estimator`."""
        h, seed, shape = self._config.h, self._config.seed, images.shape[1:]
        if self._folded is None:
            self._folded = folded(self._model, some(images))
        network = self._folded
        with torch.no_grad():
            logits = logits_of(network, images)
            losses = self._loss(logits, labels)
            total, square = torch.zeros_like(losses), torch.zeros_like(losses)
            for k in probes[::2]:
                v, u = (
                    h * draw_probe(sample_ids, i, shape, seed).to(images.dtype) for i in (k, k + 1)
                )
                change = torch.zeros_like(losses)
                for sign, step in ((1, v + u), (-1, v - u), (-1, u - v), (1, -v - u)):
                    change += sign * self._loss(logits_of(network, images + step), labels)
                value = change / (4 * h)
                total += value.abs()
                square += value.square()
        pairs = len(probes) // 2
        means = {
            "curvature": total / pairs,
            "curvature_sq": square / pairs,
            "directional_eig": torch.full_like(losses, torch.nan),
        }
        return means | clean_measures(CleanPass(self._loss, labels, logits, losses, None))
