"""Jobs that can never work on a real SLURM: one message with SLURM's reason, and nothing left."""

from __future__ import annotations

import textwrap
import time
from pathlib import Path

import pytest

from tests.builders import write_checkpoints, write_cifar
from tests.conftest import Project
from tests.minislurm import MiniSlurm

ON_SLURM = ("--cluster", "slurm", "--interface", "lo", "--gpus", "2")
ON_CPU = ("--device", "cpu")


@pytest.fixture
def project(slurm: MiniSlurm, tmp_path: Path) -> Project:
    project = Project(tmp_path, slurm.environment)
    write_cifar(project.data)
    write_checkpoints(project.models, [0])
    return project


def refused(project: Project, slurm: MiniSlurm, *arguments: str) -> str:
    """Launch, expect a refusal within a minute or so of the evidence, and return the message."""
    started = time.monotonic()
    run = project.launch(*ON_SLURM, *arguments)
    assert run.returncode == 2, run.stdout
    assert time.monotonic() - started < 120
    assert slurm.jobs() == []
    assert not project.store.with_name("curvature.zarr.cluster").exists()
    assert "Traceback" not in run.stdout
    return run.stdout[run.stdout.rindex("error: ") :]


def test_a_wrong_partition(project, slurm):
    message = refused(project, slurm, *ON_CPU, "--partition", "nowhere")
    assert "no worker could be started; given up after 3 tries" in message
    assert "invalid partition specified: nowhere" in message


def test_more_memory_than_any_node_has(project, slurm):
    message = refused(project, slurm, *ON_CPU, "--mem_per_gpu", "900G")
    assert "Memory specification can not be satisfied" in message


def test_a_time_limit_beyond_the_partition_s(project, slurm):
    message = refused(project, slurm, *ON_CPU, "--partition", "short", "--time", "60")
    assert "will never start: SLURM lets it wait for the reason PartitionTimeLimit" in message
    assert "--time" in message


def test_a_worker_environment_without_the_package(project, slurm):
    # A site-wide start-up file that takes the package away, as another Python would lack it.
    hidden = project.root / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import os, sys
            sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f).lower()]
            sys.path = [p for p in sys.path if not os.path.isdir(os.path.join(p, "daskcurv"))]
            """
        )
    )
    message = refused(project, slurm, *ON_CPU, "--prologue", f"export PYTHONPATH={hidden}")
    assert "ended: FAILED, exit status 1" in message
    assert "No module named 'daskcurv'" in message


def test_a_missing_module_in_the_prologue(project, slurm):
    message = refused(project, slurm, *ON_CPU, "--prologue", "module load no-such-thing")
    assert "ended: FAILED" in message
    assert "module" in message.splitlines()[-1]


def test_jobs_that_start_without_a_gpu(project, slurm):
    message = refused(project, slurm)
    assert "exit status 90" in message
    assert "no GPU is visible to PyTorch" in message or "without CUDA" in message
    assert "--device cpu" in message or "install a build" in message
