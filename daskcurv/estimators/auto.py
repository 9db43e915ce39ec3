"""The fast method if it applies and passes a self-check, else the direct one."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.base import Estimator, Measures, SampleLoss
from daskcurv.estimators.difference_propagation import DifferencePropagation
from daskcurv.estimators.finite_difference import FiniteDifference
from daskcurv.estimators.tracing import first_line

log = logging.getLogger(__name__)

CHECK_SAMPLES = 8
CHECK_PROBES = 4
MEDIAN_ERROR = 0.01
WORST_ERROR = 0.5
"""Largest accepted difference of the curvature from the direct method, in the self-check.

Far above the effect of rounding (see docs/estimators.md), far below the effect of a wrong rule.
"""


class Auto:
    """Difference propagation if it passes a self-check, else direct finite differences.

    The check compares the two on the first samples of the first batch (or those given to `choose`).
    Which method is used, and why not the fast one, goes to the log.

    Parameters
    ----------
    model : nn.Module
        In eval mode, parameters frozen.
    loss : SampleLoss
    config : EstimatorConfig

    Attributes
    ----------
    chosen : Estimator or None
        None before the first call.
    """

    def __init__(self, model: nn.Module, loss: SampleLoss, config: EstimatorConfig):
        self._direct = FiniteDifference(model, loss, config)
        self._fast = DifferencePropagation(model, loss, config)
        self._given_up = ""
        self.chosen: Estimator | None = None

    def __call__(
        self, images: Tensor, labels: Tensor, sample_ids: Tensor, probes: Sequence[int]
    ) -> Measures:
        """Return the measures of a batch; shapes as in :class:`~.base.Estimator`."""
        if self.chosen is None:
            first = slice(CHECK_SAMPLES)
            self.choose(images[first], labels[first], sample_ids[first])
        if self.chosen is self._fast:
            try:
                return self._fast(images, labels, sample_ids, probes)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                # Earlier batches passed all checks, so they stand.
                self._given_up = self._fast.method
                self._use_direct(first_line(error))
        return self._direct(images, labels, sample_ids, probes)

    @property
    def method(self) -> str:
        """The methods of all results so far; empty before the first choice."""
        if self.chosen is None:
            return ""
        return "; ".join(filter(None, (self._given_up, self.chosen.method)))

    def choose(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> None:
        """Compare the methods on some samples, and choose."""
        if problem := self._problem(images, labels, sample_ids):
            self._use_direct(problem)
        else:
            self.chosen = self._fast

    def _use_direct(self, problem: str) -> None:
        log.warning("direct finite differences instead of difference propagation: %s", problem)
        self.chosen = self._direct

    def _problem(self, images: Tensor, labels: Tensor, sample_ids: Tensor) -> str | None:
        sample = images, labels, sample_ids, range(CHECK_PROBES)
        try:
            fast = self._fast(*sample)["curvature"]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            # Most name an operation without a rule. But whatever keeps the fast method from working
            # is no reason not to use the direct one, which fails in its turn if it is the network.
            return first_line(error)
        direct = self._direct(*sample)["curvature"]
        # Where the loss does not change at all, both are exactly 0.
        scale = direct.clamp(min=torch.finfo(direct.dtype).tiny)
        errors = ((fast - direct).abs() / scale).nan_to_num(nan=torch.inf)
        median, worst = errors.median().item(), errors.max().item()
        if median <= MEDIAN_ERROR and worst <= WORST_ERROR:
            return None
        return (
            f"in the self-check on {len(images)} samples they differ by {median:.1%} (median), "
            f"{worst:.1%} (worst)"
        )
