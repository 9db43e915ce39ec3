"""Clusters that run the workers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from daskcurv.clusters.base import Cluster
from daskcurv.clusters.options import ClusterOptions

if TYPE_CHECKING:
    from distributed import Client

__all__ = ["open_cluster", "Cluster", "ClusterOptions"]


@contextmanager
def open_cluster(
    options: ClusterOptions, directory: Path, client: Client | None = None
) -> Iterator[Cluster]:
    """Provide workers for the duration of the context.

    Parameters
    ----------
    options : ClusterOptions
    directory : Path
        For files that exist while the run lasts.
    client : distributed.Client, optional
        Of workers that somebody else has started; they are used, and left running.

    Yields
    ------
    Cluster
    """
    if client is not None:
        from daskcurv.clusters.connect import ForeignWorkers

        yield ForeignWorkers(client)
        return
    with _manager(options, directory) as cluster:
        yield cluster


def _manager(options: ClusterOptions, directory: Path) -> AbstractContextManager[Cluster]:
    # Imported when used: dask-jobqueue is slow to import, and touches signal handlers.
    if options.cluster == "slurm":
        from daskcurv.clusters.slurm.cluster import slurm_cluster

        return slurm_cluster(options, directory)
    if options.cluster == "allocation":
        from daskcurv.clusters.slurm.allocation import allocation_cluster

        return allocation_cluster(options, directory)
    if options.cluster == "connect":
        from daskcurv.clusters.connect import connected_cluster

        return connected_cluster(options)
    from daskcurv.clusters.local import local_cluster

    return local_cluster(options.workers, options.device)
