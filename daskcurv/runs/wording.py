"""The state of a run in words, for people; scripts read the same as numbers and enumerations."""

from __future__ import annotations

from daskcurv.clusters.base import Why, Workers
from daskcurv.logs import counted


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
