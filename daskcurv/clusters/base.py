"""The interface of a cluster to the pipeline, and code that all clusters share."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

if TYPE_CHECKING:
    from distributed import Client

ClusterName = Literal["local", "slurm", "allocation", "connect"]


class Why(StrEnum):
    """Why workers are not running."""

    SUBMITTING = "submitting"
    QUEUED = "queued"
    NO_ANSWER = "no_answer"
    NODE_EXCLUDED = "node_excluded"
    BACKING_OFF = "backing_off"
    NONE_CONNECTED = "none_connected"


@dataclass(frozen=True)
class Reason:
    """Why some workers are not running.

    Attributes
    ----------
    why : Why
    detail : str
        In the cluster's own words: SLURM's reason for a waiting job, or a node.
    workers : int
        How many workers it concerns; 0 if all, or if unknown.
    """

    why: Why
    detail: str = ""
    workers: int = 0


@dataclass(frozen=True)
class Workers:
    """The workers of a cluster, counted.

    Attributes
    ----------
    cluster : {"local", "slurm", "allocation", "connect"}
    running : int
        Connected to the scheduler.
    starting : int
        Started, not connected yet.
    waiting : int
        Cannot start yet.
    wanted : int or None
        The number that the launcher maintains; None if it starts none itself.
    reasons : tuple of Reason
        Why there are fewer than wanted, as far as it is known.
    """

    cluster: ClusterName
    running: int
    starting: int = 0
    waiting: int = 0
    wanted: int | None = None
    reasons: tuple[Reason, ...] = ()


def scheduler_settings(allowed_failures: int) -> dict[str, Any]:
    """Return Dask's configuration for a scheduler that the launcher starts.

    Parameters
    ----------
    allowed_failures : int
        How many more workers a task gets that kills its worker.
    """
    return {
        "distributed.scheduler.allowed-failures": allowed_failures,
        # Tasks wait at the scheduler, not behind a slow one at a worker.
        "distributed.scheduler.worker-saturation": 1.0,
        # Dask permanently closes a worker that has not come back by then, by default after 15 s. To
        # start a worker again takes longer on a busy machine; a requeued job takes hours.
        "distributed.deploy.lost-worker-timeout": "3650 days",
    }


class Cluster(Protocol):
    """Workers that can start and stop at any time, and the connection to them.

    Attributes
    ----------
    client : distributed.Client
    dashboard : str
        How to open Dask's dashboard, empty if there is none.
    """

    client: Client
    dashboard: str

    def poll(self) -> Workers:
        """Check the workers and start missing ones; called about once a second.

        Raises
        ------
        ClusterError
            If there will be no workers.
        """

    def block_done(self) -> None:
        """Record that a worker finished a block."""


def way_to_dashboard(link: str) -> str:
    """Return how to open a dashboard that only this host can reach."""
    port = link.rsplit(":", 1)[1].split("/")[0]
    tunnel = f"ssh -L {port}:127.0.0.1:{port} {socket.gethostname()}"
    return f"{tunnel}, then http://127.0.0.1:{port}/status"


def worker_names(client: Client) -> list[str]:
    """Return the names of the workers that are connected."""
    workers = client.scheduler_info(n_workers=-1)["workers"]
    return [str(worker["name"]) for worker in workers.values()]
