"""Whether a store's results are what its checkpoints give."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from daskcurv.errors import CheckpointError, DataError, StoreError
from daskcurv.estimators.auto import MEDIAN_ERROR, WORST_ERROR
from daskcurv.estimators.selection import reference
from daskcurv.experiment.data import Dataset
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.identity import Recorded
from daskcurv.experiment.weight_files import READERS, digest_and_damage, read_state_dict
from daskcurv.storage import ResultsStore
from daskcurv.storage.integrity.digests import Damage

LOSS_ERROR = 1e-3
"""What the loss may differ by, in nats or relative to it, whichever is more."""


@dataclass(frozen=True)
class Recomputed:
    """A sample at an epoch, as stored and as computed again.

    Attributes
    ----------
    epoch, sample : int
    stored, found : float
        Curvature.
    stored_loss, found_loss : float
    """

    epoch: int
    sample: int
    stored: float
    found: float
    stored_loss: float
    found_loss: float

    @property
    def error(self) -> float:
        """Relative difference of the curvature."""
        if self.stored == self.found:
            return 0.0
        return abs(self.stored - self.found) / max(abs(self.found), np.finfo(np.float64).tiny)

    @property
    def agrees(self) -> bool:
        """Whether rounding may explain the difference; NaN agrees with nothing."""
        loss_differs = abs(self.stored_loss - self.found_loss)
        return self.error <= WORST_ERROR and loss_differs <= LOSS_ERROR * max(1, self.found_loss)


def experiment_index(store: ResultsStore) -> int:
    """Return the training run that a store was computed from.

    Raises
    ------
    StoreError
        If the store does not say, as one that was imported.
    """
    index = Recorded.of(store.identity).experiment_index
    if index is None:
        raise StoreError(
            f"results store {store.path} was not computed from checkpoints by a launch; leave out "
            "--model_dir and --recompute"
        )
    return index


def checkpoint_damage(
    store: ResultsStore, checkpoints: Mapping[int, Path]
) -> tuple[list[Damage], list[int]]:
    """Compare checkpoint files with a store's record of them.

    Every file is read: its size and time may be those of another one.

    Parameters
    ----------
    store : ResultsStore
    checkpoints : mapping
        File by epoch.

    Returns
    -------
    damage : list of Damage
        Files that are not those that the results were computed from, or were damaged already.
    absent : list of int
        Epochs with results and without a file.

    Raises
    ------
    CheckpointError
        If a file cannot be read.
    """
    recorded = store.read("checkpoint_sha256")
    done = store.done_blocks()
    epochs = [epoch for epoch, row in store.rows.items() if done[row].any()]
    present = [epoch for epoch in epochs if epoch in checkpoints]
    damage = []
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(digest_and_damage, (checkpoints[epoch] for epoch in present))
        bar = tqdm(
            zip(present, found, strict=True),
            total=len(present),
            desc="checking checkpoints",
            unit=" files",
            disable=None,
        )
        for epoch, (sha256, problem) in bar:
            where = str(checkpoints[epoch])
            if sha256 != recorded[store.rows[epoch]]:
                what = f"not the file that the results of epoch {epoch} were computed from"
                damage.append(Damage(where, what))
            elif problem:
                what = f"is damaged ({problem}), and so are the results of epoch {epoch}"
                damage.append(Damage(where, what))
    return damage, [epoch for epoch in epochs if epoch not in checkpoints]


def recompute(
    store: ResultsStore,
    checkpoints: Mapping[int, Path],
    dataset: Dataset,
    count: int,
    directory: Path | None = None,
) -> list[Recomputed]:
    """Compute random results again, in float64 by direct differences along the same probes.

    The samples and epochs are drawn from all that are done; they depend on the store's fingerprint
    and on `count` alone.

    Parameters
    ----------
    store : ResultsStore
    checkpoints : mapping
        File by epoch; epochs without one are left out.
    dataset : Dataset
    count : int
        How many.
    directory : Path, optional
        Where the network's file is, if it is made by one.

    Returns
    -------
    list of Recomputed
        In order of epochs.

    Raises
    ------
    DataError, StoreError
        If it is another data set, or nothing can be computed again.
    CheckpointError
        If a checkpoint is not the one that the results were computed from.
    """
    if dataset.digest() != Recorded.of(store.identity).dataset["sha256"]:
        raise DataError(
            "--data_path is not the data set that results store "
            f"{store.path} was computed from; give that one"
        )
    experiment = Experiment.from_identity(
        store.identity,
        dataset=dataset,
        checkpoints=checkpoints,
        directory=directory,
        split=store.read("split"),
    )
    experiment = replace(experiment, estimator=reference(experiment.estimator))
    chosen: defaultdict[int, list[int]] = defaultdict(list)
    for epoch, sample in _draw(store, experiment, count):
        chosen[epoch].append(sample)
    recorded = store.read("checkpoint_sha256")
    results = []
    with tqdm(total=count, desc="recomputing", unit=" samples", disable=None) as bar:
        for epoch, samples in sorted(chosen.items()):
            row = store.rows[epoch]
            weights, sha256 = read_state_dict(checkpoints[epoch], experiment.payload)
            if sha256 != recorded[row]:
                raise CheckpointError(
                    f"checkpoint {checkpoints[epoch]} is not the one that the results of epoch "
                    f"{epoch} were computed from; restore that file, or omit --recompute"
                )
            scorer = experiment.scorer(epoch, dtype=torch.float64, weights=weights)
            ids = np.array(sorted(samples))
            scores = scorer.score(*dataset.inputs(ids))
            curvature, loss = store.read("curvature", row)[ids], store.read("loss", row)[ids]
            found = zip(ids, curvature, scores.curvature, loss, scores.loss, strict=True)
            results += [Recomputed(epoch, int(i), *map(float, values)) for i, *values in found]
            bar.update(len(ids))
    return results


def disagreement(results: list[Recomputed]) -> str:
    """Return what speaks against the results, or nothing.

    They agree if rounding may explain each difference, and most are far smaller.
    """
    if wrong := [one for one in results if not one.agrees]:
        worst = wrong[0]
        return (
            f"{len(wrong)} of {len(results)} results are not what the checkpoints give, first "
            f"sample {worst.sample} at epoch {worst.epoch}: curvature {worst.stored:.6g} stored, "
            f"{worst.found:.6g} found; loss {worst.stored_loss:.6g}, {worst.found_loss:.6g}"
        )
    median = float(np.median([one.error for one in results]))
    if median > MEDIAN_ERROR:
        return f"the curvature differs from a new computation: median difference {median:.1%}"
    return ""


def _draw(store: ResultsStore, experiment: Experiment, count: int) -> list[tuple[int, int]]:
    """Draw pairs of a finished epoch with a checkpoint, and a sample that is active at it."""
    done = store.done_blocks()
    finished = {epoch for epoch, row in store.rows.items() if done[row].all()}
    usable = sorted(finished.intersection(experiment.checkpoints))
    ends = np.cumsum([experiment.active(epoch).sum() for epoch in usable])
    if not len(ends) or not ends[-1]:
        raise StoreError(
            f"results store {store.path} has no finished epoch with a checkpoint in --model_dir; "
            "give the directory of its checkpoints"
        )
    generator = np.random.default_rng([int(store.fingerprint[:8], 16), count])
    picks = np.sort(generator.choice(int(ends[-1]), min(count, int(ends[-1])), replace=False))
    pairs = []
    for pick, place in zip(picks, np.searchsorted(ends, picks, side="right"), strict=True):
        epoch = usable[place]
        active = np.flatnonzero(experiment.active(epoch))
        pairs.append((epoch, int(active[pick - ends[place]])))
    return pairs
