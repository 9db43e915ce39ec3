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

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.base import Measures, ProbeMeans, SampleLoss
from daskcurv.estimators.clean import CleanPass, clean_measures
from daskcurv.estimators.kernels import KERNELS, dense
from daskcurv.estimators.logits import input_gradient, logits_of, relative_error
from daskcurv.estimators.network import Network
from daskcurv.estimators.precision import tensor_float32
from daskcurv.estimators.probes import draw_probe
from daskcurv.estimators.tracing import UnsupportedError, some

# On a CPU, several probes of a small batch go through the network together, which shares the cost
# of bringing in the weights: so many that a pixel of one channel takes this much memory. With
# activations beyond 32 MB, which this keeps a ResNet-18 from, glibc would ask the kernel for fresh
# pages every time.
_BYTES_TOGETHER = 320

# What the clean pass may differ from the network by, relative to the largest logit or gradient: far
# more than rounding does, far less than another function would.
_TOLERANCES = {torch.float32: 1e-3, torch.float64: 1e-8}
_GRADIENT_TOLERANCE = 0.05
_GRADIENTS_CHECKED = 32


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
        At the first call, naming the operation that there is no rule for; or, at the first call
        with a batch of some size, if the clean pass is not what the network itself gives.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig):
        self._model, self._loss, self._config = model, loss, config
        self.method = f"difference-propagation, {config.precision}"
        self._network: Network | None = None
        self._sample_shape: torch.Size | None = None
        self._checked: set[int] = set()

    def __call__(
        self, images: Tensor, labels: Tensor, sample_ids: Tensor, probes: Sequence[int]
    ) -> Measures:
        """Return the measures of a batch; shapes as in :class:`~.base.Estimator`."""
        KERNELS.warm_up(images.device)
        h, seed = self._config.h, self._config.seed
        dtype = difference_dtype(self._config.precision, images.dtype)
        with torch.no_grad():
            network = self._network_for(images, dtype)
            logits = network.clean(dense(images))
            losses, slope = self._loss.with_gradient(logits, labels)
            clean = network.clean_gradient(slope.to(images.dtype))
            if len(images) not in self._checked:
                self._check(images, labels, logits, losses, clean)
                self._checked.add(len(images))
            means = ProbeMeans(len(images), h, images.device)
            with tensor_float32(self._config.precision == "tf32"):
                for part in _split(probes, _most_together(images, dtype)):
                    probe = torch.cat(
                        [draw_probe(sample_ids, k, images.shape[1:], seed) for k in part]
                    )
                    delta = network.forward(dense(probe.to(dtype)))
                    rise = self._loss.gradient_difference(logits, delta, h)
                    gamma = network.backward(rise.to(dtype))
                    means.add(gamma.double() * h, probe)
            found = CleanPass(self._loss, labels, logits, losses, clean)
            return means.means() | clean_measures(found)

    def _network_for(self, images: Tensor, dtype: torch.dtype) -> Network:
        if self._network is None or self._sample_shape != images.shape[1:]:
            self._network = Network(self._model, some(images), self._config.h, dtype, KERNELS)
            self._sample_shape = images.shape[1:]
            self._checked.clear()
        return self._network

    def _check(
        self, images: Tensor, labels: Tensor, logits: Tensor, losses: Tensor, gradient: Tensor
    ) -> None:
        """Compare the clean pass with the network itself, for each size of batch once.

        Raises
        ------
        UnsupportedError
            If the network taken apart is another function.
        """
        expected = logits_of(self._model, images)
        tolerance = _TOLERANCES[images.dtype]
        # A loss is off by no more than twice what the logits, over the temperature, are.
        size = 1 + expected.abs().max() / self._config.temperature
        off = (losses - self._loss(expected, labels)).abs().max() / size
        # Of gradients a few do, as autograd keeps all activations for them. A kink that rounding
        # decides the other way changes one by a few per cent.
        few = slice(_GRADIENTS_CHECKED)
        slope, _, _ = input_gradient(self._model, images[few], labels[few], self._loss)
        turn = (gradient[few] - slope).double().norm() / slope.double().norm()
        for what, error, most in (
            ("logits", relative_error(logits, expected), tolerance),
            ("losses", off.item(), 2 * tolerance),
            ("input gradients", turn.item(), _GRADIENT_TOLERANCE),
        ):
            if error > most:
                raise UnsupportedError(
                    f"{type(self._model).__name__} decomposed has different {what} from the "
                    f"network itself: they differ by {error:.1%} in a batch of {len(images)}"
                )


def _most_together(images: Tensor, dtype: torch.dtype) -> int:
    if images.device.type != "cpu":
        return 1
    return max(1, _BYTES_TOGETHER // (dtype.itemsize * len(images)))


def _split(probes: Sequence[int], most: int) -> list[Sequence[int]]:
    """Return `probes` in parts of at most `most`, as equal as can be."""
    parts = -(-len(probes) // most)
    cuts = [round(part * len(probes) / parts) for part in range(parts + 1)]
    return [probes[start:stop] for start, stop in pairwise(cuts)]


def difference_dtype(precision: str, clean: torch.dtype) -> torch.dtype:
    """Return the dtype of the differences for a precision and the dtype of the clean pass."""
    if clean == torch.float64:
        return torch.float64
    return torch.bfloat16 if precision == "bfloat16" else torch.float32
