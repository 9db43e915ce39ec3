"""Loaded by every worker process before it takes work."""

from __future__ import annotations

import os
import signal
from importlib import import_module
from typing import Any

from daskcurv.clusters.environment import WORKER_JOB
from daskcurv.logs import log_to_stderr


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the launcher; in a cluster's job, write to its log.

    A terminal sends it to every process of the command; the launcher stops the run in order and
    ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if WORKER_JOB in os.environ:
        log_to_stderr()
        # Now, not at the first block: if a module is missing on a node, the job ends at once.
        import_module("daskcurv.runs.block")
