"""Which blocks of which epochs are still to be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from daskcurv.experiment.checkpoints import Checkpoint
from daskcurv.experiment.experiment import Experiment
from daskcurv.logs import counted
from daskcurv.runs.options import LaunchOptions
from daskcurv.runs.tasks import BlockTask
from daskcurv.storage import ResultsStore
from daskcurv.storage.schema import DEFAULT_BLOCK_SIZE


@dataclass(frozen=True)
class Plan:
    """The work of a run.

    Attributes
    ----------
    checkpoints : sequence of Checkpoint
        One for each epoch asked for.
    rows : mapping
        The store's row of each epoch.
    done : ndarray of bool, shape (rows, blocks)
        Blocks that the store has.
    samples : ndarray of int64, shape (epochs, blocks)
        Active samples of each block, in the order of `checkpoints`.
    """

    checkpoints: Sequence[Checkpoint]
    rows: Mapping[int, int]
    done: NDArray[np.bool_]
    samples: NDArray[np.int64]

    @cached_property
    def missing(self) -> NDArray[np.bool_]:
        """Blocks to compute, shape (epochs, blocks)."""
        rows = [self.rows[checkpoint.epoch] for checkpoint in self.checkpoints]
        missing: NDArray[np.bool_] = ~self.done[rows]
        return missing

    @property
    def left(self) -> dict[int, int]:
        """How many blocks each epoch lacks."""
        counts = self.missing.sum(axis=1).tolist()
        return {one.epoch: count for one, count in zip(self.checkpoints, counts, strict=True)}

    def tasks(self) -> Iterator[BlockTask]:
        """Yield the blocks to compute, epoch by epoch, so that workers share a checkpoint."""
        todo = np.flatnonzero(self.missing.any(axis=1)).tolist()
        for index, following in zip_longest(todo, todo[1:]):
            checkpoint = self.checkpoints[index]
            for block in np.flatnonzero(self.missing[index]).tolist():
                yield BlockTask(
                    epoch=checkpoint.epoch,
                    row=self.rows[checkpoint.epoch],
                    block=block,
                    # Workers of a cluster that was running before can be in another directory.
                    checkpoint=checkpoint.path.absolute(),
                    sha256=checkpoint.sha256,
                    samples=int(self.samples[index, block]),
                    following=None
                    if following is None
                    else self.checkpoints[following].path.absolute(),
                )

    def summary(self) -> str:
        """Return one line: epochs, blocks and samples, in all and left."""
        total, left = self.missing.size, int(self.missing.sum())
        epochs_left = int(self.missing.any(axis=1).sum())
        return (
            f"{counted(len(self.checkpoints), 'epoch')}, {counted(total, 'block')}, "
            f"{counted(int(self.samples.sum()), 'active sample')}; to do: "
            f"{counted(epochs_left, 'epoch')}, {counted(left, 'block')}, "
            f"{counted(int(self.samples[self.missing].sum()), 'sample')}"
        )


def make_plan(
    options: LaunchOptions,
    experiment: Experiment,
    checkpoints: list[Checkpoint],
    store: ResultsStore | None,
) -> Plan:
    """Plan the work; epochs that the store lacks are planned as if it had them.

    Parameters
    ----------
    options : LaunchOptions
    experiment : Experiment
    checkpoints : list of Checkpoint
        One for each epoch asked for, in order.
    store : ResultsStore or None
        What is done already.
    """
    num_samples = len(experiment.dataset)
    block_size = store.block_size if store else options.block_size or DEFAULT_BLOCK_SIZE
    block_size = min(block_size, num_samples)
    rows = dict(store.rows) if store else {}
    for checkpoint in checkpoints:
        rows.setdefault(checkpoint.epoch, len(rows))
    done = np.zeros((len(rows), -(-num_samples // block_size)), dtype=bool)
    if store:
        done[: len(store.rows)] = store.done_blocks()
    epochs = [checkpoint.epoch for checkpoint in checkpoints]
    return Plan(checkpoints, rows, done, experiment.active_per_block(epochs, block_size))
