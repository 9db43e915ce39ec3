"""What only a GPU shows; skipped where there is none."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from daskcurv import open_results, score_samples
from daskcurv.config import EstimatorConfig
from daskcurv.estimators.scoring import Scorer
from tests.support.builders import make_model
from tests.support.project import Project

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")

SAMPLES = 64


@pytest.fixture
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(SAMPLES, 3, 32, 32, generator=generator)
    return images, torch.randint(10, (SAMPLES,), generator=generator), torch.arange(SAMPLES)


def median_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.median(np.abs(found / expected - 1)))


@pytest.mark.parametrize(
    ("method", "precision", "most"),
    [
        ("finite-difference", "auto", 1e-3),
        ("difference-propagation", "float32", 1e-3),
        ("difference-propagation", "tf32", 1e-3),
        ("difference-propagation", "bfloat16", 1e-2),
    ],
)
def test_no_method_lets_tf32_into_a_difference(inputs, method, precision, most, monkeypatch):
    """TF32 for both gradients would err by 3 to 17 %."""
    expected = score_samples(make_model(), inputs[0].double(), inputs[1], device="cpu")
    for knob in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):  # type: ignore[attr-defined]
        monkeypatch.setattr(knob, "fp32_precision", "tf32")
    found = score_samples(
        make_model(), *inputs[:2], device="cuda", method=method, precision=precision
    )
    assert median_error(found.curvature, expected.curvature) < most
    assert median_error(found.loss, expected.loss) < 1e-5
    assert median_error(found.grad_norm, expected.grad_norm) < 1e-5
    assert (found.prediction == expected.prediction).all()


def test_the_same_batches_give_the_same_bits(inputs):
    first, second = (
        score_samples(make_model(), *inputs[:2], device="cuda", batch_size=24) for _ in range(2)
    )
    assert (first.curvature == second.curvature).all()
    assert (first.loss == second.loss).all()


def test_a_batch_that_does_not_fit_is_halved_until_it_does(inputs, caplog):
    config = EstimatorConfig(method="finite-difference", n_probes=1)
    scorer = Scorer(make_model(), config, device="cuda", batch_size=1 << 22)
    with caplog.at_level(logging.WARNING):
        found = scorer.score(*inputs)
    assert scorer.batch_size < 1 << 22
    assert "is out of memory; batch size is now" in caplog.text
    few = Scorer(make_model(), config, device="cuda", batch_size=SAMPLES).score(*inputs)
    assert median_error(found.curvature, few.curvature) < 1e-3


def test_a_gpu_in_order_passes_its_check():
    torch.cuda.empty_cache()
    check = subprocess.run(
        [sys.executable, "-m", "daskcurv.clusters.gpu_check"],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (check.returncode, check.stdout) == (0, ""), check.stderr


def test_a_run_on_a_gpu_and_one_on_cores_agree(project: Project):
    runs = {}
    for device in ("cuda", "cpu"):
        run = project.launch(
            "--device", device, "--workers", "1", "--precision", "bfloat16",
            "--store", str(project.root / f"{device}.zarr"),
            "--save_base_dir", str(project.root / f"tree-{device}"),
        )  # fmt: skip
        assert run.returncode == 0, run.stdout
        runs[device] = open_results(project.root / f"{device}.zarr").load()
    gpu, cpu = runs["cuda"], runs["cpu"]
    assert (gpu.status == cpu.status).all()
    done = (gpu.status == 1).values
    assert median_error(gpu.curvature.values[done], cpu.curvature.values[done]) < 1e-2
    assert median_error(gpu.loss.values[done], cpu.loss.values[done]) < 1e-5
