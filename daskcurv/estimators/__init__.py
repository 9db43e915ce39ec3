"""Estimators of the curvature of the loss around a sample, one module each."""

from __future__ import annotations

from daskcurv.estimators.base import Estimator, Measures, SampleLoss
from daskcurv.estimators.precision import true_float32
from daskcurv.estimators.selection import ESTIMATORS

__all__ = ["ESTIMATORS", "Estimator", "Measures", "SampleLoss", "true_float32"]
