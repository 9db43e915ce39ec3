"""The README's Python and its commands, as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import daskcurv
from tests.conftest import REPOSITORY

TEXT = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, re.DOTALL)


def test_the_python_of_the_readme_runs(demo, monkeypatch, capsys):
    root, _ = demo
    monkeypatch.chdir(root)
    namespace: dict[str, object] = {}
    assert len(blocks("python")) == 3
    for code in blocks("python"):
        exec(compile(code, "README.md", "exec"), namespace)
    top = namespace["most_curved"]
    results = daskcurv.open_results(root / "demo" / "curvature.zarr")
    expected = np.argsort(-results.curvature.sel(epoch=12).values)[:10]
    assert list(top.index) == expected.tolist()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("line", "shape"),
    [
        ("results.curvature.sel(epoch=12)", (1797,)),
        ("results.curvature.sel(sample=8)", (13,)),
        ('results.curvature.where(results.label == 3).mean("sample")', (13,)),
        ('results.curvature.diff("epoch").sel(epoch=7).mean()', ()),
    ],
)
def test_each_question_of_the_readme_has_an_answer(demo, line, shape):
    root, _ = demo
    assert line in TEXT
    results = daskcurv.open_results(root / "demo" / "curvature.zarr")
    answer = eval(line, {"results": results}).compute()
    assert answer.shape == shape
    assert np.isfinite(answer).any()


def test_the_export_command_of_the_readme_runs(demo):
    root, _ = demo
    (command,) = (line for line in TEXT.splitlines() if "export_npy.py demo/" in line)
    words = shlex.split(command)
    assert words[:2] == ["python", "scripts/export_npy.py"]
    subprocess.run(
        [sys.executable, REPOSITORY / words[1], *words[2:]], cwd=root, check=True, timeout=120
    )
    exported = sorted(p.name for p in (root / "exported").iterdir())
    assert exported == ["epoch_0000", "epoch_0006", "epoch_0012"]


def test_the_launch_command_of_the_readme_has_options_that_exist(tmp_path, monkeypatch):
    (block,) = (block for block in blocks("bash") if "--start_epoch" in block)
    words = shlex.split(block.replace("\\\n", " "))
    (data_path,) = (Path(words[i + 1]) for i, word in enumerate(words) if word == "--data_path")
    assert data_path == Path("data/cifar-100-python")
    run = subprocess.run(
        [sys.executable, REPOSITORY / words[1], *words[2:]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert "model directory results2/base_deep_learning_system/model_parameters" in run.stderr
