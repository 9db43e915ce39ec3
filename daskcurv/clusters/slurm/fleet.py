"""When to replace a worker's job, when to exclude a node, and when to give up.

The launcher requests N jobs and maintains N workers, for days. A job that ends is replaced,
whatever the reason: jobs are preempted, nodes fail, time limits pass. But a job script that can
never work must not be submitted forever. So `Fleet.end` notes every end: was it caused by the
cluster, or is it evidence against the job, or against the node? `Fleet.check` decides from the
evidence since a worker last joined or a block was last done, and waits for the jobs that are still
starting: a bad node fails within seconds, a good one takes longer to start a worker.

Nothing here talks to SLURM; ends come in as plain data.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from daskcurv.errors import ClusterError

log = logging.getLogger(__name__)

TRIES = 3
"""Ends on one node, nodes without a worker, or ends by the time limit, that are evidence enough."""

PATIENCE_SECONDS = 1800.0
"""Time without any start, after a first one, until the launch ends; time for which a node is
excluded if nothing starts on it."""

START_SECONDS = 900.0
"""A job that has run this long without a worker no longer counts as starting."""

BACK_OFF_SECONDS = 60.0
"""Time between two tries while a fleet is backing off."""

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
        SLURM's state, or ``"REJECTED"`` if it was never accepted.
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
        """Whether the job itself is the likely cause, rather than a busy cluster."""
        return self.state not in _NOT_ITS_FAULT

    @property
    def left_on_time(self) -> bool:
        """Whether its worker stopped cleanly, as workers do before their time limit."""
        return self.joined and self.state == "COMPLETED"


class Fleet:
    """Evaluates how jobs ended.

    Parameters
    ----------
    wanted : int
        Number of workers to maintain.

    Attributes
    ----------
    on_hold : bool
        Whether to start no more jobs, as of the last `check`: all so far failed, and it depends on
        those that are starting.
    """

    def __init__(self, wanted: int):
        self.on_hold = False
        self._wanted = wanted
        self._workers_on: set[str] = set()
        self._failures: Counter[str] = Counter()
        self._unfit: Counter[str] = Counter()
        self._excluded_until: dict[str, float] = {}
        self._without_worker: list[End] = []
        self._without_block: list[End] = []
        self._failing_since = 0.0
        self._ever_joined = False
        self._is_news = False

    def joined(self, nodes: Iterable[str] = ()) -> None:
        """Note that workers have joined, which shows that the job script works somewhere.

        Parameters
        ----------
        nodes : iterable of str
            Where they are.
        """
        self._ever_joined = True
        self._without_worker.clear()
        self._workers_on = set(nodes)
        for node in self._workers_on:
            self._failures.pop(node, None)

    def block_done(self) -> None:
        """Note that a block was computed, which shows that workers work."""
        self._ever_joined = True
        self._without_worker.clear()
        self._without_block.clear()

    @property
    def backing_off(self) -> bool:
        """Whether so much failed lately that the next job should wait a little.

        Not before any worker has joined: then jobs are tried on a few nodes, one after another.
        """
        refused = any(end.state == "REJECTED" for end in self._without_worker)
        return len(self._without_block) >= TRIES and (self._ever_joined or refused)

    def excluded(self, now: float) -> set[str]:
        """Return the nodes that get no workers."""
        return {node for node, until in self._excluded_until.items() if now < until}

    def end(self, end: End, *, workers: int, now: float) -> None:
        """Take note of an end.

        Parameters
        ----------
        end : End
        workers : int
            How many workers are there now.
        now : float
            By the monotonic clock, in seconds.
        """
        if not end.is_evidence:
            log.info("%s; it is replaced", end)
            return
        log.log(logging.INFO if end.left_on_time else logging.WARNING, "%s", end)
        self._is_news = True
        if not self._without_worker:
            self._failing_since = now
        self._without_block.append(end)
        if end.joined:
            return
        self._without_worker.append(end)
        if not end.node:
            return
        if end.exit_status == UNFIT:
            self._unfit[end.node] += 1
            if self._unfit[end.node] >= TRIES:
                self._exclude(end, f"failed its check {TRIES} times and gets no more workers", now)
        # If it worked before and works nowhere now, the node is not the cause.
        self._failures[end.node] += 1
        if self._failures[end.node] >= TRIES and (workers or not self._ever_joined):
            self._failures.pop(end.node)
            self._exclude(
                end,
                f"started no worker in {TRIES} tries and is not used for "
                f"{PATIENCE_SECONDS / 60:.0f} min",
                now,
                PATIENCE_SECONDS,
            )

    def _exclude(self, end: End, why: str, now: float, seconds: float = math.inf) -> None:
        if self._excluded_until.get(end.node, -math.inf) > now:
            return
        self._excluded_until[end.node] = now + seconds
        log.warning("%s %s: %s", end.node, why, last_lines(end.log, 1) or "see its log")

    def check(self, *, workers: int, starting: int, waiting: int, now: float) -> None:
        """Raise if the launch cannot continue.

        Parameters
        ----------
        workers : int
            How many workers are there now.
        starting : int
            How many jobs are running whose worker may still join.
        waiting : int
            How many jobs are waiting in the queue.
        now : float
            By the monotonic clock, in seconds.

        Raises
        ------
        ClusterError
            If no progress can be expected.
        """
        self.on_hold = self._is_news and workers == 0 and self._nowhere(waiting, now)
        if self.on_hold and not starting:
            raise self.hopeless("no worker could be started")
        self._is_news = self.on_hold
        late = [end for end in self._without_block if end.joined and end.state == "TIMEOUT"]
        if len(late) >= max(TRIES, self._wanted):
            raise _hopeless(
                "jobs reach their time limit before a block is done; give a longer --time, or "
                "start a new store with a smaller --block_size",
                late,
            )
        ended = [end for end in self._without_block if end.joined]
        if len(ended) >= TRIES + 2 * self._wanted:
            ((worst, count),) = Counter(end.node for end in ended).most_common(1)
            if not workers or not self._workers_on - {worst} or len(ended) - count >= TRIES:
                raise _hopeless("workers keep ending before a block is done", ended)
            # Workers elsewhere may be at their first block.
            last = next(end for end in reversed(ended) if end.node == worst)
            self._exclude(last, "ends its workers before a block is done and gets no more", now)

    def _nowhere(self, waiting: int, now: float) -> bool:
        """Whether enough jobs failed to start, and not just on one or two bad nodes."""
        ends = self._without_worker
        if self._ever_joined:
            # It has worked before: a file system may be away for a while, or a partition closed.
            return len(ends) >= TRIES and now - self._failing_since > PATIENCE_SECONDS
        if len(ends) < TRIES:
            return False
        if any(end.state == "REJECTED" for end in ends):
            return waiting == 0
        nodes = {end.node or end.job for end in ends}
        return len(nodes) >= TRIES

    def hopeless(self, what: str) -> ClusterError:
        """Return the error to end with, which names the last job that failed to start."""
        return _hopeless(what, self._without_worker or self._without_block)


def _hopeless(what: str, ends: list[End]) -> ClusterError:
    last = ends[-1]
    text = f"{what}; given up after {len(ends)} tries. The last: {last}"
    if not last.node and (ran := [end for end in ends if end.node]):
        text += f"; before it, {ran[-1]}"
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
