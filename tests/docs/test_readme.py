"""The README's Python and its commands, as printed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr

import daskcurv
from daskcurv.cli import main
from daskcurv.storage import ResultsStore
from daskcurv.storage.compact import compact
from tests.support.project import REPOSITORY

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


@pytest.mark.parametrize("compacted", [False, True])
@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("results.curvature.sel(epoch=12)", lambda values, labels: values[12]),
        ("results.curvature.sel(sample=8)", lambda values, labels: values[:, 8]),
        (
            "results.curvature.sel(sample=results.label == 3)",
            lambda values, labels: values[:, labels == 3],
        ),
        (
            'results.curvature.diff("epoch").sel(epoch=7)',
            lambda values, labels: values[7] - values[6],
        ),
    ],
)
def test_each_question_of_the_readme_has_an_answer(demo, tmp_path, line, expected, compacted):
    root, _ = demo
    path = root / "demo" / "curvature.zarr"
    assert line in TEXT
    group = zarr.open_group(path, mode="r")
    values, labels = (np.asarray(group[name]) for name in ("curvature", "label"))
    if compacted:
        compact(ResultsStore.open(path), tmp_path / "compact.zarr")
        path = tmp_path / "compact.zarr"
    answer = eval(line, {"results": daskcurv.open_results(path)})
    np.testing.assert_array_equal(answer, expected(values, labels))
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


def test_the_other_store_commands_of_the_readme_run(demo, monkeypatch):
    root, _ = demo
    monkeypatch.chdir(root)
    lines = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    # The inputs of a real run, which doctor and plan take, are not here.
    lines = [line for line in lines if re.match("daskcurv (?!plan|doctor)", line)]
    commands = [shlex.split(line)[1:] for line in lines]
    verbs = [
        "verify_class_partitioning",
        "status",
        "compact",
        "verify",
        "analyze",
        "report",
        "export",
        "export",
        "import_npy",
    ]
    assert [words[0] for words in commands] == verbs
    for words in commands:
        assert main(words) == 0
    imported = daskcurv.open_results("imported.zarr")
    assert imported.epoch.values.tolist() == [0, 6, 12]
    opened = daskcurv.open_results("demo/compact.zarr").curvature.sel(epoch=[0, 6, 12])
    np.testing.assert_array_equal(imported.curvature, opened)


def test_the_launch_command_of_the_readme_has_options_that_exist(tmp_path, monkeypatch):
    (block,) = (block for block in blocks("bash") if "--end_epoch" in block)
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


def test_the_tests_that_promises_name_exist():
    promises = (REPOSITORY / "docs" / "store.md").read_text()
    named = set(re.findall(r"`(test_\w+|Test\w+)`", promises))
    written = "".join(path.read_text() for path in (REPOSITORY / "tests").rglob("*.py"))
    assert named
    assert [
        name for name in named if not re.search(rf"(def|class) {name}|^{name} =", written, re.M)
    ] == []
