from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from daskcurv.cli import main
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.minislurm import MiniSlurm, missing_programs

REPOSITORY = Path(__file__).parent.parent


class Project:
    """A directory with a small training run's files, to launch the program in.

    Parameters
    ----------
    root : Path
    environment : dict, optional
        Of the programs that are run; by default this process's.
    """

    def __init__(self, root: Path, environment: dict[str, str] | None = None):
        self.root = root
        self.environment = environment
        self.data = root / "cifar-100-python"
        self.models = root / "model_parameters"
        self.store = root / "curvature.zarr"
        self.tree = root / "tree"

    def launch_arguments(self, *extra: str) -> list[str]:
        """Arguments of a launch in which classes arrive 4, 8, 10 at epochs 0, 2, 4.

        On one local worker, which starts soonest, unless told otherwise.
        """
        local = () if "--cluster" in extra else ("--workers", "1")
        return [
            "--data_path", str(self.data), "--model_dir", str(self.models),
            "--store", str(self.store), "--save_base_dir", str(self.tree),
            "--initial_classes", "4", "--class_increment", "4", "--class_frequency", "2",
            "--n_probes", "2", "--batch_size", "8", "--epochs", "all", *local, *extra,
        ]  # fmt: skip

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """Start one of the scripts in a session of its own."""
        return subprocess.Popen(
            [sys.executable, REPOSITORY / "scripts" / f"{script}.py", *arguments],
            cwd=self.root,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run one of the scripts to its end; stdout and stderr are joined in ``stdout``."""
        process = self.start(script, *arguments)
        try:
            # The demo takes two minutes where bfloat16 is fast, and eight on an older processor.
            output, _ = process.communicate(timeout=1200)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(process.args, process.returncode, output, "")

    def launch(self, *extra: str) -> subprocess.CompletedProcess[str]:
        return self.run("launch", *self.launch_arguments(*extra))


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


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """A file system of a given size, in memory."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def enlarge(directory: Path) -> None:
    """Make more room in a mounted file system."""
    subprocess.run(["mount", "-o", "remount,size=20m", str(directory)], check=True)


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
            run = Project(root).run("launch", "--demo", "demo")
            assert run.returncode == 0, run.stdout
            printed.write_text(run.stdout)
    return root, printed.read_text()
