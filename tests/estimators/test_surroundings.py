"""Nothing that a process or its environment sets decides a number.

The same networks are scored in a fresh process's settings and in changed ones, by every method, and
the bits compared. Settings of precision proper are in test_scoring.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from daskcurv import score_samples, surroundings
from daskcurv.cli import main
from daskcurv.clusters import worker
from daskcurv.clusters.environment import WORKER_JOB
from daskcurv.errors import ConfigError
from daskcurv.estimators import precision
from tests.support.builders import make_model, normalise
from tests.support.project import Project

METHODS = ["finite-difference", "difference-propagation", "zeroth-order"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.layer(x[:, 0, :8, :12]).mean(1))
        return logits


class Constants(nn.Module):
    """Makes tensors without saying of what dtype or where."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3072, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1) * torch.tensor(0.1) + torch.ones(3072) / 3)
        return logits * torch.full((), 0.3)


class Denormal(nn.Module):
    """Passes through numbers below float32's normal ones."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3072, 10)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(x.flatten(1) * 1e-39 * 1e36 * 1e3)
        return logits


NETWORKS: list[Callable[[], nn.Module]] = [make_model, Attention, Constants, Denormal]


@contextmanager
def changed(change: Callable[[], Any], back: Callable[[], Any]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        back()


def default_dtype(dtype: torch.dtype) -> AbstractContextManager[None]:
    return changed(
        lambda: torch.set_default_dtype(dtype), lambda: torch.set_default_dtype(torch.float32)
    )


def flushed_denormals() -> AbstractContextManager[None]:
    return changed(lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False))


def no_onednn() -> AbstractContextManager[None]:
    library: Any = torch.backends.mkldnn
    return changed(
        lambda: setattr(library, "enabled", False), lambda: setattr(library, "enabled", True)
    )


def no_fast_path() -> AbstractContextManager[None]:
    fast = torch.backends.mha.set_fastpath_enabled
    return changed(lambda: fast(False), lambda: fast(True))


def one_kernel_of_attention() -> AbstractContextManager[None]:
    return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION)


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype float16": lambda: default_dtype(torch.float16),
    "default device": lambda: torch.device("meta"),
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "anomaly detection": lambda: torch.autograd.set_detect_anomaly(True),
    "flushed denormals": flushed_denormals,
    "no oneDNN": no_onednn,
    "no fast path": no_fast_path,
    "one kernel of attention": one_kernel_of_attention,
    "deterministic": lambda: torch.backends.cudnn.flags(deterministic=False, benchmark=True),
    "NumPy's errors": lambda: np.errstate(all="raise"),
}


@pytest.fixture(scope="module")
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4)


@pytest.fixture(scope="module")
def models() -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [build() for build in NETWORKS]


def results(models: list[nn.Module], samples: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    found = {}
    for model in models:
        for method in METHODS if model is models[0] else METHODS[::2]:
            scores = score_samples(model, *samples, n_probes=2, method=method)
            name = f"{type(model).__name__}, {method}"
            found[name] = np.stack([scores.curvature, scores.loss])
    return found


@pytest.fixture(scope="module")
def expected(models: list[nn.Module], samples: tuple[Tensor, Tensor]) -> dict[str, np.ndarray]:
    return results(models, samples)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("setting", SETTINGS.values(), ids=SETTINGS.keys())
def test_a_setting_of_the_process_changes_no_bit_and_is_put_back(
    models, samples, expected, setting
):
    def seen() -> tuple[Any, ...]:
        return (
            torch.get_default_dtype(),
            torch.get_default_device(),
            torch.is_anomaly_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.mkldnn.enabled,
            torch.backends.mha.get_fastpath_enabled(),
            torch.backends.cuda.math_sdp_enabled(),
            torch.backends.cudnn.benchmark,
            torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
            precision._flushes_denormals(),
        )

    with setting():
        before = seen()
        found = results(models, samples)
        assert seen() == before
    for name, values in expected.items():
        np.testing.assert_array_equal(found[name], values, name)


def test_images_are_normalised_in_float32_whatever_the_default():
    pixels = np.arange(3072, dtype=np.uint8).reshape(1, 3, 32, 32)
    plain = normalise(pixels)
    with default_dtype(torch.float64):
        assert torch.equal(normalise(pixels), plain)


# The environment

VARIABLES = {
    "ONEDNN_DEFAULT_FPMATH_MODE": "BF16",
    "DNNL_DEFAULT_FPMATH_MODE": "BF16",
    "NVIDIA_TF32_OVERRIDE": "1",
    "TORCHINDUCTOR_USE_FAST_MATH": "1",
}

SCORED = """
from daskcurv.cli import main
assert main(["status", "/nowhere.zarr"]) == 2
import os, torch
from daskcurv import score_samples
from tests.support.builders import make_model
torch.set_num_threads(1)
images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
score_samples(make_model(), images, [0, 1], n_probes=1, method="finite-difference")
print(sorted(name for name in os.environ if "MATH" in name or "TF32" in name))
"""

CONVOLVED = "import torch; torch.conv2d(torch.ones(2, 16, 8, 8), torch.ones(16, 16, 3, 3))"


def test_the_program_removes_variables_that_lower_precision_before_a_library_reads_them():
    """oneDNN tells how it computes; a processor without bf16 convolutions shows no other number."""
    run = subprocess.run(
        [sys.executable, "-c", SCORED],
        env={**os.environ, **VARIABLES, "ONEDNN_VERBOSE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "convolution" in run.stdout
    assert "attr-fpmath" not in run.stdout
    assert run.stdout.endswith("[]\n")
    plain = subprocess.run(
        [sys.executable, "-c", CONVOLVED],
        env={**os.environ, **VARIABLES, "ONEDNN_VERBOSE": "1"},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "attr-fpmath:bf16" in plain.stdout  # or this test could not tell


def test_workers_of_a_job_start_without_them(monkeypatch):
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv(WORKER_JOB, "")  # is put back, as the worker sets it
    started: list[str] = []
    monkeypatch.setattr(
        "distributed.cli.dask_worker.main.main", lambda *args, **kwargs: started.extend(os.environ)
    )
    worker.main(["--device", "cpu", "tls://127.0.0.1:1"])
    assert "PATH" in started
    assert not {*VARIABLES} & {*started}


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """No variable was removed yet."""
    monkeypatch.setattr(surroundings, "_removed", {})


def test_a_launch_says_what_it_removes_and_warns_of_what_it_leaves(
    fresh, project: Project, dry_launch, monkeypatch, capsys
):
    monkeypatch.setenv("DNNL_DEFAULT_FPMATH_MODE", "BF16")
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    assert dry_launch() == 0
    said = "".join(capsys.readouterr())
    assert "DNNL_DEFAULT_FPMATH_MODE=BF16 would change the precision of float32" in said
    assert "MKL_CBWR=COMPATIBLE changes the last bits of results" in said
    assert "DNNL_DEFAULT_FPMATH_MODE" not in os.environ


def test_the_doctor_names_them(fresh, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    surroundings.remove_from({"NVIDIA_TF32_OVERRIDE": "1"})
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "note  NVIDIA_TF32_OVERRIDE=1 would change the precision of float32" in said
    assert "note  ATEN_CPU_CAPABILITY=avx2 changes the last bits" in said
    assert "ok    products in float32 are float32 on this" in said


def test_float32_that_is_none_is_an_error(monkeypatch, samples, tmp_path, capsys):
    """As on a processor that multiplies in bfloat16 because a variable says so."""
    convolve = torch.conv2d

    def rounded(*arguments: Any) -> Tensor:
        return convolve(*(value.bfloat16().float() for value in arguments))

    with monkeypatch.context() as patched:
        patched.setattr(torch, "conv2d", rounded)
        lowered = precision.lowered_precision.__wrapped__(torch.device("cpu"))
    assert lowered == "convolutions"
    assert precision.lowered_precision.__wrapped__(torch.device("cpu")) == ""
    for module in ("estimators.scoring", "audit.doctor"):
        monkeypatch.setattr(f"daskcurv.{module}.lowered_precision", lambda device: lowered)
    with pytest.raises(ConfigError, match=r"float32 convolutions on this cpu .*FPMATH_MODE"):
        score_samples(make_model(), *samples, n_probes=1)
    score_samples(make_model(), samples[0].double(), samples[1], n_probes=1)
    monkeypatch.chdir(tmp_path)
    assert main(["doctor"]) == 1
    assert "FAIL  float32 convolutions on this cpu" in capsys.readouterr().out
