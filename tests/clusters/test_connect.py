"""Launches on a Dask cluster that somebody else has started."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from daskcurv.clusters import connect as connecting
from daskcurv.clusters.options import ClusterOptions
from daskcurv.errors import ClusterError
from tests.support.launches import assert_ok, assert_same_results, results
from tests.support.minislurm import wait_for
from tests.support.project import Project

SETTINGS = ("--block_size", "20")


@contextmanager
def dask_cluster(
    root: Path, threads: int = 1
) -> Iterator[tuple[Path, list[subprocess.Popen[bytes]]]]:
    """A scheduler and two workers; gives the scheduler's file, and their processes."""
    file = root / "scheduler.json"
    here = ("--host", "127.0.0.1", "--dashboard-address", "127.0.0.1:0")
    dask = [sys.executable, "-m", "dask"]
    with (
        open(root / "dask.log", "w") as log,
        subprocess.Popen(
            [*dask, "scheduler", *here, "--port", "0", "--scheduler-file", str(file)],
            stderr=log,
        ) as scheduler,
    ):
        wait_for(file.exists, 60)
        join = ["--scheduler-file", str(file), "--nworkers", "2", "--nthreads", str(threads)]
        with subprocess.Popen([*dask, "worker", *here, *join], stderr=log, cwd=root) as workers:
            try:
                yield file, [scheduler, workers]
            finally:
                for process in (workers, scheduler):
                    process.terminate()
                for process in (workers, scheduler):
                    try:
                        process.wait(30)
                    except subprocess.TimeoutExpired:
                        process.kill()


def connect(project: Project, scheduler: object, *options: str) -> subprocess.CompletedProcess[str]:
    where = ("--cluster", "connect", "--scheduler", str(scheduler), "--device", "cpu")
    return project.launch(*SETTINGS, *where, *options)


def test_a_running_cluster_gives_the_same_results_and_is_left_running(project, tmp_path):
    reference = Project(tmp_path / "reference")
    reference.root.mkdir()
    reference.data, reference.models = project.data, project.models
    assert_ok(reference.launch(*SETTINGS, "--workers", "1"))
    with dask_cluster(tmp_path) as (file, processes):
        assert_ok(connect(project, file))
        assert [process.poll() for process in processes] == [None, None]
    assert_same_results(results(project.store), results(reference.store))


def test_workers_of_several_threads_are_refused(project, tmp_path):
    with dask_cluster(tmp_path, threads=2) as (file, _):
        run = connect(project, file)
    assert run.returncode == 2
    assert "has 2 threads" in run.stdout
    assert "Start it with --nthreads 1" in run.stdout


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        ("tcp://10.255.0.1:8786", "tcp://10.255.0.1:8786 has no TLS: anyone who can reach it"),
        ("nowhere.json", "scheduler is 'nowhere.json'; expected an address"),
        ("tcp://127.0.0.1:1", "cannot connect to the Dask scheduler at tcp://127.0.0.1:1"),
    ],
)
def test_a_scheduler_that_cannot_be_used_is_refused(monkeypatch, scheduler, message):
    monkeypatch.setattr(connecting, "CONNECT_SECONDS", 1)
    options = ClusterOptions(cluster="connect", scheduler=scheduler)
    with pytest.raises(ClusterError) as refusal, connecting.connected_cluster(options):
        pass
    assert message in str(refusal.value)
