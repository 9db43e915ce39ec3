"""When to replace a worker's job, when to shun a node, and when to give up.

The launcher asks for N jobs and wants N workers, for days. A job that ends is replaced, whatever
the reason: jobs are preempted, nodes fail, time limits pass. But a job script that can never work
must not be submitted for ever. So every end is judged: was it the cluster's doing, or evidence
against the job? The rules, all in `Fleet.end`, count evidence since the last sign of health.

Nothing here talks to SLURM; ends come in as plain data.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from daskcurv.errors import ClusterError

log = logging.getLogger(__name__)

TRIES = 3
"""Ends without a worker, or on one node, or by the time limit, that are evidence enough."""

PATIENCE_SECONDS = 1800.0
"""For how long nothing may start once it has, until the launch ends."""

HESITATE_SECONDS = 60.0
"""What lies between two tries while a fleet is hesitant."""

UNFIT = 90
"""Exit status of a worker whose node failed the check of its device."""

_NOT_ITS_FAULT = ("PREEMPTED", "NODE_FAIL", "CANCELLED", "REVOKED")
_LOG_LINES = 6


@dataclass(frozen=True)
class End:
    """How a worker's job ended.

    Attributes
    ----------
    job : str
        Its id.
    state : str
        SLURM's word for it, or ``"REJECTED"`` if it was never accepted.
    node : str
        Empty if it never had one.
    exit_status : int
    joined : bool
        Whether its worker had ever joined the scheduler.
    reason : str
        SLURM's reason, where it gave one.
    log : Path, optional
    """

    job: str
    state: str
    node: str = ""
    exit_status: int = 0
    joined: bool = False
    reason: str = ""
    log: Path | None = None

    def __str__(self) -> str:
        if self.state == "REJECTED":
            return f"the submission was refused: {self.reason}"
        where = f" on {self.node}" if self.node else ""
        status = f", exit status {self.exit_status}" if self.exit_status else ""
        reason = f" ({self.reason})" if self.reason not in ("", "None") else ""
        return f"job {self.job}{where} ended: {self.state}{status}{reason}"

    @property
    def is_evidence(self) -> bool:
        """Whether it speaks against the job rather than for a busy cluster."""
        return self.state not in _NOT_ITS_FAULT

    @property
    def is_farewell(self) -> bool:
        """Whether its worker left in good order, as one does whose time is nearly up."""
        return self.joined and self.state == "COMPLETED"


class Fleet:
    """Judges the ends of jobs.

    Parameters
    ----------
    wanted : int
        Number of workers that are to be held.

    Attributes
    ----------
    excluded : set of str
        Nodes that failed their check `TRIES` times.
    """

    def __init__(self, wanted: int):
        self.excluded: set[str] = set()
        self._wanted = wanted
        self._unfit: Counter[str] = Counter()
        self._without_worker: list[End] = []
        self._without_block: list[End] = []
        self._failing_since = 0.0
        self._ever_joined = False

    def joined(self) -> None:
        """Note that a worker is there, so that the job script works somewhere."""
        self._ever_joined = True
        self._without_worker.clear()

    def block_done(self) -> None:
        """Note that a block was computed, so that workers work."""
        self.joined()
        self._without_block.clear()

    @property
    def hesitant(self) -> bool:
        """Whether so much failed lately that the next job had better wait a little."""
        return len(self._without_worker) >= TRIES or len(self._without_block) >= TRIES

    def end(self, end: End, *, workers: int, jobs: int, now: float) -> None:
        """Take note of an end.

        Parameters
        ----------
        end : End
        workers : int
            How many workers are there now.
        jobs : int
            How many jobs are in the queue or running now.
        now : float
            By the monotonic clock, in seconds.

        Raises
        ------
        ClusterError
            If there is no point in going on.
        """
        if not end.is_evidence:
            log.info("%s; it is replaced", end)
            return
        log.log(logging.INFO if end.is_farewell else logging.WARNING, "%s", end)
        if not self._without_worker:
            self._failing_since = now
        self._without_block.append(end)
        if not end.joined:
            self._without_worker.append(end)
        if end.exit_status == UNFIT and end.node:
            self._shun_if_bad(end)
        nobody = workers == 0 and (jobs == 0 or end.state != "REJECTED")
        if nobody and self._nowhere(now):
            raise _hopeless("no worker could be started", self._without_worker)
        late = [other for other in self._without_block if other.joined and other.state == "TIMEOUT"]
        if len(late) >= max(TRIES, self._wanted):
            raise _hopeless(
                "jobs reach their time limit before a block is done; give a longer --time, or a "
                "smaller --block_size to a new store",
                late,
            )
        if len(self._without_block) >= TRIES + 2 * self._wanted:
            raise _hopeless("workers keep ending before a block is done", self._without_block)

    def _shun_if_bad(self, end: End) -> None:
        self._unfit[end.node] += 1
        if self._unfit[end.node] < TRIES or end.node in self.excluded:
            return
        self.excluded.add(end.node)
        log.warning(
            "%s failed its check %d times and gets no more workers: %s",
            end.node,
            TRIES,
            last_lines(end.log, 1) or "see its log",
        )

    def _nowhere(self, now: float) -> bool:
        """Whether enough jobs failed to start, and not just on one bad node."""
        if self._ever_joined:
            # It has worked before: a file system may be away for a while, or a partition closed.
            return self.hesitant and now - self._failing_since > PATIENCE_SECONDS
        ends = self._without_worker
        bad_node = len({end.node for end in ends}) == 1 and ends[-1].exit_status == UNFIT
        return len(ends) >= TRIES and not bad_node


def _hopeless(what: str, ends: list[End]) -> ClusterError:
    last = ends[-1]
    text = f"{what}; given up after {len(ends)} tries. The last: {last}"
    endings = (ending_of(end.log) for end in reversed(ends))
    return ClusterError(text + next(filter(None, endings), ""))


def ending_of(log_file: Path | None) -> str:
    """Return the end of a log for an error's text, empty if there is none."""
    lines = last_lines(log_file, _LOG_LINES)
    return f"\n{log_file} ends with:\n  " + lines.replace("\n", "\n  ") if lines else ""


def last_lines(path: Path | None, count: int) -> str:
    """Return the last lines of a log, empty if there is none."""
    if path is None:
        return ""
    try:
        with open(path, errors="replace") as file:
            lines = [line.rstrip() for line in file if line.strip()]
    except OSError:
        return ""
    return "\n".join(lines[-count:])
