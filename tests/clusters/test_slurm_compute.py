"""``daskcurv.compute`` on a ``SLURMCluster`` that the caller has made, on a real SLURM."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.builders import write_checkpoints, write_cifar
from tests.support.launches import assert_same_results, results
from tests.support.project import REPOSITORY, Project

SCRIPT = """
import sys

from dask.distributed import Client, LocalCluster
from dask_jobqueue import SLURMCluster

import daskcurv
from daskcurv.config import EstimatorConfig
from daskcurv.experiment.curriculum import Curriculum, Schedule, class_order_of
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.experiment.search import discover
from pathlib import Path
from tests.support.builders import TINY

if __name__ == "__main__":
    where, prologue = sys.argv[1:]
    experiment = daskcurv.Experiment(
        dataset=read_cifar(Path("cifar-100-python")),
        checkpoints=discover(Path("model_parameters"), 0),
        network=TINY,
        curriculum=Curriculum(tuple(class_order_of(0, 10).tolist()), Schedule(4, 4, 2)),
        estimator=EstimatorConfig(n_probes=2, method="finite-difference", precision="float32"),
    )
    if where == "slurm":
        cluster = SLURMCluster(
            queue="low", cores=1, processes=1, memory="2GB", walltime="00:10:00", interface="lo",
            scheduler_options={"dashboard_address": ":0"}, log_directory="log",
            job_script_prologue=[prologue],
        )
        cluster.scale(jobs=2)
    else:
        cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0")
    with cluster, Client(cluster) as client:
        client.wait_for_workers(2, timeout=240)
        found = daskcurv.compute(
            experiment, f"{where}.zarr", client, device="cpu", batch_size=8, block_size=20
        )
        assert found.complete.all()
        assert len(client.scheduler_info()["workers"]) == 2, "the caller's workers are left alone"
        jobs = client.run(lambda: __import__("os").environ.get("SLURM_JOB_ID"))
        print(*sorted(str(job) for job in jobs.values()))
"""


@pytest.fixture
def project(slurm, tmp_path: Path) -> Project:
    # Workers import the package that is tested, also where another is installed.
    path = {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    project = Project(tmp_path, {**slurm.environment, **path})
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    (tmp_path / "script.py").write_text(SCRIPT)
    return project


def test_a_slurm_cluster_of_the_caller_gives_the_same_to_the_bit(project, slurm):
    def run(where: str) -> list[str]:
        words = [sys.executable, "script.py", where, f"export PYTHONPATH={REPOSITORY}"]
        done = subprocess.run(
            words, cwd=project.root, env=project.environment, capture_output=True, text=True,
            timeout=400,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()

    jobs = run("slurm")
    assert sorted(jobs) == sorted(slurm.jobs("all"))
    assert len(set(jobs)) == 2
    assert slurm.jobs() == []
    assert run("local") == ["None", "None"]
    here = [project.root / f"{where}.zarr" for where in ("slurm", "local")]
    assert_same_results(*map(results, here))
