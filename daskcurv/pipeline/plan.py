"""Which blocks of which epochs are still to be computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest

import numpy as np
from numpy.typing import NDArray

from daskcurv.checkpoints import Checkpoint
from daskcurv.pipeline.task import BlockTask


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
                    checkpoint=checkpoint.path,
                    sha256=checkpoint.sha256,
                    samples=int(self.samples[index, block]),
                    following=None if following is None else self.checkpoints[following].path,
                )

    def summary(self) -> str:
        """Return one line: epochs, blocks and samples, in all and left."""
        total, left = self.missing.size, int(self.missing.sum())
        epochs_left = int(self.missing.any(axis=1).sum())
        return (
            f"{len(self.checkpoints)} epochs, {total} blocks, {int(self.samples.sum()):,} active "
            f"samples; to do: {epochs_left} epochs, {left} blocks, "
            f"{int(self.samples[self.missing].sum()):,} samples"
        )


def active_samples(
    first_epoch_active: NDArray[np.int64], epochs: Sequence[int], block_size: int
) -> NDArray[np.int64]:
    """Count the active samples of each block.

    Parameters
    ----------
    first_epoch_active : ndarray of int, shape (N,)
    epochs : sequence of int
    block_size : int

    Returns
    -------
    ndarray of int64, shape (epochs, blocks)
    """
    starts = np.arange(0, len(first_epoch_active), block_size)
    # The active set only changes at a few epochs; count once for each distinct set.
    changes = np.unique(first_epoch_active)
    counts = np.stack(
        [
            np.add.reduceat(first_epoch_active <= change, starts, dtype=np.int64)
            for change in changes
        ]
    )
    return counts[np.searchsorted(changes, epochs, side="right") - 1]
