"""What travels between launcher and workers: a block to compute, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class BlockTask:
    """One block to compute.

    Attributes
    ----------
    epoch : int
    row : int
        The epoch's row in the store.
    block : int
    checkpoint : Path
    sha256 : str
        Digest that the checkpoint had when the run was planned.
    samples : int
        Active samples in the block.
    following : Path, optional
        Checkpoint of the next epoch, to be read while this block is computed.
    """

    epoch: int
    row: int
    block: int
    checkpoint: Path
    sha256: str
    samples: int
    following: Path | None = None

    def __str__(self) -> str:
        return f"epoch {self.epoch} block {self.block}"


@dataclass(frozen=True)
class BlockResult:
    """What became of a block.

    Attributes
    ----------
    computed : bool
        False if the block turned out to be done already.
    seconds : float
        Time from picking the task up to its status being written.
    writing_seconds : float
        The part of it spent in the store.
    worker : str
        Host and process id.
    device : str
    batch_size : int
        Samples per micro-batch at the end of the block.
    method : str
        How it was computed; empty if nothing had to be.
    not_finite : int
        Samples with results that are not finite numbers.
    address : str
        Dask's address of the worker.
    job : str
        The worker's SLURM job; empty if it is in none.
    """

    computed: bool
    seconds: float
    writing_seconds: float
    worker: str
    device: str
    batch_size: int
    method: str = ""
    not_finite: int = 0
    address: str = ""
    job: str = ""


@dataclass(frozen=True)
class Declined:
    """What a function returns, instead of a report, whose worker is about to leave.

    Attributes
    ----------
    worker : str
        Dask's address of it.
    reason : str
    """

    worker: str
    reason: str
