"""What SLURM tests share: settings that would break a run, and blocks that take long."""

from __future__ import annotations

import psutil

from tests.support.minislurm import MiniSlurm
from tests.support.project import Project

# Loaded by every Python of a job: while a file exists, blocks take long whatever the machine, with
# the same numbers. The wait is just before a block is written, when an end would hurt most.
TAKE_YOUR_TIME = """
import time
from pathlib import Path
from daskcurv.storage.working import ResultsStore

write = ResultsStore.write_block

def write_late(*arguments):
    end = time.monotonic() + {seconds}
    while Path({file!r}).exists() and time.monotonic() < end:
        time.sleep(0.05)
    write(*arguments)

ResultsStore.write_block = write_late
"""


class Brake:
    """Makes the blocks of a launch with its `options` take `seconds` longer, while it is on."""

    def __init__(self, project: Project, seconds: float):
        directory = project.root / "brake"
        directory.mkdir()
        self._file = directory / "on"
        code = TAKE_YOUR_TIME.format(seconds=seconds, file=str(self._file))
        (directory / "sitecustomize.py").write_text(code)
        self.options = "--prologue", f"export PYTHONPATH={directory}"
        self.environment = {"PYTHONPATH": str(directory)}

    def on(self) -> None:
        self._file.touch()

    def off(self) -> None:
        self._file.unlink()


def is_worker_of(process: psutil.Process, jobs: list[str], slurm: MiniSlurm) -> bool:
    """Whether a process does the work of one of `jobs`."""
    try:
        environment, command = process.environ(), process.cmdline()
    except psutil.Error:
        return False
    ours = environment.get("SLURM_CONF") == str(slurm.conf)
    return ours and environment.get("SLURM_JOB_ID") in jobs and "spawn_main" in " ".join(command)


# Every input variable of sbatch, squeue, scancel and scontrol in SLURM 22.05 that there is a reason
# to set, with a value that would break a run.
HOSTILE = {
    "SBATCH_JOB_NAME": "mine", "SBATCH_OUTPUT": "/nowhere/x", "SBATCH_ERROR": "/nowhere/x",
    "SBATCH_MEM_PER_CPU": "900G", "SBATCH_MEM_PER_GPU": "1M", "SBATCH_MEM_PER_NODE": "1M",
    "SBATCH_EXPORT": "NONE", "SBATCH_ARRAY_INX": "0-3", "SBATCH_GRES": "gpu:2",
    "SBATCH_GPUS": "2", "SBATCH_GPUS_PER_NODE": "2", "SBATCH_GPUS_PER_TASK": "2",
    "SBATCH_WAIT": "1", "SBATCH_REQUEUE": "1", "SBATCH_NO_REQUEUE": "1", "SBATCH_EXCLUSIVE": "1",
    "SBATCH_OPEN_MODE": "truncate", "SBATCH_SIGNAL": "KILL@60", "SBATCH_INPUT": "/nowhere/x",
    "SBATCH_CLUSTERS": "other", "SBATCH_CORE_SPEC": "4", "SBATCH_CPUS_PER_GPU": "64",
    "SBATCH_CONTAINER": "/nowhere", "SBATCH_DISTRIBUTION": "arbitrary", "SBATCH_DEBUG": "1",
    "SBATCH_GET_USER_ENV": "1", "SBATCH_THREADS_PER_CORE": "8", "SBATCH_BATCH": "no-such-thing",
    "SALLOC_PARTITION": "other", "SQUEUE_FORMAT": "%P", "SQUEUE_STATES": "PD",
    "SQUEUE_USERS": "nobody", "SQUEUE_PARTITION": "other", "SQUEUE_NAMES": "other",
    "SQUEUE_SORT": "i", "SCANCEL_NAME": "other", "SCANCEL_INTERACTIVE": "1",
    "SCANCEL_STATE": "PENDING", "SCANCEL_PARTITION": "other", "SCONTROL_ALL": "1",
    "SINFO_FORMAT": "%P", "SLURM_CLUSTERS": "other", "SLURM_HINT": "nomultithread",
    "SLURM_HOSTFILE": "/nowhere/x", "SLURM_UMASK": "0", "SLURM_EXIT_ERROR": "7",
}  # fmt: skip
