"""Jobs that can never work on a real SLURM: one message with SLURM's reason, and nothing left."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from daskcurv.cli import main
from daskcurv.clusters.options import ClusterOptions
from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm.commands import SlurmError
from daskcurv.clusters.slurm.job_script import job_script
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.minislurm import MiniSlurm, wait_for
from tests.support.project import Project

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


def test_jobs_that_start_without_a_gpu(project, slurm):
    # On one node: once it has failed its check three times, SLURM has no other, and refuses more
    # unless enough were started before. Which comes first is for the timing to say; tests/
    # test_fleet.py has both.
    message = refused(project, slurm, "--sbatch_extra=--nodelist=node0")
    assert "no worker could be started; given up after" in message
    assert "on node0 ended: FAILED, exit status 90" in message
    assert "no GPU is visible to PyTorch" in message or "without CUDA" in message
    assert "--device cpu" in message or "install a build" in message


@pytest.fixture
def login_node(slurm: MiniSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process sees the cluster, as a launcher does."""
    monkeypatch.setenv("PATH", slurm.environment["PATH"])
    monkeypatch.setenv("SLURM_CONF", str(slurm.conf))
    monkeypatch.chdir(tmp_path)


def submit_worker(tmp_path: Path, **asked: Any) -> str:
    script = tmp_path / "script.sh"
    script.write_text(job_script(ClusterOptions(cluster="slurm", device="cpu", **asked)))
    return slurm_commands.submit(script)


def test_more_memory_than_any_node_has(login_node, tmp_path):
    with pytest.raises(SlurmError, match="Memory specification can not be satisfied") as refusal:
        submit_worker(tmp_path, mem_per_gpu="900G")
    assert not refusal.value.transient


def test_a_time_limit_beyond_the_partition_s(login_node, tmp_path):
    # What ends a launch then is in tests/clusters/test_slurm_commands.py.
    job = submit_worker(tmp_path, partition="short", time="60")
    wait_for(lambda: slurm_commands.queue("", [job])[job].reason == "PartitionTimeLimit", 30)


def test_a_submission_that_is_refused_says_why(login_node, project, capsys):
    options = ("--submit", "--cluster", "slurm", "--partition", "nowhere")
    assert main(["launch", *project.launch_arguments(*options)]) == 2
    text = "SLURM did not accept the job: invalid partition specified: nowhere"
    assert text in capsys.readouterr().err
