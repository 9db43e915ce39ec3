from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import dask
import numpy as np
import pytest
import torch
from distributed.utils import get_mp_context

from daskcurv.cli import main
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.minislurm import MiniSlurm, missing_programs
from tests.support.project import Project

# With the threads of two test processes on two cores, a network takes twenty times as long: they
# wait for each other in loops that keep the cores busy.
torch.set_num_threads(1)

# Workers of launches in a test process are forked from one process that has imported what they
# need, instead of importing it again. Launches in processes of their own start them as usual.
dask.config.set({"distributed.worker.multiprocessing-method": "forkserver"})
get_mp_context().set_forkserver_preload(["daskcurv.runs.block", "distributed.nanny"])


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Variables that a test sets, or Dask in one, are not those of programs started later."""
    before = dict(os.environ)
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(autouse=True)
def package_log() -> Iterator[logging.Logger]:
    """The package's logger as an import leaves it, whatever command a test runs in its process."""
    package = logging.getLogger("daskcurv")
    _reset(package)
    yield package
    _reset(package)


def _reset(logger: logging.Logger) -> None:
    while logger.handlers:
        handler = logger.handlers[0]
        logger.removeHandler(handler)
        handler.close()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture
def project(tmp_path: Path) -> Project:
    """60 samples of 10 classes, and a tiny ResNet-18's checkpoints of epochs 0, 1, 2 and 4."""
    project = Project(tmp_path)
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    return project


@pytest.fixture(scope="session")
def slurm_cluster() -> Iterator[MiniSlurm]:
    """Two nodes with two fake GPUs each, and a partition whose jobs preempt the others'."""
    if missing := missing_programs():
        text = f"SLURM's {', '.join(missing)} not found; .ci/run says what to install"
        (pytest.fail if "CI" in os.environ else pytest.skip)(text)
    partitions = {
        "low": "PriorityTier=1",
        "high": "PriorityTier=10",
        "short": "PriorityTier=1 MaxTime=5",
    }
    with MiniSlurm(nodes=2, cpus=8, gpus=2, partitions=partitions) as slurm:
        yield slurm


@pytest.fixture
def slurm(slurm_cluster: MiniSlurm) -> Iterator[MiniSlurm]:
    """The SLURM cluster with nothing on it, before and after."""
    slurm_cluster.reset()
    yield slurm_cluster
    slurm_cluster.reset()


@pytest.fixture
def dry_launch(project: Project, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run ``launch --dry_run`` in this process; returns its exit code.

    A dry run reads and checks everything a launch does, and computes nothing.
    """
    monkeypatch.chdir(project.root)
    return lambda *extra: main(["launch", *project.launch_arguments("--dry_run", *extra)])


@pytest.fixture
def disk_full_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Makes the n-th array saved from now on the one that does not fit on the disk any more."""

    def limit(failing: int) -> None:
        save, calls = np.save, []

        def save_until_full(path: Path, values: np.ndarray) -> None:
            calls.append(path)
            if len(calls) == failing:
                Path(path).write_bytes(b"half of it")
                raise OSError(errno.ENOSPC, "No space left on device")
            save(path, values)

        monkeypatch.setattr(np, "save", save_until_full)

    return limit


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The demo, run once for all test processes: its working directory and what it printed."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    root, printed = shared / "demo", shared / "demo.txt"
    with (shared / "demo.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            root.mkdir()
            # Threads that wait for each other in loops would take the other processes' cores.
            quiet = {**os.environ, "OMP_WAIT_POLICY": "PASSIVE"}
            run = Project(root, quiet).run("launch", "--demo", "demo")
            assert run.returncode == 0, run.stdout
            printed.write_text(run.stdout)
    return root, printed.read_text()
