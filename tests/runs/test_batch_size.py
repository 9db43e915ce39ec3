"""The batch size of a GPU is measured once and remembered."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from daskcurv.config import EstimatorConfig
from daskcurv.estimators.scoring import Scorer
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.runs.block import BATCH_SIZES, Worker
from tests.support.builders import make_model
from tests.support.launches import make_store, run_context


@pytest.mark.parametrize(
    ("rates", "expected"),
    [
        ({4: 10.0, 8: 20.0, 16: 30.0}, 16),
        ({4: 10.0, 8: 20.0, 16: 20.1}, 8),
        ({4: 10.0, 8: 5.0, 16: 90.0}, 4),
        ({4: 10.0, 8: 20.0, 16: None}, 8),
    ],
    ids=["ever faster", "no gain", "slower", "out of memory"],
)
def test_the_fastest_batch_size_is_kept(monkeypatch, rates, expected):
    scorer = Scorer(make_model(), EstimatorConfig(n_probes=1, method="finite-difference"))
    clock = [0.0]

    def score(images, labels, ids):
        rate = rates[len(images)]
        if rate is None:
            scorer.batch_size //= 2
        clock[0] += len(images) / (rate or 1000.0)

    monkeypatch.setattr(scorer, "score", score)
    monkeypatch.setattr("daskcurv.estimators.scoring.time.perf_counter", lambda: clock[0])
    sample = torch.zeros(3, 3, 32, 32), torch.zeros(3), torch.arange(3)
    scorer.tune_batch_size(*sample, candidates=(4, 8, 16))
    assert scorer.batch_size == expected


def test_a_measured_batch_size_is_remembered_for_its_device_and_method(project, monkeypatch):
    cifar = read_cifar(project.data)
    store = make_store(project.root / "store", cifar, block_size=10)
    shared = project.root / "inputs"
    context = run_context(store.path, cifar, shared, EstimatorConfig(method="finite-difference"))
    measured = []

    def tune(scorer: Scorer, *sample: torch.Tensor) -> None:
        measured.append(scorer.method)
        scorer.batch_size = 77

    monkeypatch.setattr(Scorer, "tune_batch_size", tune)

    def chosen(method: str) -> int:
        scorer = Scorer(make_model(), EstimatorConfig(method=method, n_probes=2))
        Worker(context)._set_batch_size(scorer, np.arange(5))
        return scorer.batch_size

    assert chosen("finite-difference") == chosen("finite-difference") == 77
    assert measured == ["finite-difference"]
    assert chosen("zeroth-order") == 77
    assert measured == ["finite-difference", "zeroth-order"]
    path: Path = shared / BATCH_SIZES
    assert len(json.loads(path.read_text())) == 2
    assert sorted(p.name for p in path.parent.iterdir()) == sorted(
        [BATCH_SIZES, cifar.digest()[:16]]
    )
