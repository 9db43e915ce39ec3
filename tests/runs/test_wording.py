"""What people read of a run's state."""

from __future__ import annotations

import pytest

from daskcurv.clusters.base import Reason, Why, Workers
from daskcurv.runs.outcome import Outcome, State
from daskcurv.runs.wording import STATES, workers_in_words

WAITING = (Reason(Why.QUEUED, "Priority", 60), Reason(Why.QUEUED, "Resources", 1))


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        (Workers("local", 0, starting=2, wanted=2), "0 workers"),
        (Workers("local", 1, starting=1, wanted=2), "1 worker"),
        (Workers("connect", 4001), "4,001 workers"),
        (
            Workers("connect", 0, reasons=(Reason(Why.NONE_CONNECTED),)),
            "no workers yet, waiting for some",
        ),
        (Workers("slurm", 0, wanted=8, reasons=(Reason(Why.SUBMITTING),)), "submitting jobs"),
        (
            Workers("slurm", 3, wanted=8, reasons=(Reason(Why.NO_ANSWER),)),
            "3 of 8 workers, SLURM does not answer",
        ),
        (Workers("slurm", 8, wanted=8), "8 of 8 workers running"),
        (Workers("slurm", 6, starting=2, wanted=8), "6 of 8 workers running, 2 starting"),
        (
            Workers("slurm", 2, starting=1, waiting=61, wanted=64, reasons=WAITING),
            "2 of 64 workers running, 1 starting, 61 waiting in the queue (Priority, Resources)",
        ),
        (
            Workers(
                "allocation", 1, waiting=1, wanted=2,
                reasons=(Reason(Why.NODE_EXCLUDED, "node3 (GPU 0)", 1),),
            ),
            "1 of 2 workers running",
        ),
    ],
)  # fmt: skip
def test_workers_in_words(workers, expected):
    assert workers_in_words(workers) == expected


@pytest.mark.parametrize(
    ("outcome", "state", "words", "exit_code"),
    [
        (Outcome(), State.FINISHED, "finished", 0),
        (Outcome(left=1, set_aside=1), State.OUT_OF_TIME, "out of time", 3),
        (
            Outcome(set_aside=1, not_finite=1),
            State.SOME_FAILED,
            "finished, some blocks failed",
            1,
        ),
        (
            Outcome(not_finite=1),
            State.NOT_FINITE,
            "finished, with results that are not finite",
            1,
        ),
    ],
)
def test_outcomes_in_words(outcome, state, words, exit_code):
    assert (outcome.state, STATES[outcome.state], outcome.exit_code) == (state, words, exit_code)


def test_every_state_has_words_of_its_own():
    assert STATES.keys() == {*State}
    assert len({*STATES.values()}) == len(State)
