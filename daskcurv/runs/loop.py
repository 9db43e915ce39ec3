"""The loop of a run: which epochs are complete, and what becomes of the missing blocks."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING

from daskcurv.clusters import Cluster, ClusterOptions, open_cluster
from daskcurv.clusters.time_limit import TimeLimit
from daskcurv.errors import ConfigError, DaskcurvError
from daskcurv.runs.block import RunContext, score_block
from daskcurv.runs.events import (
    Done,
    EpochComplete,
    Event,
    Observer,
    SetAside,
    Started,
    watched,
)
from daskcurv.runs.plan import Plan
from daskcurv.runs.window import TASKS_PER_WORKER, feed
from daskcurv.storage.lock import beside

if TYPE_CHECKING:
    from distributed import Client

log = logging.getLogger(__name__)

HOPELESS = 10
"""If so many blocks are set aside before any was computed, the run ends."""
DRAIN_SECONDS = 60.0
"""Time that a launcher with a time limit reserves for ending, besides the running blocks."""
LAST_SECONDS = 25.0
"""Time before its limit at which it ends in any case, because its job would be killed then."""


def complete_epochs(plan: Plan) -> Iterator[EpochComplete]:
    """Yield the epochs that had all their blocks before the run."""
    for epoch, left in plan.left.items():
        if not left:
            yield EpochComplete(epoch, plan.rows[epoch], computed=False)


def compute(
    plan: Plan,
    context: RunContext,
    options: ClusterOptions,
    observers: Sequence[Observer],
    client: Client | None = None,
) -> None:
    """Compute the missing blocks on a cluster.

    Raises
    ------
    ConfigError
        If the time limit of this job is too short for any block.
    DaskcurvError
        If no progress can be expected, or nothing more can be written.
    """
    limit = TimeLimit.of_job()
    if not _may_submit(limit):
        raise ConfigError(
            f"the time limit of job {os.environ.get('SLURM_JOB_ID')} leaves no time to compute "
            "anything; set at least several minutes (--time)"
        )
    missing = plan.missing
    with open_cluster(options, beside(context.store, ".cluster"), client) as cluster:
        if cluster.dashboard:
            log.info("dashboard: %s", cluster.dashboard)
        with watched(observers) as tell:
            tell(
                Started(
                    options.cluster,
                    cluster.dashboard,
                    epochs=int(missing.any(axis=1).sum()),
                    blocks=int(missing.sum()),
                    samples=int(plan.samples[missing].sum()),
                )
            )
            for event in _blocks(plan, context, cluster, limit):
                tell(event)


def _blocks(plan: Plan, context: RunContext, cluster: Cluster, limit: TimeLimit) -> Iterator[Event]:
    left = plan.left
    computed = set_aside = 0
    for event in feed(
        cluster,
        partial(score_block, context),
        plan.tasks(),
        may_start=partial(_may_submit, limit),
        may_wait=partial(limit.allows, blocks=0, seconds=LAST_SECONDS),
    ):
        yield event
        match event:
            case Done(task, result):
                computed += 1
                limit.block_took(result.seconds)
                left[task.epoch] -= 1
                if not left[task.epoch]:
                    yield EpochComplete(task.epoch, task.row)
            case SetAside(_, reason):
                set_aside += 1
                if not computed and set_aside >= HOPELESS:
                    raise DaskcurvError(
                        f"the first {HOPELESS} blocks all failed; the last error: {reason}. "
                        "Nothing was computed; see the log for details"
                    )


def _may_submit(limit: TimeLimit) -> bool:
    """Return whether all that may be in a worker's hands would end in time."""
    return limit.allows(blocks=TASKS_PER_WORKER + 1, seconds=DRAIN_SECONDS)
