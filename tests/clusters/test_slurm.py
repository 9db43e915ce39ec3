"""Launches on a real SLURM, and everything a cluster does to their jobs.

The reference for every comparison is an undisturbed run on local workers, bit for bit.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from tests.support.builders import write_checkpoints, write_cifar
from tests.support.crashes import finished_blocks
from tests.support.launches import assert_ok, assert_same_results, results, wait_for_blocks
from tests.support.minislurm import MiniSlurm, wait_for
from tests.support.project import Project
from tests.support.slurm import HOSTILE, Brake, is_worker_of

ON_SLURM = ("--cluster", "slurm", "--device", "cpu", "--interface", "lo", "--time", "30")
SETTINGS = ("--n_probes", "40", "--block_size", "10")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("inputs"))
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    return project


@pytest.fixture(scope="module")
def reference(inputs: Project, tmp_path_factory: pytest.TempPathFactory) -> Project:
    project = Project(tmp_path_factory.mktemp("reference"))
    project.data, project.models = inputs.data, inputs.models
    assert_ok(project.launch("--workers", "2", *SETTINGS))
    return project


@pytest.fixture
def project(inputs: Project, slurm: MiniSlurm, tmp_path: Path) -> Project:
    project = Project(tmp_path, slurm.environment)
    project.data, project.models = inputs.data, inputs.models
    return project


@contextmanager
def launched(project: Project, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A launch in progress; one that is not at its end in the end is killed."""
    arguments = project.launch_arguments(*SETTINGS, *ON_SLURM, *options)
    process = project.start("launch", *arguments)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


@pytest.fixture
def running(project: Project, slurm: MiniSlurm) -> Iterator[subprocess.Popen[str]]:
    """A launch on two SLURM jobs: some blocks done, most not."""
    with launched(project, "--gpus", "2") as process:
        wait_for_blocks(project, process, 2)
        yield process


def worker_logs(project: Project) -> str:
    return "".join(path.read_text() for path in (project.root / "log").glob("*_worker.out"))


def credentials(project: Project) -> Path:
    return project.store.with_name("curvature.zarr.cluster")


def test_the_main_job_runs_to_the_end_as_asked_for_whatever_the_user_s_environment_says(
    project, slurm, reference
):
    asked = (
        *("--gpus", "2", "--cpus_per_gpu", "3", "--mem_per_gpu", "2G"),
        *("--partition", "low", "--gres", "gpu:1"),
    )
    project.environment.update(HOSTILE, SBATCH_PARTITION="high", SBATCH_TIMELIMIT="7")
    with launched(project, *asked) as process:
        wait_for(lambda: len(slurm.jobs("RUNNING")) == 2, 60)
        for job in map(slurm.job, slurm.jobs("RUNNING")):
            assert job["JobName"].startswith("daskcurv-")
            assert job["GRES"].startswith("gpu:1"), job
            assert job["NumNodes"] == "1"
            assert job["NumCPUs"] == "3"
            assert job["MinMemoryNode"] == "2G"
            assert job["TimeLimit"] == "00:30:00"
            assert job["Partition"] == "low"
            assert job["OverSubscribe"] == "OK"
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert len(slurm.jobs("all")) == 2
    assert slurm.jobs() == []
    assert "ignored: SBATCH_ARRAY_INX=0-3, " in output
    assert not credentials(project).exists()
    assert_same_results(results(project.store), results(reference.store))

    logs = sorted((project.root / "log").iterdir())
    assert len(logs) == 3, logs
    for path in logs[:2]:
        job = path.name.removesuffix("_worker.out")
        line = rf"\d{{4}}-\d\d-\d\d [\d:,]+ node\d job {job} INFO epoch \d block \d: \d+ samples in"
        assert re.search(line, path.read_text()), path.read_text()
    assert len(re.findall(r"INFO epoch \d block \d", worker_logs(project))) == 24
    assert re.search(r"dashboard: ssh -L (\d+):127\.0\.0\.1:\1 ", output)
    assert "of 2 workers running" in output


def test_whatever_happens_to_the_jobs_the_run_heals_and_finishes(project, slurm, reference):
    brake = Brake(project, 60)
    with launched(project, "--gpus", "2", "--partition", "low", *brake.options) as process:
        wait_for_blocks(project, process, 2)
        brake.on()
        recorded: dict[Path, tuple[int, int]] = {}
        joined = 2

        def heals(what: str, lost: int, seconds: float) -> None:
            """Wait until new workers have joined, with no recorded block written again."""
            nonlocal joined
            joined += lost
            deadline = time.monotonic() + seconds
            while worker_logs(project).count("Registered to") < joined:
                assert process.poll() is None, f"{what}: {process.communicate()[0]}"
                assert time.monotonic() < deadline, what
                time.sleep(0.1)
            done = finished_blocks(project)
            assert recorded.items() <= done.items(), f"{what}: a recorded block was written again"
            recorded.update(done)

        def jobs_on_a_node() -> tuple[str, int]:
            nodes = [slurm.job(job)["NodeList"] for job in slurm.jobs("RUNNING")]
            return nodes[0], nodes.count(nodes[0])

        heals("start", 0, 60)
        # SLURM looks at time limits every half minute; other things happen meanwhile.
        late, other = slurm.jobs("RUNNING")
        slurm.run("scontrol", "update", f"jobid={late}", "TimeLimit=0")
        slurm.run("scancel", other)
        heals("scancel", 1, 60)

        jobs = [job for job in slurm.jobs("RUNNING") if job != late]
        workers = [p for p in psutil.process_iter() if is_worker_of(p, jobs, slurm)]
        workers[0].kill()
        heals("SIGKILL of a worker process", 1, 60)

        heals("time limit", 1, 120)
        assert slurm.job(late)["JobState"] == "TIMEOUT"

        node, lost = jobs_on_a_node()
        slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        wait_for(lambda: len(slurm.jobs("RUNNING")) == 2 - lost, 30)
        slurm.resume(node)
        heals("node down", lost, 90)

        node, lost = jobs_on_a_node()
        urgent = ("--partition=high", f"--nodelist={node}", "--gres=gpu:2", "--wrap", "sleep 3")
        slurm.run("sbatch", "--output=/dev/null", *urgent)
        heals("preemption", lost, 90)

        brake.off()
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert recorded.items() <= finished_blocks(project).items()
    assert_same_results(results(project.store), results(reference.store))
    assert slurm.jobs() == []


@pytest.mark.slow
def test_workers_leave_in_good_order_before_their_time_is_up(project, slurm, reference):
    brake = Brake(project, 10)
    brake.on()
    with launched(project, "--time", "2", *brake.options) as process:
        wait_for(lambda: len(slurm.jobs("COMPLETED")) >= 2, 400)
        brake.off()
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert slurm.jobs("TIMEOUT", "FAILED") == []
    assert output.count("might outlast the time limit of its job") >= 2
    # Only the jobs that were running at the very end were ended from outside.
    assert len(slurm.jobs("CANCELLED")) <= 1
    assert_same_results(results(project.store), results(reference.store))


def test_a_killed_launcher_leaves_no_jobs_and_the_next_launch_resumes(
    project, slurm, running, reference
):
    private = credentials(project)
    assert private.exists()
    before = finished_blocks(project)
    running.kill()
    wait_for(lambda: not slurm.jobs(), 120)
    wait_for(lambda: not private.exists(), 10)
    run = project.launch(*SETTINGS, *ON_SLURM, "--gpus", "2")
    assert_ok(run)
    assert before.items() <= finished_blocks(project).items()
    assert_same_results(results(project.store), results(reference.store))
    assert f"took over the lock of a launcher that is gone (process {running.pid}" in run.stdout


def test_if_all_that_watches_over_a_run_is_killed_its_jobs_end_by_themselves(
    project, slurm, running
):
    guards = [p for p in psutil.Process(running.pid).children() if p.name() == "sh"]
    assert len(guards) == 1
    for process in (*guards, psutil.Process(running.pid)):
        process.kill()
    wait_for(lambda: not slurm.jobs("RUNNING"), 120)
    private = credentials(project)
    assert private.exists()
    # A job of that launcher that still waits in the queue is cancelled by the next one.
    name = re.findall(r'"name": "(\S+)"', (private / "jobs.json").read_text())[0]
    slurm.run("sbatch", "--hold", f"--job-name={name}", "--output=/dev/null", "--wrap", "true")
    with launched(project) as process:
        wait_for(lambda: len(slurm.jobs("RUNNING")) == 1, 60)
        assert slurm.jobs("PENDING") == []
        os.killpg(process.pid, signal.SIGINT)
        process.communicate(timeout=60)
    assert not private.exists()


def test_ctrl_c_cancels_the_jobs_and_says_how_to_go_on(project, slurm, running):
    os.killpg(running.pid, signal.SIGINT)
    output, _ = running.communicate(timeout=60)
    assert running.returncode == 130
    assert "interrupted; finished work is kept; run the same command again to continue" in output
    assert "Traceback" not in output
    assert slurm.jobs() == []
    assert not credentials(project).exists()


def test_without_the_credentials_nobody_can_talk_to_a_run(project, slurm, running):
    private = credentials(project)
    assert private.stat().st_mode & 0o777 == 0o700
    keys = list(private.glob("*.pem"))
    assert {path.stat().st_mode & 0o777 for path in keys} == {0o600}
    host, port = re.findall(r"Registered to:\s+tls://([\d.]+):(\d+)", worker_logs(project))[0]
    with pytest.raises((ssl.SSLError, ConnectionError)):
        talk(host, int(port))
    if os.geteuid() == 0:
        read = f"open({str(keys[0])!r}).read()"
        command = [sys.executable, "-c", f"import os; os.setuid(65534); {read}"]
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "PermissionError" in other.stderr
    # Of everything that listens, only what speaks TLS listens beyond 127.0.0.1, if anything does.
    tls = set(re.findall(r"(?:Nanny|worker|Registered to|connect to)\S*:?\s+'?tls://\S+:(\d+)",
                         worker_logs(project)))  # fmt: skip
    ours = [running.pid, *(p.pid for p in psutil.process_iter() if in_slurm(p, slurm))]
    listening = [
        connection.laddr
        for pid in ours
        for connection in psutil.Process(pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert len(listening) >= 4
    for address in listening:
        assert address.ip == "127.0.0.1" or str(address.port) in tls
    (script,) = (slurm.run("scontrol", "write", "batch_script", slurm.jobs()[0], "-"),)
    assert "PRIVATE KEY" not in script
    assert str(private) in script


def talk(host: str, port: int) -> bytes:
    """Say something to a TLS server without showing a certificate, and return its answer."""
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with (
        socket.create_connection((host, port), 10) as plain,
        context.wrap_socket(plain) as connection,
    ):
        # With TLS 1.3 the refusal of a missing certificate comes with the first answer.
        connection.send(b"x" * 64)
        return connection.recv(64) + connection.recv(64)


def in_slurm(process: psutil.Process, slurm: MiniSlurm) -> bool:
    try:
        environment = process.environ()
    except psutil.Error:
        return False
    return environment.get("SLURM_CONF") == str(slurm.conf) and "SLURM_JOB_ID" in environment
