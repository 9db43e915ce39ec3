"""Workers on this machine: one per visible GPU, else one per CPU core."""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from typing import Any

import dask
import torch
from distributed import Client, Nanny, Scheduler
from distributed.core import Status
from distributed.deploy.spec import SpecCluster
from distributed.security import Security

from daskcurv.clusters.base import Workers, scheduler_settings
from daskcurv.clusters.environment import WORKER_ENVIRONMENT
from daskcurv.errors import ClusterError, ConfigError
from daskcurv.logs import counted

log = logging.getLogger(__name__)

ALLOWED_FAILURES = 3
PATIENCE_SECONDS = 300.0
FAILED_STARTS = 5
"""If so many starts of worker processes in a row fail, the run ends."""


class LocalWorkers:
    """Worker processes on this machine; a `daskcurv.clusters.base.Cluster`."""

    dashboard = ""

    def __init__(self, client: Client, cluster: SpecCluster):
        self.client = client
        self._cluster = cluster
        self._seen = time.monotonic()
        self._failed_starts = 0
        self._starting = self._start()

    def poll(self) -> Workers:
        """Count the workers, and start missing ones.

        Most that die are replaced by their nannies. If one dies while it starts, its nanny ends
        too, and a new one is started.

        Raises
        ------
        ClusterError
            If there have been none for so long that none can be expected.
        """
        if self._starting.done():
            failure = self._starting.exception()
            self._failed_starts = self._failed_starts + 1 if failure else 0
            if failure:
                log.warning("a worker process ended while it was starting: %s", failure)
            self._starting = self._start()
        count = len(self.client.nthreads())
        now = time.monotonic()
        if count:
            self._seen = now
        elif self._failed_starts >= FAILED_STARTS or now - self._seen > PATIENCE_SECONDS:
            raise ClusterError(
                "worker processes end while they start; their messages are above. The machine may "
                "lack memory: run the same command again, with fewer --workers if needed"
                if self._failed_starts
                else f"there has been no worker process for {PATIENCE_SECONDS:.0f} s; the machine "
                "may lack memory. Run the same command again, with fewer --workers if needed"
            )
        wanted = len(self._cluster.worker_spec)
        return Workers("local", count, starting=max(0, wanted - count), wanted=wanted)

    def block_done(self) -> None:
        """Do nothing."""

    def _start(self) -> Future[None]:
        loop: Any = self._cluster.loop
        return asyncio.run_coroutine_threadsafe(_start_lacking(self._cluster), loop.asyncio_loop)


async def _start_lacking(cluster: SpecCluster) -> None:
    for name, nanny in [*cluster.workers.items()]:
        if nanny.status in (Status.failed, Status.closed):
            del cluster.workers[name]
    await cluster


@contextmanager
def local_cluster(workers: int | None = None, device: str = "auto") -> Iterator[LocalWorkers]:
    """Run worker processes on this machine for as long as the context lasts.

    Each has one thread and one device. A worker that dies is replaced. All connections stay on
    the loopback interface and use TLS with credentials of their own, because on a shared machine
    anyone can reach loopback, and whoever reaches a Dask scheduler can run code as its owner.

    Parameters
    ----------
    workers : int, optional
        By default one per visible GPU, or one per CPU core where there is none.
    device : {"auto", "cuda", "cpu"}

    Yields
    ------
    LocalWorkers

    Raises
    ------
    ConfigError
        If more workers are asked for than there are GPUs.
    """
    gpus = gpus_for(workers, device)
    count = workers or len(gpus) or available_cores()
    device_of_each = "GPU" if gpus else "CPU core"
    log.info("starting %s, with one %s each", counted(count, "local worker"), device_of_each)
    security = Security.temporary()
    connection = {"host": "127.0.0.1", "protocol": "tls://", "security": security}
    common: dict[str, Any] = {
        **connection,
        "nthreads": 1,
        "memory_limit": 0,
        "dashboard": False,
        "preload": ["daskcurv.clusters.preload"],
        "silence_logs": logging.CRITICAL,
    }
    settings = {
        **scheduler_settings(ALLOWED_FAILURES),
        "distributed.nanny.pre-spawn-environ": WORKER_ENVIRONMENT,
    }
    with ExitStack() as stack:
        stack.enter_context(_environment_restored())
        try:
            scratch = stack.enter_context(
                tempfile.TemporaryDirectory(prefix="daskcurv-", ignore_cleanup_errors=True)
            )
            spec = {
                rank: {
                    "cls": Nanny,
                    "options": {
                        **common,
                        "local_directory": scratch,
                        "env": {"CUDA_VISIBLE_DEVICES": gpus[rank]} if gpus else {},
                    },
                }
                for rank in range(count)
            }
            scheduler = {
                "cls": Scheduler,
                "options": {**connection, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
            }
            stack.enter_context(dask.config.set(settings))
            cluster = stack.enter_context(
                SpecCluster(scheduler=scheduler, security=security, silence_logs=logging.CRITICAL)
            )
            client = stack.enter_context(Client(cluster, security=security))
        except (OSError, RuntimeError) as error:
            raise ClusterError(
                f"the scheduler of the worker processes cannot be started: {error}. It needs a "
                "directory for temporary files (TMPDIR) with free space, and a free port"
            ) from error
        # Not given to the constructor, which gives up if one of them does not start.
        cluster.worker_spec.update(spec)
        yield LocalWorkers(client, cluster)


@contextmanager
def _environment_restored() -> Iterator[None]:
    """Put back the variables that Dask sets in this process, for its workers to inherit.

    Programs that are started later would compute on one thread, and train another network.
    """
    before = {name: os.environ.get(name) for name in (*WORKER_ENVIRONMENT, "PYTHONHASHSEED")}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def gpus_for(workers: int | None, device: str) -> list[str]:
    """Return the GPUs for local workers; empty if they compute on CPUs.

    Raises
    ------
    ConfigError
        If there is none, and one is asked for, or more workers are asked for than there are GPUs.
    """
    gpus = [] if device == "cpu" else visible_gpus()
    if device == "cuda" and not gpus:
        raise ConfigError("device is 'cuda', but no GPU is visible; omit it, or use cpu")
    if gpus and workers and workers > len(gpus):
        raise ConfigError(
            f"workers is {workers}, but {len(gpus)} GPU(s) are visible; expected at most one "
            "worker per GPU"
        )
    return gpus


def visible_gpus() -> list[str]:
    """Return the visible GPUs, as values for CUDA_VISIBLE_DEVICES."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(i) for i in range(torch.cuda.device_count())]
    return names[: torch.cuda.device_count()]


def available_cores() -> int:
    """Return the CPU cores this process may use."""
    return len(os.sched_getaffinity(0))
