"""Estimated work, time and disk space of a run, before it starts."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from daskcurv.clusters.local import available_cores, visible_gpus
from daskcurv.experiment.curriculum import active_samples
from daskcurv.experiment.data import Dataset
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.preparation import say_preparation
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.identity import Recorded
from daskcurv.measures import MEASURES
from daskcurv.places import existing
from daskcurv.runs.accuracy import say_accuracy
from daskcurv.runs.extend import larger_store, probes_of, smaller_store
from daskcurv.runs.opening import check_checkpoints, open_existing
from daskcurv.runs.options import LaunchOptions
from daskcurv.runs.plan import Plan, make_plan
from daskcurv.storage import ResultsStore, schema
from daskcurv.storage.lock import beside

log = logging.getLogger(__name__)

_UNIT = 4096
"""What most file systems allot a file or a directory at a time."""
_FRAME_BYTES = 40
"""Of a chunk's file beyond the values: checksum, and what the compression adds."""
_COMPRESSED = {"float32": 4.2, "int16": 1.0, "uint8": 0.35}
"""Bytes per active sample. Fractions do not compress; what inactive samples hold, does."""
_GROUP_BYTES, _METADATA_BYTES = 29_900, 760
"""Of the store's own zarr.json, and of each array's."""
_SAMPLE_COLUMN_BYTES = 19.7
"""Of the columns with a value for each sample, all together."""
_EXPORTED_TYPES = (4, 4, 8)
_NPY_HEADER, _EXPORTED_METADATA = 128, 2048
"""Bytes of a header, and of metadata.json, more or less."""


@dataclass(frozen=True)
class Size:
    """What something takes.

    Attributes
    ----------
    bytes : int
        In the files.
    on_disk : int
        As most file systems allot it, directories included.
    files : int
    """

    bytes: int = 0
    on_disk: int = 0
    files: int = 0

    def __add__(self, other: Size) -> Size:
        """Return what both take."""
        return Size(
            self.bytes + other.bytes, self.on_disk + other.on_disk, self.files + other.files
        )


@dataclass(frozen=True)
class Estimate:
    """Estimated work, time and disk space of a run.

    Attributes
    ----------
    plan : Plan
        Its epochs, blocks and active samples, in all and missing.
    flop : float
        Floating-point operations of what is missing: a multiplication and an addition are two.
    rate : float or None
        Samples per second of one worker.
    rate_source : str
    workers : int or None
        None if the launcher does not choose it.
    store : Size
        Of the results store when it is complete.
    export : Size
        Of the npy tree; zero if there is no export.
    copy : Size
        Of the workers' copy of the data set.
    """

    plan: Plan
    flop: float
    rate: float | None
    rate_source: str
    workers: int | None
    store: Size
    export: Size
    copy: Size

    @property
    def samples_left(self) -> int:
        """Active samples of the blocks that are missing."""
        return int(self.plan.samples[self.plan.missing].sum())

    @property
    def device_seconds(self) -> float | None:
        """Time that the workers would spend, all together; None if the rate is not known."""
        return self.samples_left / self.rate if self.rate else None


def dry_run(options: LaunchOptions, experiment: Experiment, rate: float | None = None) -> Estimate:
    """Check everything that a launch checks, and print its work, time and disk space.

    Parameters
    ----------
    options : LaunchOptions
    experiment : Experiment
    rate : float, optional
        Samples per second of one worker; by default the rate recorded in the store.
    """
    dataset = experiment.dataset
    if isinstance(dataset, Encoded):
        copies = beside(options.store, ".inputs")
        say_preparation(dataset, copies)
        recorded = ""
        if options.store.exists():
            # What is decoded at a launch is compared then.
            recorded = Recorded.of(ResultsStore.open(options.store).identity).dataset["sha256"]
            log.info("that the images are those of %s is checked at the launch", options.store)
        experiment = replace(experiment, dataset=replace(dataset, assumed=recorded))
    base = smaller_store(options.store, experiment.identity())
    if base:
        path = larger_store(base, experiment.estimator.n_probes, experiment.checkpoints)
        options = replace(options, store=path, block_size=base.block_size)
    store = open_existing(options, experiment)
    plan = make_plan(options, experiment, check_checkpoints(experiment, store or base), store)
    log.info("store %s: %s", options.store, "exists" if store else "would be created")
    log.info("%s", plan.summary())
    say_accuracy(experiment)
    estimate = _estimate(options, experiment, plan, base, *_rate(rate, store, plan))
    print(_describe(estimate, options))
    return estimate


def _rate(stated: float | None, store: ResultsStore | None, plan: Plan) -> tuple[float | None, str]:
    if stated is not None:
        return stated, "as given"
    measured = None if store is None else measured_rate(store, plan.done[: len(store.rows)])
    if measured is None:
        return None, "unknown: set it with daskcurv plan --rate; daskcurv doctor measures it"
    return measured, "measured so far"


def measured_rate(store: ResultsStore, done_blocks: NDArray[np.bool_]) -> float | None:
    """Return the recorded samples per second of one worker, or None if there is none.

    Parameters
    ----------
    store : ResultsStore
    done_blocks : ndarray of bool, shape (rows, blocks)
        As by its method, which takes seconds for thousands of epochs.
    """
    seconds = float(store.read("compute_seconds").sum())
    samples = active_samples(store.read("first_epoch_active"), store.epochs, store.block_size)
    done = int(samples[done_blocks].sum())
    return done / seconds if seconds and done else None


def _estimate(
    options: LaunchOptions,
    experiment: Experiment,
    plan: Plan,
    base: ResultsStore | None,
    rate: float | None,
    rate_source: str,
) -> Estimate:
    num_samples = len(experiment.dataset)
    exported = export_size(len(plan.checkpoints), num_samples) if options.export else Size()
    return Estimate(
        plan=plan,
        flop=flop_per_gradient(experiment) * _gradients(experiment, plan, base),
        rate=rate,
        rate_source=rate_source,
        workers=workers_of(options),
        store=store_size(plan.samples, num_samples),
        export=exported,
        copy=copy_size(experiment.dataset),
    )


def _gradients(experiment: Experiment, plan: Plan, base: ResultsStore | None) -> float:
    """Count what is missing: a gradient at the sample, and one more, or its difference, a probe."""
    probes = np.full(plan.samples.shape, experiment.estimator.n_probes)
    if base is not None:
        there = base.done_blocks()
        for place, checkpoint in enumerate(plan.checkpoints):
            if checkpoint.epoch in base.rows:
                done = there[base.rows[checkpoint.epoch]]
                probes[place, done] -= probes_of(base)
    return float(((1 + probes) * plan.samples)[plan.missing].sum())


def store_size(samples: NDArray[np.int64], num_samples: int) -> Size:
    """Return what a complete results store takes.

    Parameters
    ----------
    samples : ndarray of int64, shape (epochs, blocks)
        Active samples of each block.
    num_samples : int
    """
    epochs, blocks = samples.shape
    size = Size()
    for variable in schema.per_sample(MEASURES):
        size += _files(samples * _COMPRESSED[variable.dtype] + _FRAME_BYTES)
    size += _files(np.full(samples.size, _FRAME_BYTES))  # digests
    names = ("sample_key",)
    columns = len(schema.columns(names))
    arrays = len(schema.all_variables(MEASURES, names))
    size += _files(np.full(arrays + 1, _METADATA_BYTES)) + _files(np.full(columns, _FRAME_BYTES))
    size += _files(np.array([_GROUP_BYTES + num_samples * _SAMPLE_COLUMN_BYTES]))
    # A directory for each array and for its chunks, for each epoch of an array, for each digest.
    return size + _directories(2 + 2 * arrays + epochs * (arrays - columns) + epochs * blocks)


def export_size(epochs: int, num_samples: int) -> Size:
    """Return what the npy tree of so many epochs takes."""
    arrays = [num_samples * size + _NPY_HEADER for size in _EXPORTED_TYPES]
    return _files(np.tile([*arrays, _EXPORTED_METADATA], epochs)) + _directories(epochs)


def copy_size(dataset: Dataset) -> Size:
    """Return what the workers' copy of a data set takes, which lies beside the store."""
    pixels = len(dataset) * math.prod(dataset.image_shape)
    arrays = np.array([pixels, dataset.labels.nbytes]) + _NPY_HEADER
    return _files(arrays) + _directories(2)


def warn_of_full_disk(options: LaunchOptions, dataset: Dataset, plan: Plan) -> None:
    """Warn if what is still to be written is not expected to fit."""
    missing, num_samples = float(plan.missing.mean()), len(dataset)
    store = missing * store_size(plan.samples, num_samples).on_disk + copy_size(dataset).on_disk
    places = {options.store: store}
    if options.export:
        tree = export_size(len(plan.checkpoints), num_samples).on_disk
        places[options.save_base_dir] = missing * tree
    for path, needed in places.items():
        free = shutil.disk_usage(existing(path)).free
        if missing and needed > free:
            log.warning(
                "%s needs about %s more on disk, but only %s are free: when the disk is full, the "
                "run stops; free some space and run the same command again to continue",
                path,
                size_text(needed),
                size_text(free),
            )


def _files(sizes: NDArray[np.number[Any]]) -> Size:
    allotted = np.ceil(sizes / _UNIT) * _UNIT
    return Size(int(sizes.sum()), int(allotted.sum()), sizes.size)


def _directories(count: int) -> Size:
    return Size(on_disk=count * _UNIT)


def flop_per_gradient(experiment: Experiment) -> float:
    """Return the floating-point operations of one sample's input gradient.

    Convolutions and matrix products, counted by PyTorch; backward, towards the input alone, they
    take what they take forward.
    """
    # Here, as it takes a while to load.
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.empty((1, *experiment.dataset.image_shape), device="meta")
    model = experiment.network.build().to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return 2.0 * float(counter.get_total_flops())


def workers_of(options: LaunchOptions) -> int | None:
    """Return how many workers a launch holds, if it is the launcher that decides."""
    cluster = options.cluster
    match cluster.cluster:
        case "local":
            gpus = 0 if cluster.device == "cpu" else len(visible_gpus())
            return cluster.workers or gpus or available_cores()
        case "slurm":
            return cluster.gpus
    return None


def _describe(estimate: Estimate, options: LaunchOptions) -> str:
    plan = estimate.plan
    epochs_left = int(plan.missing.any(axis=1).sum())
    total = int(plan.samples.sum())
    lines = [
        f"{'':<16}{'in all':>16}{'done':>16}{'to do':>16}",
        _row("epochs", len(plan.checkpoints), epochs_left),
        _row("blocks", plan.missing.size, int(plan.missing.sum())),
        _row("active samples", total, estimate.samples_left),
        f"{'work':<16}{_si(estimate.flop)}FLOP to do, counted as direct finite differences",
    ]
    if estimate.rate is None or estimate.device_seconds is None:
        lines.append(f"{'rate':<16}{estimate.rate_source}")
    else:
        hours = estimate.device_seconds / 3600
        flops = estimate.flop / estimate.device_seconds if estimate.device_seconds else 0.0
        lines.append(
            f"{'rate':<16}{estimate.rate:,.1f} samples/s per worker, {estimate.rate_source}"
            + (f" ({_si(flops)}FLOP/s)" if flops else "")
        )
        text = f"{hours:,.2f} device-hours"
        if estimate.workers:
            seconds = math.ceil(estimate.device_seconds / estimate.workers)
            text += f": {timedelta(seconds=seconds)} on {estimate.workers} workers, without waiting"
        lines.append(f"{'time':<16}{text}")
    places = [("store", options.store, estimate.store)]
    if options.export:
        places.append(("npy tree", options.save_base_dir, estimate.export))
    places.append(("data copy", beside(options.store, ".inputs"), estimate.copy))
    for name, path, size in places:
        free = shutil.disk_usage(existing(path)).free
        lines.append(
            f"{name:<16}about {size_text(size.bytes)} in {size.files:,} files when complete, "
            f"{size_text(size.on_disk)} on disk, of {size_text(free)} free: {path}"
        )
    return "\n".join(lines)


def _row(name: str, total: int, left: int) -> str:
    return f"{name:<16}{total:>16,}{total - left:>16,}{left:>16,}"


def _si(value: float) -> str:
    """Return three digits and a prefix, as ``2.57 E``."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    place = 0 if value < 1 else min(len(prefixes) - 1, int(math.log10(value) // 3))
    return f"{value / 1000**place:.3g} {prefixes[place]}"


def size_text(value: float) -> str:
    """Return bytes in a unit of which there is a quarter at least, or in KiB."""
    if value < 2**18:
        return f"{value / 2**10:.1f} KiB"
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"
