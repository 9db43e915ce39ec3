"""How a run ended."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from daskcurv.runs.events import Done, Event, Failed, SetAside
from daskcurv.runs.tasks import BlockTask
from daskcurv.storage.finite import told

log = logging.getLogger(__name__)


class State(StrEnum):
    """The state of a run."""

    RUNNING = "running"
    FINISHED = "finished"
    SOME_FAILED = "some_failed"
    NOT_FINITE = "not_finite"
    OUT_OF_TIME = "out_of_time"
    INTERRUPTED = "interrupted"
    FAILED = "failed"
    KILLED = "killed"


@dataclass(frozen=True)
class Outcome:
    """How a launch ended.

    Attributes
    ----------
    set_aside : int
        Blocks that failed repeatedly.
    left : int
        Blocks not computed because the launcher ran out of time.
    not_finite : int
        Results that are not finite numbers.
    """

    set_aside: int = 0
    left: int = 0
    not_finite: int = 0

    @property
    def complete(self) -> bool:
        """Whether every block has been computed."""
        return not (self.set_aside or self.left)

    @property
    def exit_code(self) -> int:
        """0 all done; 3 out of time; 1 blocks were set aside, or results are not finite."""
        return 3 if self.left else int(bool(self.set_aside or self.not_finite))

    @property
    def state(self) -> State:
        """The state that the run has reached."""
        if self.left:
            return State.OUT_OF_TIME
        if self.set_aside:
            return State.SOME_FAILED
        return State.NOT_FINITE if self.not_finite else State.FINISHED


class Conclusion:
    """Observer that logs what fails, and concludes how the run ended.

    Parameters
    ----------
    left : dict
        How many blocks each epoch lacks when the run starts.
    """

    def __init__(self, left: dict[int, int]):
        self._left = {**left}
        self._set_aside: list[SetAside[BlockTask]] = []

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case Done(task):
                self._left[task.epoch] -= 1
            case Failed(task, reason):
                log.warning("trying again: %s: %s", task, reason)
            case SetAside(task, reason):
                self._set_aside.append(event)
                log.error("set aside: %s: %s", task, reason)

    @property
    def epochs(self) -> tuple[int, int]:
        """Epochs that are complete, and all that were asked for."""
        return sum(not left for left in self._left.values()), len(self._left)

    def outcome(self, not_finite: Mapping[int, int]) -> Outcome:
        """Log what is wrong or left, and return the outcome.

        Parameters
        ----------
        not_finite : mapping
            Results that are not finite, by epoch.
        """
        if self._set_aside:
            log.error(
                "%d blocks failed repeatedly and were set aside; run the same command again to "
                "retry them:",
                len(self._set_aside),
            )
            for failure in self._set_aside:
                log.error("  %s: %s", failure.task, failure.reason)
        counts = {epoch: count for epoch, count in not_finite.items() if epoch in self._left}
        if counts:
            log.error(
                "%d results are not finite numbers, at epochs %s: the network overflows or its "
                "weights are invalid. Check these checkpoints, or exclude them (--epochs)",
                sum(counts.values()),
                told(counts),
            )
        left = sum(self._left.values()) - len(self._set_aside)
        if left:
            log.warning(
                "the time limit of job %s is near: %d blocks are left; run the same command again "
                "to continue",
                os.environ.get("SLURM_JOB_ID"),
                left,
            )
        return Outcome(len(self._set_aside), left, sum(counts.values()))
