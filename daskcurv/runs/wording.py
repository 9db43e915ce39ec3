"""The state of a run in words, for people; scripts read the same as numbers and enumerations."""

from __future__ import annotations

from daskcurv.clusters.base import Why, Workers
from daskcurv.logs import counted
from daskcurv.runs.outcome import State

STATES = {
    State.RUNNING: "running",
    State.FINISHED: "finished",
    State.SOME_FAILED: "finished, some blocks failed",
    State.NOT_FINITE: "finished, with results that are not finite",
    State.OUT_OF_TIME: "out of time",
    State.INTERRUPTED: "interrupted",
    State.FAILED: "failed",
    State.KILLED: "killed: no exit was recorded (process or machine stopped)",
}
"""The states of a run in words."""


def workers_in_words(workers: Workers) -> str:
    """Return how many workers there are, and why others are waiting."""
    reasons = {reason.why for reason in workers.reasons}
    if Why.SUBMITTING in reasons:
        return "submitting jobs"
    if Why.NONE_CONNECTED in reasons:
        return "no workers yet, waiting for some"
    if workers.cluster in ("local", "connect"):
        return counted(workers.running, "worker")
    text = f"{workers.running} of {workers.wanted} workers"
    if Why.NO_ANSWER in reasons:
        return f"{text}, SLURM does not answer"
    text += " running"
    if workers.cluster == "slurm":
        if workers.starting:
            text += f", {workers.starting} starting"
        if workers.waiting:
            details = ", ".join(reason.detail for reason in workers.reasons)
            text += f", {workers.waiting} waiting in the queue ({details})"
    return text
