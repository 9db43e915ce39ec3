"""Workers inside an allocation of a real SLURM, and launchers that are SLURM jobs themselves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from daskcurv.clusters.options import ClusterOptions
from daskcurv.clusters.slurm.allocation import allocation_cluster
from daskcurv.errors import ClusterError
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.crashes import finished_blocks
from tests.support.launches import assert_ok, assert_same_results, results, wait_for_blocks
from tests.support.minislurm import MiniSlurm, wait_for
from tests.support.project import REPOSITORY, Project
from tests.support.slurm import Brake, is_worker_of

SETTINGS = ("--n_probes", "10", "--block_size", "10")
INSIDE = ("--cluster", "allocation", "--device", "cpu", "--interface", "lo")
BLOCKS = 24


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("reference"))
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    assert_ok(project.launch("--workers", "2", *SETTINGS))
    return project


@pytest.fixture
def project(reference: Project, slurm: MiniSlurm, tmp_path: Path) -> Project:
    project = Project(tmp_path, slurm.environment)
    project.data, project.models = reference.data, reference.models
    return project


# What a user may have set for other programs under srun.
UNHELPFUL = {
    "SLURM_TIMELIMIT": "1", "SLURM_STDOUTMODE": "/nowhere/x", "SLURM_GRES": "gpu:9",
    "SRUN_EXPORT_ENV": "NONE", "SQUEUE_FORMAT": "%P",
}  # fmt: skip


def salloc(project: Project, brake: Brake) -> subprocess.Popen[str]:
    """Start a launch in the shell of an allocation of two nodes with one GPU each."""
    launch = [sys.executable, str(REPOSITORY / "scripts" / "launch.py")]
    arguments = project.launch_arguments(*SETTINGS, *INSIDE)
    request = ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=2", "--gres=gpu:1", "--mem=4G"]
    return subprocess.Popen(
        ["salloc", *request, *launch, *arguments],
        cwd=project.root,
        env={**(project.environment or {}), **brake.environment, **UNHELPFUL},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def registrations(project: Project) -> int:
    """How often a worker of the allocation has joined the launcher."""
    logs = (project.root / "log").glob("*_worker_*.out")
    return sum(path.read_text().count("Registered to:") for path in logs)


def finish(process: subprocess.Popen[str]) -> str:
    try:
        output, _ = process.communicate(timeout=300)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    return output


def test_an_allocation_of_two_nodes_gives_the_same_results(project, slurm, reference):
    brake = Brake(project, 60)
    process = salloc(project, brake)
    wait_for_blocks(project, process, 2)
    brake.on()
    (job,) = slurm.jobs("RUNNING")
    wait_for(lambda: registrations(project) == 2, 60)
    before = finished_blocks(project)
    workers = [p for p in psutil.process_iter() if is_worker_of(p, [job], slurm)]
    assert len(workers) == 2
    # Nanny and all: its step ends, and another takes the slot.
    nanny = workers[0].parent()
    assert nanny is not None
    for victim in (nanny, workers[0]):
        victim.kill()
    # Before then, the other worker could do all that is left.
    wait_for(lambda: registrations(project) == 3, 60)
    brake.off()
    output = finish(process)
    assert process.returncode == 0, output
    assert f"2 workers on 2 nodes of allocation {job}" in output
    assert "ignored: SLURM_GRES=gpu:9, SLURM_STDOUTMODE=/nowhere/x, " in output
    assert "ended: FAILED" in output
    assert before.items() <= finished_blocks(project).items()
    assert_same_results(results(project.store), results(reference.store))
    logs = {path.name for path in (project.root / "log").iterdir()}
    assert logs == {
        f"{job}_curvature.out",
        f"{job}_worker_node0_0.out",
        f"{job}_worker_node1_0.out",
    }
    for node in ("node0", "node1"):
        text = (project.root / "log" / f"{job}_worker_{node}_0.out").read_text()
        assert re.search(rf" {node} job {job} INFO epoch \d block \d: \d+ samples", text), text
    assert not project.store.with_name("curvature.zarr.cluster").exists()


def test_outside_an_allocation_it_is_refused(monkeypatch, tmp_path):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    options = ClusterOptions(cluster="allocation", device="cpu")
    with (
        pytest.raises(
            ClusterError, match=r"SLURM_JOB_ID is not set; start it under salloc or sbatch"
        ),
        allocation_cluster(options, tmp_path),
    ):
        pass


def test_ctrl_c_in_an_allocation_ends_all_workers(project, slurm):
    brake = Brake(project, 5)
    process = salloc(project, brake)
    wait_for_blocks(project, process, 1)
    brake.on()
    (job,) = slurm.jobs("RUNNING")
    (launcher,) = psutil.Process(process.pid).children()
    launcher.send_signal(signal.SIGINT)
    output = finish(process)
    assert process.returncode == 130, output
    assert "run the same command again to continue" in output
    assert not [p for p in psutil.process_iter() if is_worker_of(p, [job], slurm)]


def submit(project: Project, *options: str) -> tuple[str, Path]:
    run = project.launch(*SETTINGS, "--submit", *options)
    assert_ok(run)
    found = re.search(r"submitted as job (\d+); its log file will be (\S+)", run.stdout)
    assert found is not None, run.stdout
    return found[1], Path(found[2])


def test_a_submitted_launcher_submits_its_workers_and_finishes(project, slurm, reference):
    options = ("--cluster", "slurm", "--device", "cpu", "--interface", "lo", "--gpus", "2")
    job, log = submit(project, *options, "--time", "20")
    assert log == project.root / "log" / f"{job}_curvature.out"
    assert slurm.job(job)["JobName"] == "daskcurv"
    wait_for(lambda: len(slurm.jobs("RUNNING")) == 3, 60)
    assert "GRES" not in slurm.job(job) or "gpu" not in slurm.job(job)["GRES"]
    wait_for(lambda: not slurm.jobs(), 200)
    text = log.read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", text
    assert re.search(rf"node\d job {job} INFO 4 of 4 epochs complete", text), text
    assert_same_results(results(project.store), results(reference.store))


@pytest.mark.slow
def test_a_submitted_launcher_requeues_itself_on_its_time_limit(project, slurm, reference):
    options = ("--cluster", "allocation", "--device", "cpu", "--interface", "lo", "--nodes", "2")
    brake = Brake(project, 4)
    brake.on()
    job, log = submit(project, *options, "--time", "2", *brake.options)
    wait_for(lambda: slurm.job(job).get("Restarts", "0") != "0", 150)
    first = finished_blocks(project)
    assert 0 < len(first) < BLOCKS
    assert f"the time limit of job {job} is near" in log.read_text()
    assert "blocks are left; run the same command again to continue" in log.read_text()
    brake.off()
    wait_for(lambda: not slurm.jobs(), 500)
    assert slurm.job(job)["JobState"] == "COMPLETED", log.read_text()
    assert first.items() <= finished_blocks(project).items()
    assert_same_results(results(project.store), results(reference.store))


@pytest.mark.slow
def test_the_batch_script_in_the_repository_does_the_documented_run(project, slurm, reference):
    # As a user has it: a checkout, and a virtual environment in it.
    checkout = project.root / "checkout"
    checkout.mkdir()
    for name in ("scripts", "log"):
        (checkout / name).mkdir()
    for name in ("launch.py", "curvature.sbatch"):
        shutil.copy(REPOSITORY / "scripts" / name, checkout / "scripts" / name)
    (checkout / ".venv").symlink_to(sys.prefix)
    arguments = project.launch_arguments(*SETTINGS, *INSIDE)
    done = subprocess.run(
        ["sbatch", "--parsable", "scripts/curvature.sbatch", *arguments],
        cwd=checkout,
        env=project.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    job = done.stdout.strip()
    wait_for(lambda: not slurm.jobs(), 300)
    log = (checkout / "log" / f"{job}_curvature.out").read_text()
    assert slurm.job(job)["JobState"] == "COMPLETED", log
    assert f"4 workers on 2 nodes of allocation {job}" in log
    assert_same_results(results(project.store), results(reference.store))
