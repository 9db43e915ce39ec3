"""The benchmarks of curvature run, and report every method; their figures are not looked at."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys

from matplotlib.image import imread

from daskcurv.estimators import ESTIMATORS
from tests.support.project import REPOSITORY

COMPARED = {
    "released, default",
    "released, float32",
    "direct, float32",
    "difference propagation, float32",
    "difference propagation, bfloat16",
    *(["zeroth-order, float32"] if "zeroth-order" in ESTIMATORS else []),
}
VARIANTS = {
    "standard (h = 1e-3)", "h = 1e-4", "h = 1e-2", "5 active of 100 outputs", "temperature 2",
    "no normalisation", "softplus for ReLU", "VGG-11",
}  # fmt: skip
LIMITS = {"bare convolutions, float32", "bare convolutions, bfloat16"}


def test_the_benchmark_of_the_estimators_reports_every_method(tmp_path):
    out, picture = tmp_path / "new" / "results.json", tmp_path / "results.png"
    command = [
        sys.executable, REPOSITORY / "benchmarks" / "estimators.py", "--device", "cpu",
        "--threads", "1", "--width", "4", "--batch_sizes", "4", "--rounds", "1", "--n_probes", "2",
        "--samples", "4", "--train_steps", "4", "--no_compile",
        "--out", out, "--plot", picture,
    ]  # fmt: skip
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr

    result = json.loads(out.read_text())
    assert {row["method"] for row in result["speed"]} == COMPARED | LIMITS
    for row in result["speed"]:
        for name in ("ms_per_sample", "samples_per_second", "ratio", "share_of_limit"):
            assert 0 < row[name] < math.inf, (row["method"], name)
    assert list(result["errors"]) == ["early", "middle", "late"]
    for errors in result["errors"].values():
        assert set(errors) == COMPARED
        for method, error in errors.items():
            assert 0 < error["median"] <= error["worst"] < math.inf, method
    for errors in result["errors"].values():
        # The methods that compute the same quantity; this also shows that probes and scale agree.
        for method in COMPARED - {"zeroth-order, float32"}:
            assert errors[method]["median"] < 0.1, method
    # The command started itself again with the memory settings of workers.
    assert all(result["environment"]["malloc"].values())
    assert not result["skipped"]
    assert not result["warnings"]

    lines = run.stdout.splitlines()
    assert lines[0].startswith("method ")
    for method in COMPARED | LIMITS:
        assert any(line.startswith(method) for line in lines), method
    assert imread(picture)[..., :3].std() > 0.05, "the picture is blank"


def test_the_benchmark_of_the_estimators_can_be_limited_to_some_methods(tmp_path):
    out = tmp_path / "results.json"
    names = ["direct, float32", "difference propagation, float32"]
    command = [
        sys.executable, REPOSITORY / "benchmarks" / "estimators.py", "--device", "cpu",
        "--threads", "1", "--width", "4", "--batch_sizes", "2", "--rounds", "1", "--n_probes", "2",
        "--samples", "2", "--train_steps", "3", "--no_compile", "--out", out, "--methods",
    ]  # fmt: skip
    run = subprocess.run([*command, *names], capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["speed"]] == names
    assert all(list(errors) == names for errors in result["errors"].values())

    run = subprocess.run([*command, "direct"], capture_output=True, text=True, timeout=600)
    assert run.returncode != 0
    assert "['direct'] not among ['released, default'" in run.stderr


def test_the_benchmark_of_variants_reports_every_variant(tmp_path):
    out = tmp_path / "new" / "variants.json"
    command = [
        sys.executable, REPOSITORY / "benchmarks" / "variants.py", "--width", "4",
        "--samples", "4", "--n_probes", "2", "--train_steps", "4", "--out", out,
    ]  # fmt: skip
    # Two threads of each of two programs on two cores would mostly wait for each other.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    assert set(result["errors"]) == VARIANTS
    for variant, errors in result["errors"].items():
        for method, error in errors.items():
            assert 0 < error["median"] <= error["worst"] < math.inf, (variant, method)
            # Same quantity, same probes, same classes.
            if "TF32" not in method:
                assert error["median"] < 0.02, (variant, method)
    assert all(variant in run.stdout for variant in VARIANTS)
