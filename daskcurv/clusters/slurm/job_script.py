"""The script of a worker's job, which dask-jobqueue writes and submits.

dask-jobqueue is imported in one place, without its side effects, and the user's settings for it are
not used: the settings of a site are `daskcurv.clusters.options.site_settings`.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
from distributed.core import Status
from distributed.security import Security

from daskcurv.clusters.options import ClusterOptions
from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm.commands import SlurmError
from daskcurv.logs import LOG_DIR

DEATH_TIMEOUT_SECONDS = 60
"""How long a worker tries to reach a scheduler that does not answer."""

_SECTION = "daskcurv"


@contextmanager
def start_cluster(
    options: ClusterOptions,
    name: str,
    security: Security | None,
    submitted: Callable[[str], None] = lambda job_id: None,
) -> Iterator[Any]:
    """Run a scheduler on this host, whose workers are SLURM jobs; none is submitted yet.

    Parameters
    ----------
    options : ClusterOptions
    name : str
        Name of the jobs.
    security : Security, optional
        With credentials in files.
    submitted : callable, optional
        Called with the id of each job that SLURM accepted.

    Yields
    ------
    dask_jobqueue.SLURMCluster
        Its jobs store a refusal by SLURM in ``refusal``; closing it cancels no job.
    """
    jobqueue = import_jobqueue()

    class Job(jobqueue.slurm.SLURMJob):  # type: ignore[name-defined, misc]
        config_name = _SECTION
        refusal = ""

        async def start(self) -> None:
            try:
                await super().start()
            except (SlurmError, OSError) as error:
                self.refusal = str(error)
                self.status = Status.running
            else:
                submitted(self.job_id)

        async def _submit_job(self, script_filename: str) -> str:
            return await asyncio.to_thread(slurm_commands.submit, Path(script_filename))

        def _job_id_from_submit_output(self, out: str) -> str:
            return out

        async def close(self) -> None:
            # All jobs of the run are cancelled at once, by their name.
            self.status = Status.closed

    class Cluster(jobqueue.SLURMCluster):  # type: ignore[name-defined, misc]
        job_cls = Job

        def _get_worker_security(self, security: Security | None) -> Security | None:
            return None if security is None else _quoted(security)

    # They are looked up whenever a job is made.
    with (
        dask.config.set(_no_settings()),
        Cluster(
            security=security,
            protocol="tls://" if security else "tcp://",
            interface=options.interface,
            scheduler_options={"dashboard": True, "dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.CRITICAL,
            name=name,
            **job_settings(options, name),
        ) as cluster,
    ):
        yield cluster


def _quoted(security: Security) -> Security:
    """Return credentials whose paths can stand in a shell script as they are."""
    paths = security.get_tls_config_for_role("worker")
    return Security(
        require_encryption=True,
        tls_ca_file=shlex.quote(str(paths["ca_file"])),
        tls_worker_cert=shlex.quote(str(paths["cert"])),
        tls_worker_key=shlex.quote(str(paths["key"])),
    )


def job_settings(
    options: ClusterOptions, name: str, excluded: Set[str] = frozenset()
) -> dict[str, Any]:
    """Return what dask-jobqueue is to put into the job script.

    Parameters
    ----------
    options : ClusterOptions
    name : str
        Name of the jobs.
    excluded : set of str
        Nodes to keep away from.
    """
    directives = [
        # By which the jobs are known if the site changes their name.
        f"--comment={name}",
        "--nodes=1",
        f"--output={shlex.quote(str(worker_log('%j')))}",
        "--open-mode=append",
    ]
    further = ("qos", options.qos), ("constraint", options.constraint), ("gres", options.requested)
    for option, value in further:
        if value:
            directives.append(f"--{option}={shlex.quote(value)}")
    # SLURM uses only the last one, so there must be only one.
    own = [line for line in options.sbatch_extra if line.startswith("--exclude=")]
    avoided = {line.removeprefix("--exclude=") for line in own} | excluded
    if avoided:
        directives.append(f"--exclude={','.join(sorted(avoided))}")
    return {
        "job_name": name,
        "cores": 1,
        "processes": 1,
        "job_cpu": options.cpus_per_gpu,
        "memory": f"{options.megabytes_per_gpu}MiB",
        "job_mem": f"{options.megabytes_per_gpu}M",
        "queue": options.partition,
        "account": options.account,
        "walltime": options.time,
        "job_extra_directives": [
            *directives,
            *(line for line in options.sbatch_extra if line not in own),
        ],
        "job_script_prologue": ["set -e", *options.prologue],
        "worker_command": "daskcurv.clusters.worker",
        "worker_extra_args": ["--device", options.device_of_jobs],
        "python": shlex.quote(sys.executable),
        "shebang": "#!/bin/bash",
        "death_timeout": DEATH_TIMEOUT_SECONDS,
    }


def job_script(options: ClusterOptions) -> str:
    """Return the script of a worker's job, without the scheduler's address and the credentials."""
    jobqueue = import_jobqueue()
    with dask.config.set(_no_settings()):
        job = jobqueue.slurm.SLURMJob(
            f"{'tcp' if options.insecure else 'tls'}://THIS_HOST:PORT",
            name="worker",
            config_name=_SECTION,
            interface=options.interface,
            **job_settings(options, "daskcurv"),
        )
    return str(job.job_script())


def import_jobqueue() -> ModuleType:
    """Import dask-jobqueue without its side effects.

    On import it replaces the process's handler of Ctrl-C, and writes a file of commented settings
    that are not ours into the user's configuration.
    """
    handler = signal.getsignal(signal.SIGINT)
    ensure_file = dask.config.ensure_file
    dask.config.ensure_file = lambda *_, **__: None
    try:
        return importlib.import_module("dask_jobqueue")
    finally:
        dask.config.ensure_file = ensure_file
        signal.signal(signal.SIGINT, handler)


def _no_settings() -> dict[str, Any]:
    """Return a section of dask-jobqueue's settings in which nothing is set.

    It reads from there whatever is not passed to it.
    """
    known = dask.config.get("jobqueue.slurm")
    empty: dict[str, Any] = {
        key: [] if isinstance(value, list) else None for key, value in known.items()
    }
    return {f"jobqueue.{_SECTION}": {**empty, "scheduler-options": {}}}


def worker_log(job: str) -> Path:
    """Return the log of a worker's job, by the job's id."""
    return LOG_DIR.absolute() / f"{job}_worker.out"
