"""What a run would take: work, time and disk, before it is begun."""

from __future__ import annotations

import logging
import math
import shutil
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import torch
from numpy.typing import NDArray

from daskcurv.classes import active_samples
from daskcurv.clusters.local import available_cores, visible_gpus
from daskcurv.pipeline.inputs import Inputs
from daskcurv.pipeline.more_probes import larger_store, smaller_store
from daskcurv.pipeline.opening import check_weights, open_existing
from daskcurv.pipeline.options import LaunchOptions
from daskcurv.pipeline.plan import Plan, make_plan
from daskcurv.places import existing
from daskcurv.storage import ResultsStore, schema

log = logging.getLogger(__name__)

_SAMPLE_BYTES = sum(np.dtype(v.dtype).itemsize for v in schema.MEASURES)
"""Of an active sample; what inactive ones hold, and the status, compresses to nearly nothing."""
_FILES_OF_BLOCK = len(schema.MEASURES) + 2
"""The measures, the digests and the status."""
_FILE_BYTES = 40
"""Of a file beyond the values: checksums, and what the compression adds."""

EXPORTED_BYTES = 4 + 4 + 8
_EXPORTED_FILES = 4
_EXPORTED_HEADERS = 3 * 128 + 4096
"""Of an epoch's export: three npy headers, and metadata.json."""


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

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
        None if that is not the launcher's to say.
    store_bytes, store_files : int
        Of the results store when it is complete.
    export_bytes, export_files : int
        Of the npy tree; 0 if none is asked for.
    """

    plan: Plan
    flop: float
    rate: float | None
    rate_source: str
    workers: int | None
    store_bytes: int
    store_files: int
    export_bytes: int
    export_files: int

    @property
    def samples_left(self) -> int:
        """Active samples of the blocks that are missing."""
        return int(self.plan.samples[self.plan.missing].sum())

    @property
    def device_seconds(self) -> float | None:
        """Time that the workers would spend, all together; None if the rate is not known."""
        return self.samples_left / self.rate if self.rate else None


def dry_run(options: LaunchOptions, inputs: Inputs, rate: float | None = None) -> Estimate:
    """Check everything that a launch would, and say what it would do and take.

    Parameters
    ----------
    options : LaunchOptions
    inputs : Inputs
    rate : float, optional
        Samples per second of one worker; by default what the store has on record.
    """
    probes = options.estimator.n_probes
    if base := smaller_store(options.store, inputs.identity):
        options = replace(options, store=larger_store(base, probes, inputs.checkpoints))
        probes -= base.identity["estimator"]["n_probes"]
    store = open_existing(options, inputs)
    plan = make_plan(options, inputs, check_weights(inputs, store), store)
    log.info("store %s: %s", options.store, "exists" if store else "would be created")
    log.info("%s", plan.summary())
    estimate = _estimate(options, inputs, plan, probes, *_rate(rate, store, plan))
    print(_describe(estimate, options))
    return estimate


def _rate(stated: float | None, store: ResultsStore | None, plan: Plan) -> tuple[float | None, str]:
    if stated is not None:
        return stated, "as stated"
    measured = None if store is None else measured_rate(store, plan.done[: len(store.rows)])
    if measured is None:
        return None, "not known: state one with daskcurv plan --rate, such as daskcurv doctor's"
    return measured, "as measured so far"


def measured_rate(store: ResultsStore, done_blocks: NDArray[np.bool_]) -> float | None:
    """Return the samples per second of one worker that a store has on record, if any.

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
    inputs: Inputs,
    plan: Plan,
    probes: int,
    rate: float | None,
    rate_source: str,
) -> Estimate:
    samples = int(plan.samples.sum())
    epochs, blocks = plan.samples.shape
    files = epochs * blocks * _FILES_OF_BLOCK
    exported = epochs if options.export else 0
    per_gradient = flop_per_gradient(inputs)
    return Estimate(
        plan=plan,
        # A gradient at the sample, and what each probe adds, which is one more, or its difference.
        flop=(1 + probes) * per_gradient * float(plan.samples[plan.missing].sum()),
        rate=rate,
        rate_source=rate_source,
        workers=_workers(options),
        store_bytes=samples * _SAMPLE_BYTES + files * _FILE_BYTES,
        store_files=files + len(schema.ALL_VARIABLES) + len(schema.COLUMNS) + 2,
        export_bytes=exported * (len(inputs.dataset) * EXPORTED_BYTES + _EXPORTED_HEADERS),
        export_files=exported * _EXPORTED_FILES,
    )


def flop_per_gradient(inputs: Inputs) -> float:
    """Return the floating-point operations of one sample's input gradient.

    Convolutions and matrix products, counted by PyTorch; backward, towards the input alone, they
    take what they take forward.
    """
    # Here, as it takes a while to load.
    from torch.utils.flop_counter import FlopCounterMode

    images = torch.empty((1, *inputs.dataset.images.shape[1:]), device="meta")
    model = inputs.model.build().to("meta").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(images)
    return 2.0 * float(counter.get_total_flops())


def _workers(options: LaunchOptions) -> int | None:
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
            text += f": {timedelta(seconds=seconds)} on {estimate.workers} workers, once they run"
        lines.append(f"{'time':<16}{text}")
    places = [("store", options.store, estimate.store_bytes, estimate.store_files)]
    if options.export:
        tree = options.save_base_dir
        places.append(("npy tree", tree, estimate.export_bytes, estimate.export_files))
    for name, path, size, files in places:
        free = shutil.disk_usage(existing(path)).free
        lines.append(
            f"{name:<16}about {_size(size)} in {files:,} files when complete, {_size(free)} free: "
            f"{path}"
        )
    return "\n".join(lines)


def _row(name: str, total: int, left: int) -> str:
    return f"{name:<16}{total:>16,}{total - left:>16,}{left:>16,}"


def _si(value: float) -> str:
    """Return three digits and a prefix, as ``2.57 E``."""
    prefixes = ("", "k", "M", "G", "T", "P", "E", "Z")
    place = 0 if value < 1 else min(len(prefixes) - 1, int(math.log10(value) // 3))
    return f"{value / 1000**place:.3g} {prefixes[place]}"


def _size(value: float) -> str:
    return f"{value / 2**30:.2f} GiB" if value >= 2**28 else f"{value / 2**20:.1f} MiB"
