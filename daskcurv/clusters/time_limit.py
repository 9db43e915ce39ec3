"""The time limit of a SLURM job, for the launcher and for its workers.

Both stop before it: the launcher submits no block that might not end in time, and a worker accepts
none. How much that takes is estimated from the longest block so far.
"""

from __future__ import annotations

import math
import os
import time
import zlib

from daskcurv.clusters.slurm.commands import seconds_left

_VARIABLE = "DASKCURV_DEADLINE"
"""Hands the limit down to the process that computes: its end, in seconds since the epoch."""

_STAGGER = 0.05


class TimeLimit:
    """The time that is left to this process.

    Parameters
    ----------
    seconds : float, optional
        From now; by default there is no limit.
    """

    def __init__(self, seconds: float = math.inf):
        self._end = time.monotonic() + seconds
        self._longest = 0.0

    @classmethod
    def of_job(cls) -> TimeLimit:
        """Return the limit of the SLURM job that this process is in, if it is in one."""
        job = os.environ.get("SLURM_JOB_ID")
        left = seconds_left(job) if job else None
        return cls() if left is None else cls(left)

    @classmethod
    def inherited(cls) -> TimeLimit:
        """Return the limit that the parent process handed down, if it did."""
        end = os.environ.get(_VARIABLE)
        return cls() if end is None else cls(float(end) - time.time())

    def hand_down(self, name: str) -> None:
        """Set the limit for the processes that this one starts.

        Up to 5 % early, and differently for each name, so that jobs that started together do not
        all have to be replaced at once.
        """
        left = self._end - time.monotonic()
        if left < math.inf:
            left -= _STAGGER * left * (zlib.crc32(name.encode()) % 1000) / 1000
            os.environ[_VARIABLE] = str(time.time() + left)

    def block_took(self, seconds: float) -> None:
        """Take note of the duration of a block."""
        self._longest = max(self._longest, seconds)

    def allows(self, *, blocks: float, seconds: float) -> bool:
        """Return whether so many blocks like the longest, and then so many seconds, are left."""
        return time.monotonic() + blocks * self._longest + seconds < self._end
