"""Loaded by every local worker process before it takes work."""

from __future__ import annotations

import signal
from typing import Any


def dask_setup(worker: Any) -> None:
    """Leave Ctrl-C to the launcher.

    A terminal sends it to every process of the command; the launcher is the one that knows how to
    stop, and ends its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
