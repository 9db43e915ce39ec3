"""Events of a run, made without one."""

from __future__ import annotations

from pathlib import Path

from daskcurv.runs.events import Done, Started
from daskcurv.runs.tasks import BlockResult, BlockTask


def started(epochs: int, blocks: int, samples: int) -> Started:
    return Started("local", "", epochs, blocks, samples)


def task(epoch: int = 0, block: int = 0, samples: int = 100) -> BlockTask:
    return BlockTask(epoch, 0, block, Path("w.pt"), "", samples)


def done(
    samples: int = 100,
    *,
    block: int = 0,
    worker: str = "a:1",
    address: str = "tls://a:5",
    job: str = "",
) -> Done[BlockTask, BlockResult]:
    result = BlockResult(True, 10.0, 0.1, worker, "cpu", 8, "", 0, address, job)
    return Done(task(block=block, samples=samples), result)
