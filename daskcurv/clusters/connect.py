"""Workers of a Dask cluster that is already running."""

from __future__ import annotations

import ipaddress
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Client
from distributed.comm.addressing import get_address_host
from distributed.security import Security

from daskcurv.clusters.base import Reason, Why, Workers
from daskcurv.clusters.options import ClusterOptions
from daskcurv.errors import ClusterError

log = logging.getLogger(__name__)

CONNECT_SECONDS = 15


class ForeignWorkers:
    """Workers that the launcher neither starts nor stops; a `daskcurv.clusters.base.Cluster`."""

    dashboard = ""

    def __init__(self, client: Client):
        self.client = client

    def poll(self) -> Workers:
        """Count the workers.

        Raises
        ------
        ClusterError
            If one of them computes several tasks at a time.
        """
        threads = self.client.nthreads()
        for address, count in threads.items():
            if count != 1:
                raise ClusterError(
                    f"worker {address} has {count} threads; a worker has one device and computes "
                    "one block at a time. Start it with --nthreads 1"
                )
        reasons = () if threads else (Reason(Why.NONE_CONNECTED),)
        return Workers("connect", len(threads), reasons=reasons)

    def block_done(self) -> None:
        """Do nothing."""


@contextmanager
def connected_cluster(options: ClusterOptions) -> Iterator[ForeignWorkers]:
    """Use a running Dask cluster for as long as the context lasts, and leave it running.

    TLS credentials are those of Dask's configuration (``distributed.comm.tls``).

    Raises
    ------
    ClusterError
        If it cannot be reached, or not safely.
    """
    assert options.scheduler is not None
    address = scheduler_address(options.scheduler)
    if not address.startswith("tls://") and not _is_loopback(address) and not options.insecure:
        raise ClusterError(
            f"{address} has no TLS: anyone who can reach it can run programs as you. Start the "
            "scheduler and its workers with --tls-ca-file, --tls-cert and --tls-key and set the "
            "same under distributed.comm.tls in Dask's configuration, or allow this with --insecure"
        )
    try:
        client = Client(address, security=Security(), timeout=CONNECT_SECONDS)
    except (OSError, TimeoutError, TypeError, ValueError) as error:
        hint = ""
        if address.startswith("tls://"):
            hint = "; are distributed.comm.tls.ca-file and client.cert and key set in Dask's \
configuration?"
        raise ClusterError(
            f"cannot connect to the Dask scheduler at {address}: {error}{hint}"
        ) from error
    with client:
        yield ForeignWorkers(client)


def scheduler_address(given: str) -> str:
    """Return the address of a scheduler that is given by address or by its scheduler file."""
    if "://" in given:
        return given
    try:
        address = json.loads(Path(given).read_text())["address"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"scheduler is {given!r}; expected an address such as tls://10.1.2.3:8786, or the file "
            f"of a scheduler started with --scheduler-file ({error})"
        ) from error
    return str(address)


def _is_loopback(address: str) -> bool:
    host = get_address_host(address)
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
