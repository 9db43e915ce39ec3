"""Workers as SLURM jobs, submitted from a login node: one job, one GPU, one process, one thread.

dask-jobqueue writes the job script and submits it. The number of jobs is maintained here, because
dask-jobqueue cannot do that for days: ``scale`` never replaces a job, ``adapt`` replaces only those
whose worker had joined, cancels jobs that SLURM has requeued, and a refused submission is only
logged. Every few seconds `SlurmFleet.poll` asks SLURM for all jobs of the run, lets
`daskcurv.clusters.slurm.fleet` judge those that ended, and submits what is missing.
"""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import dask
from distributed import Client
from distributed.core import Status

from daskcurv.clusters.base import (
    Reason,
    Why,
    Workers,
    scheduler_settings,
    way_to_dashboard,
    worker_names,
)
from daskcurv.clusters.options import ClusterOptions, check_interface
from daskcurv.clusters.slurm import commands as slurm_commands
from daskcurv.clusters.slurm.commands import Job, SlurmError
from daskcurv.clusters.slurm.environment import tell_about_jobs
from daskcurv.clusters.slurm.fleet import BACK_OFF_SECONDS, START_SECONDS, End, Fleet
from daskcurv.clusters.slurm.job_script import job_settings, start_cluster, worker_log
from daskcurv.clusters.slurm.run_directory import open_credentials, record_job, run_directory
from daskcurv.errors import ClusterError
from daskcurv.logs import LOG_DIR

log = logging.getLogger(__name__)

ALLOWED_FAILURES = 20
POLL_SECONDS = 3.0
PAUSE_SECONDS = 30.0

# SLURM's reasons for a waiting job that will never start.
_NEVER_STARTS = {
    "AccountNotAllowed", "AssocMaxWallDurationPerJobLimit", "BadConstraints", "InvalidAccount",
    "InvalidQOS", "PartitionConfig", "PartitionNodeLimit", "PartitionTimeLimit", "QOSNotAllowed",
    "QOSMaxWallDurationPerJobLimit",
}  # fmt: skip
_NEVER_SECONDS = 20.0


@contextmanager
def slurm_cluster(options: ClusterOptions, directory: Path) -> Iterator[SlurmFleet]:
    """Run workers in SLURM jobs for as long as the context lasts.

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
    name = f"daskcurv-{os.urandom(3).hex()}"
    with ExitStack() as stack:
        private = stack.enter_context(run_directory(directory, name))
        security = open_credentials(private, options.insecure)
        stack.enter_context(dask.config.set(scheduler_settings(ALLOWED_FAILURES)))
        submitted = partial(record_job, private)
        cluster = stack.enter_context(start_cluster(options, name, security, submitted))
        tell_about_jobs(slurm_commands.directives(cluster.job_script()))
        client = stack.enter_context(Client(cluster, security=security))
        log.info(
            "holding %d SLURM job%s named %s; logs of workers: %s",
            options.gpus,
            "" if options.gpus == 1 else "s",
            name,
            worker_log("*"),
        )
        fleet = SlurmFleet(cluster, client, options, name)
        fleet.dashboard = way_to_dashboard(cluster.dashboard_link)
        stack.callback(fleet.close)
        yield fleet


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

    dashboard = ""

    def __init__(self, cluster: Any, client: Client, options: ClusterOptions, name: str):
        self.client = client
        self._cluster, self._options, self._name = cluster, options, name
        self._fleet = Fleet(options.gpus)
        self._excluded: set[str] = set()
        # Ids of all jobs of the run, of those whose workers have joined, and since when jobs run.
        self._ids: set[str] = set()
        self._joined: set[str] = set()
        self._running_since: dict[str, float] = {}
        self._lost: Counter[str] = Counter()
        self._workers = Workers(
            "slurm", running=0, wanted=options.gpus, reasons=(Reason(Why.SUBMITTING),)
        )
        # SLURM is asked in another thread: it can be slow, and the run continues meanwhile.
        self._asker = ThreadPoolExecutor(1)
        self._asked: Future[dict[str, Job]] | None = None
        self._ask_at = 0.0
        self._submit_at = 0.0
        self._stuck_since: float | None = None
        self._is_silent = False

    def close(self) -> None:
        """Stop asking SLURM."""
        self._asker.shutdown(wait=False, cancel_futures=True)

    def block_done(self) -> None:
        """Note that some worker finished a block."""
        self._fleet.block_done()

    def poll(self) -> Workers:
        """Replace jobs that ended; see `daskcurv.clusters.base.Cluster`."""
        now = time.monotonic()
        if self._asked is None and now >= self._ask_at:
            self._ids.update(job.job_id for job in self._cluster.workers.values() if job.job_id)
            self._asked = self._asker.submit(slurm_commands.queue, self._name, set(self._ids))
        if self._asked is None or not self._asked.done():
            return self._workers
        asked, self._asked = self._asked, None
        self._ask_at = now + POLL_SECONDS
        connected = {name.split(".")[0] for name in worker_names(self.client)}
        self._joined |= connected
        self._ids |= connected
        try:
            queue = asked.result()
        except SlurmError as error:
            if not self._is_silent:
                log.warning("SLURM does not answer; retrying: %s", error)
            self._is_silent = True
            self._workers = self._count({}, connected, Reason(Why.NO_ANSWER))
            return self._workers
        self._is_silent = False
        if connected:
            self._fleet.joined(job.node for job in queue.values() if job.id in connected)
        self._judge(queue, connected, now)
        self._submit(queue, now)
        self._check_for_stuck_jobs(queue, connected, now)
        reasons = Counter(job.reason for job in queue.values() if job.is_waiting)
        self._workers = self._count(
            queue,
            connected,
            *(Reason(Why.QUEUED, reason, count) for reason, count in sorted(reasons.items())),
        )
        return self._workers

    def _judge(self, queue: dict[str, Job], connected: set[str], now: float) -> None:
        ends = []
        refusal = ""
        for slot, job in list(self._cluster.workers.items()):
            if job.refusal:
                self._forget(slot)
                refusal = job.refusal
            elif job.job_id and self._has_ended(job.job_id, queue):
                self._forget(slot)
                ends.append(self._end_of(job.job_id, queue))
        if refusal and SlurmError(refusal).transient:
            log.warning("SLURM did not accept a job; retrying: %s", refusal)
            # It may have accepted it nevertheless; by then the queue shows it.
            self._submit_at = now + PAUSE_SECONDS
        elif refusal:
            # Counted once, however many were submitted together.
            ends.append(End("", "REJECTED", reason=refusal))
        for end in ends:
            self._fleet.end(end, workers=len(connected), now=now)
        self._fleet.check(
            workers=len(connected),
            starting=self._count_starting(queue, connected, now),
            waiting=sum(job.is_waiting for job in queue.values()),
            now=now,
        )

    def _count_starting(self, queue: dict[str, Job], connected: set[str], now: float) -> int:
        """Return how many jobs are running whose worker may still join."""
        running = {job.id for job in queue.values() if job.is_running} - connected
        self._running_since = {job: self._running_since.get(job, now) for job in running}
        return sum(now - since < START_SECONDS for since in self._running_since.values())

    def _has_ended(self, job_id: str, queue: dict[str, Job]) -> bool:
        job = queue.get(job_id)
        if job is not None:
            self._lost.pop(job_id, None)
            return not (job.is_waiting or job.is_running or job.is_ending)
        # Unknown to SLURM, if it says so twice: the job may have been submitted after the query. A
        # site's squeue may answer from a list that is minutes old; then scontrol knows the job.
        self._lost[job_id] += 1
        return self._lost[job_id] > 1 and not self._is_known(job_id)

    def _is_known(self, job_id: str) -> bool:
        job = Job(job_id, slurm_commands.show(job_id).get("JobState", ""))
        return job.is_waiting or job.is_running or job.is_ending

    def _end_of(self, job_id: str, queue: dict[str, Job]) -> End:
        shown = slurm_commands.show(job_id)
        state = shown.get("JobState", "FORGOTTEN BY SLURM")
        job = queue.get(job_id, Job(job_id, state))
        status = shown.get("ExitCode", "0:0").split(":")[0]
        return End(
            job_id,
            job.state,
            job.node,
            int(status) if status.isdigit() else 0,
            job_id in self._joined,
            job.reason,
            worker_log(job_id),
        )

    def _forget(self, slot: str) -> None:
        async def forget() -> None:
            self._cluster.worker_spec.pop(slot, None)
            job = self._cluster.workers.pop(slot, None)
            if job is not None:
                job.status = Status.closed

        self._cluster.sync(forget)

    def _submit(self, queue: dict[str, Job], now: float) -> None:
        """Submit what is missing; after a series of failures, wait before the next one."""
        # A submission that timed out may still have created a job.
        ours = {job.job_id for job in self._cluster.workers.values()}
        strays = [j for j in queue.values() if j.id not in ours and (j.is_waiting or j.is_running)]
        wanted = self._options.gpus - len(strays)
        if len(self._cluster.worker_spec) >= wanted or now < self._submit_at or self._fleet.on_hold:
            return
        if self._fleet.backing_off:
            self._submit_at = now + BACK_OFF_SECONDS
        excluded = self._fleet.excluded(now)
        if excluded != self._excluded:
            self._excluded = excluded
            settings = job_settings(self._options, self._name, self._excluded)
            self._cluster.new_spec["options"].update(settings)
        self._cluster.scale(wanted)

    def _count(self, queue: dict[str, Job], connected: set[str], *reasons: Reason) -> Workers:
        return Workers(
            "slurm",
            running=len(connected),
            starting=sum(job.is_running and job.id not in connected for job in queue.values()),
            waiting=sum(job.is_waiting for job in queue.values()),
            wanted=self._options.gpus,
            reasons=reasons,
        )

    def _check_for_stuck_jobs(self, queue: dict[str, Job], connected: set[str], now: float) -> None:
        """Raise if there are no workers, and none of the jobs can ever start."""
        alive = [job for job in queue.values() if job.is_waiting or job.is_running]
        stuck = [j for j in alive if j.is_waiting and j.reason.split(",")[0] in _NEVER_STARTS]
        if connected or not alive or len(stuck) < len(alive):
            self._stuck_since = None
            return
        self._stuck_since = self._stuck_since or now
        if now - self._stuck_since > _NEVER_SECONDS:
            raise ClusterError(
                f"job {stuck[0].id} will never start: SLURM's reason is "
                f"{stuck[0].reason}. Change --time, --partition, --account, --qos, --constraint or "
                "--gres; squeue and sinfo show what is available"
            )
