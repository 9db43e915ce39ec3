"""Workers as SLURM jobs, submitted from a login node: one job, one GPU, one process, one thread.

dask-jobqueue writes the job script and submits it. Holding the fleet is done here, because its own
ways are not enough for a run of days: ``scale`` never replaces a job, ``adapt`` replaces only those
whose worker had joined, cancels jobs that SLURM has requeued, and a refused submission is but a
line in a log. Every few seconds `SlurmFleet.tend` asks SLURM for all jobs of the run, lets
`daskcurv.clusters.fleet` judge those that ended, and submits what is missing.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import shlex
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import dask
from distributed import Client
from distributed.core import Status

from daskcurv.clusters import slurm_commands
from daskcurv.clusters.base import (
    say_where_the_dashboard_is,
    scheduler_settings,
    worker_names,
)
from daskcurv.clusters.fleet import End, Fleet
from daskcurv.clusters.options import NO_GRES, ClusterOptions, check_interface
from daskcurv.clusters.run_directory import credentials, run_directory
from daskcurv.clusters.slurm_commands import Job, SlurmError
from daskcurv.errors import ClusterError
from daskcurv.logs import LOG_DIR

log = logging.getLogger(__name__)

ALLOWED_FAILURES = 20
TEND_SECONDS = 3.0
HESITATE_SECONDS = 60.0
DEATH_TIMEOUT_SECONDS = 60
WORKER_LOG = "{job}_worker.out"

# Reasons for which SLURM lets a job wait that no waiting ends.
_NEVER_STARTS = {
    "AccountNotAllowed", "AssocMaxWallDurationPerJobLimit", "BadConstraints", "InvalidAccount",
    "InvalidQOS", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "QOSNotAllowed",
    "QOSMaxWallDurationPerJobLimit",
}  # fmt: skip
_NEVER_SECONDS = 20.0


@contextmanager
def slurm_cluster(options: ClusterOptions, directory: Path) -> Iterator[SlurmFleet]:
    """Hold workers in SLURM jobs for as long as the context lasts.

    Parameters
    ----------
    options : ClusterOptions
    directory : Path
        For the run's credentials, on a file system that the nodes share.

    Yields
    ------
    SlurmFleet

    Raises
    ------
    ClusterError
        If there is no SLURM, or no TLS.
    """
    slurm_commands.check_installed("sbatch", "squeue", "scancel", "scontrol")
    check_interface(options.interface)
    LOG_DIR.mkdir(exist_ok=True)
    jobqueue = import_jobqueue()
    name = f"daskcurv-{os.urandom(3).hex()}"
    with run_directory(directory, name) as private, contextlib.ExitStack() as stack:
        security = None if options.insecure else credentials(private)
        if security is None:
            log.warning(
                "--insecure: no TLS; anyone who can reach this host can run programs as you"
            )
        stack.enter_context(dask.config.set(scheduler_settings(ALLOWED_FAILURES)))
        stack.enter_context(dask.config.set(_no_site_defaults()))
        cluster = _cluster_class(jobqueue)(
            security=security,
            protocol="tls://" if security else "tcp://",
            interface=options.interface,
            scheduler_options={"dashboard": True, "dashboard_address": "127.0.0.1:0"},
            silence_logs=logging.CRITICAL,
            name=name,
            **job_settings(options, name),
        )
        stack.callback(cluster.close)
        # Before closing, so that jobs are not cancelled one by one, and with them any that a
        # submission left which SLURM accepted without saying so.
        stack.callback(_cancel, name)
        client = stack.enter_context(Client(cluster, security=security))
        say_where_the_dashboard_is(cluster.dashboard_link)
        log.info(
            "holding %d SLURM job%s named %s; their logs are %s",
            options.gpus,
            "" if options.gpus == 1 else "s",
            name,
            _worker_log("*"),
        )
        yield SlurmFleet(cluster, client, options, name)


class SlurmFleet:
    """The jobs of a run; a `daskcurv.clusters.base.Cluster`.

    Parameters
    ----------
    cluster : dask_jobqueue.SLURMCluster
    client : distributed.Client
    options : ClusterOptions
    name : str
        Name of the jobs.
    """

    def __init__(self, cluster: Any, client: Client, options: ClusterOptions, name: str):
        self.client = client
        self._cluster, self._options, self._name = cluster, options, name
        self._fleet = Fleet(options.gpus)
        self._excluded: set[str] = set()
        self._joined: set[str] = set()
        self._lost: Counter[str] = Counter()
        self._next = 0.0
        self._submit_at = 0.0
        self._stuck_since: float | None = None
        self._text = "submitting jobs"
        self._silent_since: float | None = None

    def block_done(self) -> None:
        """Note that some worker finished a block."""
        self._fleet.block_done()

    def tend(self) -> str:
        """Replace jobs that ended; see `daskcurv.clusters.base.Cluster`."""
        now = time.monotonic()
        if now < self._next:
            return self._text
        self._next = now + TEND_SECONDS
        connected = {name.split(".")[0] for name in worker_names(self.client)}
        if connected:
            self._joined |= connected
            self._fleet.joined()
        try:
            queue = slurm_commands.queue(self._name)
        except SlurmError as error:
            self._be_patient(error, now)
            return f"{len(connected)} of {self._options.gpus} workers, SLURM does not answer"
        self._silent_since = None
        self._judge(queue, len(connected))
        self._submit(now)
        self._text = self._describe(queue, connected)
        self._look_out_for_stuck_jobs(queue, connected, now)
        return self._text

    def _judge(self, queue: dict[str, Job], workers: int) -> None:
        for slot, job in list(self._cluster.workers.items()):
            if job.refusal:
                self._forget(slot)
                error = SlurmError(job.refusal)
                if error.transient:
                    log.warning("SLURM did not take a job, trying again: %s", error)
                else:
                    self._fleet.end(End("", "REJECTED", reason=job.refusal), workers)
            elif job.job_id and self._has_ended(job.job_id, queue):
                self._forget(slot)
                self._fleet.end(self._end_of(job.job_id, queue), workers)

    def _has_ended(self, job_id: str, queue: dict[str, Job]) -> bool:
        job = queue.get(job_id)
        if job is not None:
            self._lost.pop(job_id, None)
            return not (job.is_waiting or job.is_running or job.is_ending)
        # Forgotten by SLURM, if it says so twice.
        self._lost[job_id] += 1
        return self._lost[job_id] > 1

    def _end_of(self, job_id: str, queue: dict[str, Job]) -> End:
        job = queue.get(job_id, Job(job_id, "FORGOTTEN BY SLURM"))
        status = slurm_commands.show(job_id).get("ExitCode", "0:0").split(":")[0]
        return End(
            job_id,
            job.state,
            job.node,
            int(status) if status.isdigit() else 0,
            job_id in self._joined,
            job.reason,
            _worker_log(job_id),
        )

    def _forget(self, slot: str) -> None:
        async def forget() -> None:
            self._cluster.worker_spec.pop(slot, None)
            job = self._cluster.workers.pop(slot, None)
            if job is not None:
                job.status = Status.closed

        self._cluster.sync(forget)

    def _submit(self, now: float) -> None:
        """Submit what is missing; after a series of failures not at once."""
        missing = self._options.gpus - len(self._cluster.worker_spec)
        if missing <= 0:
            return
        if now < self._submit_at:
            return
        self._submit_at = now + (HESITATE_SECONDS if self._fleet.hesitant else 0)
        if self._fleet.excluded != self._excluded:
            self._excluded = set(self._fleet.excluded)
            settings = job_settings(self._options, self._name, self._excluded)
            self._cluster.new_spec["options"].update(settings)
        self._cluster.scale(self._options.gpus)

    def _describe(self, queue: dict[str, Job], connected: set[str]) -> str:
        waiting = [job for job in queue.values() if job.is_waiting]
        starting = [j for j in queue.values() if j.is_running and j.id not in connected]
        text = f"{len(connected)} of {self._options.gpus} workers running"
        if starting:
            text += f", {len(starting)} starting"
        if waiting:
            reasons = Counter(job.reason for job in waiting)
            text += f", {len(waiting)} waiting in the queue ({', '.join(sorted(reasons))})"
        return text

    def _look_out_for_stuck_jobs(
        self, queue: dict[str, Job], connected: set[str], now: float
    ) -> None:
        """Raise if there are no workers, and none of the jobs can ever start."""
        alive = [job for job in queue.values() if job.is_waiting or job.is_running]
        stuck = [j for j in alive if j.reason.split(",")[0] in _NEVER_STARTS and j.is_waiting]
        if connected or not alive or len(stuck) < len(alive):
            self._stuck_since = None
            return
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since > _NEVER_SECONDS:
            raise ClusterError(
                f"job {stuck[0].id} will never start: SLURM lets it wait for the reason "
                f"{stuck[0].reason}. Change --time, --partition, --account, --qos, --constraint or "
                "--gres; squeue and sinfo tell what there is"
            )

    def _be_patient(self, error: SlurmError, now: float) -> None:
        if self._silent_since is None:
            self._silent_since = now
            log.warning("SLURM does not answer, asking again: %s", error)


def job_settings(
    options: ClusterOptions, name: str, excluded: set[str] | frozenset[str] = frozenset()
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
        "--nodes=1",
        f"--output={shlex.quote(str(_worker_log('%j')))}",
        "--open-mode=append",
        *request(options),
    ]
    if options.gres != NO_GRES:
        directives.append(f"--gres={options.gres}")
    if excluded:
        directives.append(f"--exclude={','.join(sorted(excluded))}")
    device = "cpu" if options.device == "cpu" else "cuda"
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
        "job_extra_directives": [*directives, *options.sbatch_extra],
        "job_script_prologue": ["set -e", *options.prologue],
        "worker_command": "daskcurv.clusters.worker",
        "worker_extra_args": ["--device", device],
        "python": shlex.quote(sys.executable),
        "shebang": "#!/bin/bash",
        "death_timeout": DEATH_TIMEOUT_SECONDS,
    }


def request(options: ClusterOptions) -> list[str]:
    """Return the options of ``sbatch`` that all jobs of a run share."""
    pairs = (("qos", options.qos), ("constraint", options.constraint))
    return [f"--{name}={shlex.quote(value)}" for name, value in pairs if value]


def job_script(options: ClusterOptions) -> str:
    """Return the script of a worker's job, but for the scheduler's address and the credentials."""
    jobqueue = import_jobqueue()
    with dask.config.set(_no_site_defaults()):
        job = jobqueue.slurm.SLURMJob(
            f"{'tcp' if options.insecure else 'tls'}://THIS_HOST:PORT",
            name="worker",
            config_name=_SECTION,
            interface=options.interface,
            **job_settings(options, "daskcurv"),
        )
    return str(job.job_script())


def import_jobqueue() -> ModuleType:
    """Import dask-jobqueue without what it does by the way.

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


_SECTION = "daskcurv"


def _no_site_defaults() -> dict[str, Any]:
    """Return a section of dask-jobqueue's settings in which nothing is set.

    What is not passed to it, it takes from there; the site's settings are `daskcurv.slurm`.
    """
    known = dask.config.get("jobqueue.slurm")
    empty: dict[str, Any] = {
        key: [] if isinstance(value, list) else None for key, value in known.items()
    }
    return {f"jobqueue.{_SECTION}": {**empty, "scheduler-options": {}}}


def _cluster_class(jobqueue: ModuleType) -> type[Any]:
    """Return dask-jobqueue's cluster, with jobs that keep SLURM's answer to themselves."""

    class SubmittedJob(jobqueue.slurm.SLURMJob):  # type: ignore[name-defined, misc]
        config_name = _SECTION
        refusal = ""

        async def start(self) -> None:
            try:
                await super().start()
            except (RuntimeError, OSError, ValueError) as error:
                stderr = str(error).partition("stderr:\n")[2] or str(error)
                self.refusal = slurm_commands.said(stderr)
                # What a worker is to be after starting; SlurmFleet takes it from there.
                self.status = Status.running

    class Cluster(jobqueue.SLURMCluster):  # type: ignore[name-defined, misc]
        job_cls = SubmittedJob

    return Cluster


def _worker_log(job: str) -> Path:
    return LOG_DIR.absolute() / WORKER_LOG.format(job=job)


def _cancel(name: str) -> None:
    try:
        slurm_commands.cancel(name)
    except SlurmError as error:
        log.warning("jobs named %s could not be cancelled: %s", name, error)
