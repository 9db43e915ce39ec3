"""Curvature of the loss around every training sample, at every epoch.

``score_samples`` and ``rademacher_probes`` are the estimator; ``keep`` saves the weights of an
epoch while a network is trained; ``compute`` computes all of an ``Experiment`` into a results
store, and ``open_results`` reads it. The ``daskcurv`` command and ``scripts/launch.py`` do the same
from files and options.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from daskcurv.estimators.probes import rademacher_probes as rademacher_probes
    from daskcurv.estimators.scoring import SampleScores as SampleScores
    from daskcurv.estimators.scoring import score_samples as score_samples
    from daskcurv.experiment.experiment import Experiment as Experiment
    from daskcurv.recording import keep as keep
    from daskcurv.runs.compute import compute as compute
    from daskcurv.storage.read import open_results as open_results

__version__ = version("daskcurv")

__all__ = [
    "score_samples",
    "rademacher_probes",
    "SampleScores",
    "open_results",
    "keep",
    "compute",
    "Experiment",
]

_HOMES = {
    "score_samples": "daskcurv.estimators.scoring",
    "SampleScores": "daskcurv.estimators.scoring",
    "rademacher_probes": "daskcurv.estimators.probes",
    "open_results": "daskcurv.storage.read",
    "keep": "daskcurv.recording",
    "compute": "daskcurv.runs.compute",
    "Experiment": "daskcurv.experiment.experiment",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: reading a store must not need torch, nor scoring zarr.
    from importlib import import_module

    if name == "analysis":
        return import_module("daskcurv.analysis")
    if name not in _HOMES:
        raise AttributeError(f"module 'daskcurv' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__", "analysis"])
