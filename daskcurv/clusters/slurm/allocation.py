"""Workers inside a SLURM allocation, one for each GPU of every node.

The launcher runs in the batch step (or in the shell of ``salloc``) and is the scheduler; ``srun``
starts each worker as a step of its own, so that one that ends can be started again without
disturbing the others. A step sees all GPUs of its node and takes the one of its number.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import dask
from distributed import Client, Scheduler
from distributed.deploy.spec import SpecCluster

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
from daskcurv.clusters.slurm.cluster import ALLOWED_FAILURES
from daskcurv.clusters.slurm.environment import step_environment, tell_about_steps
from daskcurv.clusters.slurm.fleet import BACK_OFF_SECONDS, START_SECONDS, End, Fleet
from daskcurv.clusters.slurm.job_script import DEATH_TIMEOUT_SECONDS
from daskcurv.clusters.slurm.run_directory import open_credentials, run_directory
from daskcurv.errors import ClusterError
from daskcurv.logs import LOG_DIR

log = logging.getLogger(__name__)

_CLOSE_SECONDS = 10.0


@dataclass
class Slot:
    """A place for a worker: one GPU of one node, or a CPU core.

    Attributes
    ----------
    node : str
    number : int
        Among the node's, from 0.
    log : Path
    kind : {"GPU", "CPU worker"}
    starts : int
    step : Popen, optional
        The ``srun`` of the worker that has it now.
    started_at : float
        When that was started, by the monotonic clock.
    start_at : float
        Not to be filled before then.
    """

    node: str
    number: int
    log: Path
    kind: str = "GPU"
    starts: int = 0
    step: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    start_at: float = 0.0

    @property
    def place(self) -> str:
        """Where it is, in words."""
        return f"{self.node} ({self.kind} {self.number})"

    @property
    def worker(self) -> str:
        """Name of the worker that has it now."""
        return f"{self.node}-{self.number}.{self.starts}"


@contextmanager
def allocation_cluster(options: ClusterOptions, directory: Path) -> Iterator[Steps]:
    """Run workers on the nodes of this allocation for as long as the context lasts.

    Raises
    ------
    ClusterError
        If this is not a process of an allocation, or it has no GPUs.
    """
    job = os.environ.get("SLURM_JOB_ID")
    if job is None:
        raise ClusterError(
            "--cluster allocation is for use inside a SLURM allocation, and SLURM_JOB_ID is not "
            "set; start it under salloc or sbatch, or use --submit"
        )
    slurm_commands.check_installed("srun", "scontrol")
    check_interface(options.interface)
    tell_about_steps()
    slots = slots_of(job, options.device)
    with run_directory(directory) as private, contextlib.ExitStack() as stack:
        security = open_credentials(private, options.insecure)
        stack.enter_context(dask.config.set(scheduler_settings(ALLOWED_FAILURES)))
        scheduler = {
            "cls": Scheduler,
            "options": {
                "protocol": "tls://" if security else "tcp://",
                "security": security,
                "interface": options.interface,
                "dashboard": True,
                "dashboard_address": "127.0.0.1:0",
            },
        }
        cluster = stack.enter_context(
            SpecCluster(workers={}, scheduler=scheduler, security=security, silence_logs=50)
        )
        client = stack.enter_context(Client(cluster, security=security))
        options_of_worker = ["--death-timeout", str(DEATH_TIMEOUT_SECONDS)]
        if security:
            tls = security.get_tls_config_for_role("worker")
            for name in ("ca_file", "cert", "key"):
                options_of_worker += [f"--tls-{name.replace('_', '-')}", str(tls[name])]
        if options.interface:
            options_of_worker += ["--interface", options.interface]
        command = [
            "--device",
            options.device_of_jobs,
            cluster.scheduler_address,
            *options_of_worker,
        ]
        steps = Steps(client, slots, command)
        steps.dashboard = way_to_dashboard(cluster.dashboard_link)
        log.info(
            "%d workers on %d nodes of allocation %s; their logs are %s",
            len(slots),
            len({slot.node for slot in slots}),
            job,
            _log_of(job, "*", "*"),
        )
        stack.callback(steps.close)
        yield steps


class Steps:
    """The workers of an allocation; a `daskcurv.clusters.base.Cluster`.

    Parameters
    ----------
    client : distributed.Client
    slots : list of Slot
    arguments : list of str
        Of `daskcurv.clusters.worker`, without slot and name.
    """

    dashboard = ""

    def __init__(self, client: Client, slots: list[Slot], arguments: list[str]):
        self.client = client
        self._slots, self._arguments = slots, arguments
        self._fleet = Fleet(len(slots))
        self._joined: set[str] = set()

    def block_done(self) -> None:
        """Note that some worker finished a block."""
        self._fleet.block_done()

    def poll(self) -> Workers:
        """Start missing workers; see `daskcurv.clusters.base.Cluster`."""
        now = time.monotonic()
        connected = set(worker_names(self.client))
        if connected:
            self._joined |= connected
            self._fleet.joined(slot.place for slot in self._slots if slot.worker in connected)
        for slot in self._slots:
            if slot.step is not None and (status := slot.step.poll()) is not None:
                slot.step = None
                end = End(
                    slot.worker,
                    "FAILED" if status else "COMPLETED",
                    slot.place,
                    status,
                    slot.worker in self._joined,
                    log=slot.log,
                )
                self._fleet.end(end, workers=len(connected), now=now)
                slot.start_at = now + (BACK_OFF_SECONDS if self._fleet.backing_off else 0)
        self._fleet.check(
            workers=len(connected),
            starting=sum(
                slot.step is not None
                and slot.worker not in connected
                and now - slot.started_at < START_SECONDS
                for slot in self._slots
            ),
            waiting=0,
            now=now,
        )
        excluded = self._fleet.excluded(now)
        for slot in self._slots:
            if (
                slot.step is None
                and now >= slot.start_at
                and slot.place not in excluded
                and not self._fleet.on_hold
            ):
                self._start(slot)
        if all(slot.step is None and slot.place in excluded for slot in self._slots):
            raise self._fleet.hopeless("no worker could be started on any node of this allocation")
        empty = [slot for slot in self._slots if slot.step is None]
        return Workers(
            "allocation",
            running=len(connected),
            starting=sum(
                slot.step is not None and slot.worker not in connected for slot in self._slots
            ),
            waiting=len(empty),
            wanted=len(self._slots),
            reasons=tuple(
                Reason(
                    Why.NODE_EXCLUDED if slot.place in excluded else Why.BACKING_OFF, slot.place, 1
                )
                for slot in empty
            ),
        )

    def _start(self, slot: Slot) -> None:
        slot.starts += 1
        slot.started_at = time.monotonic()
        with open(slot.log, "ab") as sink:
            slot.step = subprocess.Popen(
                [
                    "srun", "--overlap", "--nodes=1", "--ntasks=1", f"--nodelist={slot.node}",
                    sys.executable, "-m", "daskcurv.clusters.worker", *self._arguments,
                    "--slot", str(slot.number), "--step", slot.worker,
                ],
                env=step_environment(),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=sink,
                # Ctrl-C in a terminal is handled by the launcher.
                start_new_session=True,
            )  # fmt: skip

    def close(self) -> None:
        """End all workers: ask them to, then their steps."""
        steps = [slot.step for slot in self._slots if slot.step is not None]
        with contextlib.suppress(OSError, TimeoutError):
            self.client.retire_workers(list(self.client.nthreads()))
        for sent in (None, signal.SIGTERM, signal.SIGKILL):
            deadline = time.monotonic() + _CLOSE_SECONDS
            for step in steps:
                if sent is not None and step.poll() is None:
                    step.send_signal(sent)
            for step in steps:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    step.wait(max(0.1, deadline - time.monotonic()))


def slots_of(job: str, device: str) -> list[Slot]:
    """Return a slot for each GPU of each node of a job.

    On CPUs, a node without GPUs has one slot.

    Raises
    ------
    ClusterError
        If there are no GPUs and `device` is not the CPU.
    """
    nodes = slurm_commands.nodes_of(job)
    counts = {node: max(count, 1) if device == "cpu" else count for node, count in nodes.items()}
    if not sum(counts.values()):
        raise ClusterError(
            f"allocation {job} has no GPUs on {', '.join(nodes) or 'its nodes'}; request some, for "
            "example with salloc --gres=gpu:2, or add --device cpu"
        )
    LOG_DIR.mkdir(exist_ok=True)
    kind = "CPU worker" if device == "cpu" else "GPU"
    return [
        Slot(node, number, _log_of(job, node, str(number)), kind)
        for node, count in counts.items()
        for number in range(count)
    ]


def _log_of(job: str, node: str, number: str) -> Path:
    return LOG_DIR.absolute() / f"{job}_worker_{node}_{number}.out"
