"""The task of a worker: score one block and write it.

A worker process has one thread and one device. Between blocks it keeps the store, the mapped data
set and the current checkpoint's network; blocks come epoch by epoch, so a checkpoint is read once
per worker and epoch.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from distributed import get_worker
from numpy.typing import NDArray
from torch import Tensor

from daskcurv.clusters.time_limit import TimeLimit
from daskcurv.errors import CheckpointChangedError, ClusterError
from daskcurv.estimators.scoring import SampleScores, Scorer
from daskcurv.estimators.selection import has_fast_bfloat16
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.weight_files import read_state_dict
from daskcurv.measures import Measure
from daskcurv.runs.tasks import BlockResult, BlockTask, Declined
from daskcurv.storage import schema
from daskcurv.storage.finite import measures_of, not_finite
from daskcurv.storage.working import ResultsStore

log = logging.getLogger(__name__)

BATCH_SIZES = "batch_sizes.json"
"""Beside the workers' copy of the data set: the best batch size by device and method."""

LEAVE_SECONDS = 30.0
"""Time that a worker reserves for stopping before its job ends."""


@dataclass(frozen=True)
class RunContext:
    """What all blocks of a run share; travels with every task, so it holds no arrays.

    Attributes
    ----------
    experiment : Experiment
        As returned by its method `travelling`.
    store : Path
    shared : Path
        Directory for what workers share besides the store.
    device : {"cuda", "cpu"}
        What workers compute on.
    batch_size : int or None
    base : Path, optional
        Store with the same blocks from the first `base_probes` probes, which only lack the others.
    base_probes : int
    """

    experiment: Experiment
    store: Path
    shared: Path
    device: str = "cpu"
    batch_size: int | None = None
    base: Path | None = None
    base_probes: int = 0


class Worker:
    """What a worker process keeps between the blocks of a run."""

    def __init__(self, context: RunContext):
        self.context = context
        self.device = torch.device(context.device)
        if self.device.type == "cuda" and not torch.cuda.is_available():
            raise ClusterError(
                f"no GPU is visible to worker {_name()}; check its driver and "
                "CUDA_VISIBLE_DEVICES, or launch with --device cpu"
            )
        if context.experiment.estimator.precision == "bfloat16" and not has_fast_bfloat16(
            self.device
        ):
            log.warning(
                "%s has no fast bfloat16; a new store with --precision float32 is filled faster",
                _device_name(self.device),
            )
        # The results of a CPU convolution change in their last bits with the number of threads it
        # is split over. One thread per process keeps them the same for any number of workers.
        torch.set_num_threads(1)
        self._store = ResultsStore.open(context.store)
        self._dataset = context.experiment.dataset
        self._base = ResultsStore.open(context.base) if context.base else None
        self._reader = ThreadPoolExecutor(1)
        self._ahead: tuple[Path, Future[tuple[dict[str, Tensor], str]]] | None = None
        self._scorer: Scorer | None = None
        self._scorer_of: tuple[int, str] | None = None
        self._time_limit = TimeLimit.inherited()

    @property
    def out_of_time(self) -> bool:
        """Whether a block like the longest so far might not end before this worker's job does."""
        return not self._time_limit.allows(blocks=1.25, seconds=LEAVE_SECONDS)

    def run(self, task: BlockTask) -> BlockResult:
        """Score a block and write it, unless it is done."""
        started = time.perf_counter()
        if task.row >= len(self._store.rows):
            self._store = ResultsStore.open(self.context.store)
        writing, broken = 0.0, 0
        computed = not self._store.is_done(task.row, task.block)
        if computed:
            values = self._score(task)
            broken = int(not_finite(values, measures_of(self._store)).sum())
            before_writing = time.perf_counter()
            self._store.write_block(task.row, task.block, values)
            writing = time.perf_counter() - before_writing
        seconds = time.perf_counter() - started
        self._time_limit.block_took(seconds)
        log.info("%s: %d samples in %.2f s", task, task.samples, seconds)
        return BlockResult(
            computed=computed,
            seconds=seconds,
            writing_seconds=writing,
            worker=_name(),
            device=_device_name(self.device),
            batch_size=self._scorer.batch_size if self._scorer else 0,
            method=self._scorer.method if computed and self._scorer else "",
            not_finite=broken,
        )

    def _score(self, task: BlockTask) -> dict[str, NDArray[Any]]:
        context = self.context
        start, stop = self._store.bounds(task.block)
        active = context.experiment.active(task.epoch)[start:stop]
        if not active.any():
            return _block_values(self._store.measures, active, None)
        ids = start + np.flatnonzero(active)
        scorer = self._scorer_for(task)
        base = self._base_values(task)
        n_probes = context.experiment.estimator.n_probes
        probes = range(context.base_probes if base else 0, n_probes)
        scores = scorer.score(*self._dataset.inputs(ids), probes)
        values = _block_values(self._store.measures, active, scores)
        if base:
            for name in base:
                before, added = base[name].astype(np.float64), values[name].astype(np.float64)
                merged = before * context.base_probes + added * len(probes)
                values[name] = merged / n_probes
        return values

    def _base_values(self, task: BlockTask) -> dict[str, NDArray[Any]]:
        """Return what the first probes of a block gave, or nothing if they are to be computed."""
        if self._base is None or task.epoch not in self._base.rows:
            return {}
        row = self._base.rows[task.epoch]
        if not self._base.is_done(row, task.block):
            return {}
        means = (m.name for m in self._base.measures if m.computed_in == "probes")
        return {name: self._base.read_block(name, row, task.block) for name in means}

    def _scorer_for(self, task: BlockTask) -> Scorer:
        if self._scorer is None or self._scorer_of != (task.epoch, task.sha256):
            context = self.context
            state_dict, sha256 = self._read(task.checkpoint)
            if sha256 != task.sha256:
                raise CheckpointChangedError(
                    f"checkpoint {task.checkpoint} does not match the record: it changed during "
                    "or before the run, with the same size and time. Run the same command again "
                    "to read it again"
                )
            # A batch size reduced for want of memory stays reduced at the next epoch.
            batch_size = self._scorer.batch_size if self._scorer else context.batch_size
            experiment = replace(context.experiment, checkpoints={task.epoch: task.checkpoint})
            self._scorer = experiment.scorer(
                task.epoch, self.device, batch_size=batch_size, weights=state_dict
            )
            if batch_size is None and self.device.type == "cuda":
                self._set_batch_size(self._scorer, experiment.first_active(task.epoch))
            self._scorer_of = task.epoch, task.sha256
        if task.following and (self._ahead is None or self._ahead[0] != task.following):
            self._ahead = (
                task.following,
                self._reader.submit(
                    read_state_dict, task.following, self.context.experiment.payload
                ),
            )
        return self._scorer

    def _set_batch_size(self, scorer: Scorer, ids: NDArray[np.int64]) -> None:
        """Use the batch size that was measured for this device and method, or measure it now.

        Not on CPUs: there the last bits of a result depend on the batch size, and measuring would
        choose now one, now another.
        """
        path = self.context.shared / BATCH_SIZES
        key = f"{_device_name(self.device)}, {scorer.method}, {self.context.experiment.network}"
        known: dict[str, int] = {}
        with contextlib.suppress(FileNotFoundError):
            known = json.loads(path.read_text())
        if key in known:
            scorer.batch_size = known[key]
            return
        scorer.tune_batch_size(*self._dataset.inputs(ids))
        # Beside and renamed, as other workers read and write it too. If one's entry is lost, it is
        # measured once more.
        draft = path.with_name(f"{path.name}.{socket.gethostname()}.{os.getpid()}")
        draft.write_text(json.dumps({**known, key: scorer.batch_size}, indent=2))
        draft.replace(path)

    def _read(self, checkpoint: Path) -> tuple[dict[str, Tensor], str]:
        ahead, self._ahead = self._ahead, None
        if ahead and ahead[0] == checkpoint:
            return ahead[1].result()
        return read_state_dict(checkpoint, self.context.experiment.payload)


def _block_values(
    measures: Iterable[Measure], active: NDArray[np.bool_], scores: SampleScores | None
) -> dict[str, NDArray[Any]]:
    """Spread the scores of a block's active samples over all its samples."""
    values: dict[str, NDArray[Any]] = {"status": np.where(active, schema.COMPUTED, schema.INACTIVE)}
    for measure in measures:
        column = np.full(len(active), measure.fill, dtype=measure.dtype)
        if scores is not None:
            column[active] = scores[measure.name]
        values[measure.name] = column
    return values


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


_worker: Worker | None = None


def score_block(context: RunContext, task: BlockTask) -> BlockResult | Declined:
    """Score one block in this process; the function that Dask runs."""
    global _worker
    if _worker is None or _worker.context != context:
        _worker = Worker(context)
    if _worker.out_of_time:
        return Declined(get_worker().address, f"{task} might outlast the time limit of its job")
    result = _worker.run(task)
    job = os.environ.get("SLURM_JOB_ID", "")
    return replace(result, address=get_worker().address, job=job)


def _name() -> str:
    return f"{socket.gethostname()}:{os.getpid()}"
