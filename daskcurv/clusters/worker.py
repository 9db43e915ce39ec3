"""The program of a cluster's job: check the device, then run a worker.

Usage::

    python -m daskcurv.clusters.worker [--device cuda|cpu] [--step NAME --slot N] SCHEDULER ...

Further options are those of ``dask worker``; its ``--name`` is not. The job ends with exit
status `UNFIT` if the device is unusable, so that the launcher can distinguish a bad node from a
bad job script.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Sequence

import dask

from daskcurv import surroundings
from daskcurv.clusters.environment import WORKER_ENVIRONMENT, WORKER_JOB
from daskcurv.clusters.slurm.fleet import UNFIT
from daskcurv.clusters.time_limit import TimeLimit
from daskcurv.logs import log_to_stderr

log = logging.getLogger("daskcurv.clusters.worker")

_CHECK_SECONDS = 300


def main(argv: Sequence[str]) -> int:
    """Run the worker until it is asked to stop; return the exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--step", default="")
    parser.add_argument("--slot", type=int)
    args, rest = parser.parse_known_args(argv)
    log_to_stderr()
    # A node can set what the launcher's does not. The working process has yet to be started.
    surroundings.remove_from(os.environ)
    if args.slot is not None:
        take_slot(args.slot)
    log.info("worker for %s on %s", args.device, platform.node())
    if args.device == "cuda" and (problem := problem_of_device()):
        log.error("%s", problem)
        return UNFIT
    name = args.step or job_name()
    TimeLimit.of_job().hand_down(name)
    os.environ[WORKER_JOB] = name

    from distributed.cli.dask_worker import main as dask_worker

    with dask.config.set({"distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT}):
        dask_worker.main(
            [
                *rest,
                *("--name", name),
                *("--nthreads", "1", "--nanny", "--memory-limit", "0"),
                *("--preload", "daskcurv.clusters.preload"),
                *("--no-dashboard", "--dashboard-address", "127.0.0.1:0"),
                *("--local-directory", tempfile.gettempdir()),
            ],
            standalone_mode=False,
        )
    return 0


def job_name() -> str:
    """Return the job's id, with the number of the start if SLURM has started it before.

    This distinguishes a worker from its predecessor in a requeued job, which the scheduler may
    still list.
    """
    job = os.environ.get("SLURM_JOB_ID", f"{platform.node()}-{os.getpid()}")
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return job if restarts == "0" else f"{job}.{restarts}"


def take_slot(slot: int) -> None:
    """Leave only the `slot`-th of the node's GPUs visible to this process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else []
    if not devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = str(slot)
    elif slot < len(devices):
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[slot]
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def problem_of_device() -> str:
    """Return the problem of the GPU, empty if there is none.

    A separate process checks it, because a process that has used a GPU keeps some of its memory.
    """
    command = [sys.executable, "-m", "daskcurv.clusters.gpu_check"]
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, timeout=_CHECK_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        return f"the check of the GPU did not end within {_CHECK_SECONDS} s; the driver may hang"
    if done.returncode == 0:
        return ""
    return done.stdout.strip() or f"the check of the GPU died (exit status {done.returncode})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
