"""Estimators of the curvature of the loss around a sample, one module each."""

from __future__ import annotations

from daskcurv.errors import ConfigError
from daskcurv.estimators.auto import Auto, settle
from daskcurv.estimators.base import Estimator, Measures, SampleLoss
from daskcurv.estimators.difference_propagation import DifferencePropagation
from daskcurv.estimators.finite_difference import FiniteDifference
from daskcurv.estimators.precision import true_float32
from daskcurv.estimators.zeroth_order import ZerothOrder

ESTIMATORS: dict[str, type[Estimator]] = {
    "auto": Auto,
    "difference-propagation": DifferencePropagation,
    "finite-difference": FiniteDifference,
    "zeroth-order": ZerothOrder,
}


def get_estimator(method: str) -> type[Estimator]:
    """Return the estimator called `method`, or raise `ConfigError` with the known methods."""
    try:
        return ESTIMATORS[method]
    except KeyError:
        known = ", ".join(sorted(ESTIMATORS))
        raise ConfigError(f"method is {method!r}; expected one of: {known}") from None


__all__ = [
    "ESTIMATORS",
    "Auto",
    "Estimator",
    "Measures",
    "SampleLoss",
    "get_estimator",
    "settle",
    "true_float32",
]
