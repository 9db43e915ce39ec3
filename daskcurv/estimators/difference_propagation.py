r"""Curvature by propagating the difference itself.

The measures are those of `daskcurv.estimators.finite_difference`. There, Δg is the small difference
of two large gradients, and both have to be computed in full float32 to leave anything of it. Here
the network is evaluated once, in full precision, and every probe carries differences divided by h,

.. math::

    δ = v  \;→\;  δ_z  \;→\;  Γ_z  \;→\;  Γ = Δg / h,

forward through the layers, through the loss and back (`daskcurv.estimators.layers` has the rules).
They are not small differences of anything, so bfloat16 or TF32 cost their relative rounding only,
and a probe can run on a processor's matrix units.

At the loss, with logits z, temperature T and the softmax p,

.. math::

    Γ_z = \frac{p(z + h δ_z) - p(z)}{h T}

in float64, which costs next to nothing there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.base import Measures, SampleLoss
from daskcurv.estimators.kernels import KERNELS, dense
from daskcurv.estimators.network import Network
from daskcurv.estimators.precision import tensor_float32
from daskcurv.probes import draw_probe

# On a CPU, several probes of a small batch go through the network together, which shares the cost
# of bringing in the weights: so many that a pixel of one channel takes this much memory. With
# activations beyond 32 MB, which this keeps a ResNet-18 from, glibc would ask the kernel for fresh
# pages every time.
_BYTES_TOGETHER = 320


class DifferencePropagation:
    """Difference propagation; see the module docstring.

    Parameters
    ----------
    model : nn.Module
        In eval mode, parameters frozen.
    loss : SampleLoss
    config : EstimatorConfig
        Its precision is that of the differences. A float64 model has float64 differences.

    Raises
    ------
    UnsupportedError
        At the first call, naming the module that there is no rule for.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig):
        self._model, self._loss, self._config = model, loss, config
        self._network: Network | None = None

    def __call__(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> Measures:
        """Return the measures of a batch; shapes as in :class:`~.base.Estimator`."""
        KERNELS.warm_up()
        dtype = difference_dtype(self._config.precision, images.dtype)
        with torch.no_grad():
            if self._network is None:
                self._network = Network(self._model, _two(images), self._config.h, dtype, KERNELS)
            return self._measure(self._network, dtype, images, labels, sample_ids)

    def _measure(
        self, network: Network, dtype: torch.dtype, images: Tensor, labels: Tensor, ids: Tensor
    ) -> Measures:
        h, n_probes, count = self._config.h, self._config.n_probes, len(images)
        logits = network.clean(dense(images))
        losses, slope = self._loss.with_gradient(logits, labels)
        clean = network.clean_gradient(slope.to(images.dtype))

        together = 1
        if images.device.type == "cpu":
            together = max(1, _BYTES_TOGETHER // (dtype.itemsize * count))
        norm_sum = torch.zeros(count, dtype=torch.float64, device=images.device)
        square_sum, eig_sum = torch.zeros_like(norm_sum), torch.zeros_like(norm_sum)
        with tensor_float32(self._config.precision == "tf32"):
            for first in range(0, n_probes, together):
                drawn = [
                    draw_probe(ids, k, images.shape[1:], self._config.seed)
                    for k in range(first, min(first + together, n_probes))
                ]
                probes = torch.cat(drawn)
                delta = network.forward(dense(probes.to(dtype)))
                rise = self._loss.gradient_difference(logits, delta, h)
                gamma = network.backward(rise.to(dtype)).flatten(1).double() * h
                square = gamma.square().sum(dim=1).view(-1, count)
                norm_sum += square.sqrt().sum(dim=0)
                square_sum += square.sum(dim=0)
                along = (gamma * probes.flatten(1)).sum(dim=1).view(-1, count)
                eig_sum += h * along.sum(dim=0)
        return {
            "curvature": norm_sum / n_probes,
            "curvature_sq": square_sum / n_probes,
            "directional_eig": eig_sum / n_probes,
            "loss": losses,
            "grad_norm": clean.flatten(1).double().norm(dim=1),
            "prediction": self._loss.predict(logits),
        }


def _two(images: Tensor) -> Tensor:
    return images[:2] if len(images) > 1 else images.repeat(2, *[1] * (images.ndim - 1))


def difference_dtype(precision: str, clean: torch.dtype) -> torch.dtype:
    """Return the dtype of the differences for a precision and the dtype of the clean pass."""
    if clean == torch.float64:
        return torch.float64
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
