"""Speed and accuracy of every way to compute curvature, side by side on one device.

A full-size ResNet-18 is trained for a moment on scikit-learn's digits, some of them mislabelled.
Each method then computes the curvature of the same samples with the same probes:

* *released*: the scheme as its authors published it, in the framework's default precision (TF32
  convolutions on recent GPUs) and in true float32;
* *direct*, *difference propagation*, *zeroth-order*: the methods of this package;
* *bare convolutions*: what difference propagation cannot do without; its practical limit. The
  other methods are held against the one of their precision too, but are not bound by it.

The methods take turns, a few rounds at every batch size. Ratios and shares are of the fastest
rounds. Errors are relative to direct finite differences in float64; that of zeroth-order includes
that it estimates something else. Prints tables, and writes JSON and a plot::

    python benchmarks/estimators.py --out results.json --plot results.png
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from _curvature_methods import (
    LIMIT,
    RELEASED,
    Checkpoint,
    Method,
    Run,
    all_methods,
    digits,
    error,
    referee,
    resnet18,
    train,
)
from _curvature_report import environment, error_table, plot, speed_table
from torch import Tensor

from daskcurv.clusters.environment import WORKER_ENVIRONMENT
from daskcurv.config import EstimatorConfig
from daskcurv.estimators import kernels

SEED = 0
TRAINED_ON = 1200
LATE = "late"

Result = TypeVar("Result")


def main() -> None:
    """Run the benchmark."""
    _restart_with_malloc_settings()
    started = time.monotonic()
    args = _arguments()
    device = torch.device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    warnings = _collect_warnings()
    if args.no_compile:
        kernels.COMPILE_AFTER_SECONDS = math.inf
    else:
        kernels.KERNELS.compile(device)

    config = EstimatorConfig(h=args.h, n_probes=args.n_probes, seed=SEED)
    methods = _chosen(all_methods(device, config), args.methods)
    images, labels = digits(SEED)
    samples = _take(images, labels, args.samples)
    # Half of the samples are held out, if there are not too many.
    held_out = min(args.samples // 2, len(images) - TRAINED_ON)
    pool = slice(held_out, held_out + TRAINED_ON)
    checkpoints, errors = [], {}
    skipped: list[str] = []
    network = resnet18(SEED, args.width)
    for checkpoint in train(network, images[pool], labels[pool], args.train_steps, device, SEED):
        _say(f"{checkpoint.name}: step {checkpoint.step}, training loss {checkpoint.loss:.3f}")
        checkpoints.append(checkpoint)
        batch_size = min(args.batch_sizes[0], args.samples)
        errors[checkpoint.name] = _errors(
            methods, checkpoint, samples, batch_size, device, config, skipped
        )
    speed: list[dict[str, Any]] = []
    for batch_size in args.batch_sizes:
        inputs = _take(images, labels, batch_size)
        speed += _speed(methods, checkpoints[-1], inputs, args, device, skipped)

    result = {
        "settings": {
            name: value
            for name, value in vars(args).items()
            if name not in ("out", "plot") and value is not None
        },
        "environment": environment(device),
        "training": [{"checkpoint": c.name, "step": c.step, "loss": c.loss} for c in checkpoints],
        "speed": speed,
        "errors": errors,
        "skipped": skipped,
        "warnings": warnings,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(speed_table(speed, errors[LATE]))
    print()
    print(error_table(errors))
    for line in (*skipped, *warnings):
        print(line)
    print(f"{result['seconds']:.0f} s in all")
    for path in (args.out, args.plot):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result, errors[LATE]).savefig(args.plot, dpi=150)


def _restart_with_malloc_settings() -> None:
    """Start this process again unless it has the memory settings that workers have.

    Without them glibc hands the memory of an activation back to the kernel as soon as it is freed,
    and the next activation begins with a fault for every page; that would be most of what is
    measured. They are read when a process starts.
    """
    wanted = {k: v for k, v in WORKER_ENVIRONMENT.items() if k.startswith("MALLOC_")}
    if "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        command = [sys.executable, *sys.orig_argv[1:]]
        os.execve(sys.executable, command, {**os.environ, **wanted})


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="on the CPU; default: one on each core")
    parser.add_argument("--batch_sizes", help="default: 16,32,64; on a GPU 128,256,512,1024")
    parser.add_argument(
        "--n_probes", type=int, default=10, help="zeroth-order takes part if they are even"
    )
    parser.add_argument("--rounds", type=int, help="default: 3; on a GPU 5")
    parser.add_argument("--h", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, help="for the errors; default: 24; on a GPU 256")
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    parser.add_argument("--train_steps", type=int, default=60)
    parser.add_argument(
        "--methods", nargs="+", metavar="NAME", help="as in the tables; default: all"
    )
    parser.add_argument("--no_compile", action="store_true", help="leave the kernels as they are")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--plot", type=Path, help="PNG")
    args = parser.parse_args()
    if args.train_steps < 3:
        parser.error("--train_steps: 3 or more are needed, for three checkpoints")
    cuda = torch.device(args.device).type == "cuda"
    sizes = args.batch_sizes or ("128,256,512,1024" if cuda else "16,32,64")
    args.batch_sizes = sorted(int(size) for size in sizes.split(","))
    args.rounds = args.rounds or (5 if cuda else 3)
    args.samples = args.samples or (256 if cuda else 24)
    if not cuda:
        args.threads = args.threads or len(os.sched_getaffinity(0))
    return args


def _chosen(methods: list[Method], names: list[str] | None) -> list[Method]:
    """Return the methods of these names; where a precision is very slow, it can be left out."""
    known = [method.name for method in methods]
    if unknown := set(names or ()) - set(known):
        raise SystemExit(f"--methods: {sorted(unknown)} not among {known}")
    return [method for method in methods if not names or method.name in names]


def _collect_warnings() -> list[str]:
    """Return a list that the package's warnings will be added to."""
    collected: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(f"{record.name}: {record.getMessage()}")

    logging.getLogger("daskcurv").addHandler(Collector(logging.WARNING))
    return collected


def _take(images: Tensor, labels: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return `count` samples, again from the first where there are not so many."""
    sample_ids = torch.arange(count)
    rows = sample_ids % len(images)
    return images[rows], labels[rows], sample_ids


def _errors(
    methods: list[Method],
    checkpoint: Checkpoint,
    samples: tuple[Tensor, Tensor, Tensor],
    batch_size: int,
    device: torch.device,
    config: EstimatorConfig,
    skipped: list[str],
) -> dict[str, dict[str, float | None]]:
    """Return for each method how its curvatures differ from those in float64."""
    expected = referee(checkpoint.model, samples, device, config)
    results: dict[str, dict[str, float | None]] = {}
    for method in methods:
        if method.is_limit:
            continue
        _say(f"{checkpoint.name}: error of {method.name}")
        found = _attempt(
            f"{method.name}, error at batch size {batch_size}",
            lambda method=method: method.prepare(checkpoint.model, batch_size)(
                *samples, config.n_probes
            ),
            device,
            skipped,
        )
        if found is None:
            continue
        results[method.name] = error(found, expected)
    return results


def _speed(
    methods: list[Method],
    checkpoint: Checkpoint,
    inputs: tuple[Tensor, Tensor, Tensor],
    args: argparse.Namespace,
    device: torch.device,
    skipped: list[str],
) -> list[dict[str, Any]]:
    """Return for each method how long it takes for one batch, the methods taking turns."""
    batch_size = len(inputs[0])
    runs: dict[str, Run] = {}
    peaks: dict[str, float] = {}
    for method in methods:
        _say(f"batch size {batch_size}: warming up {method.name}")
        # Two probes, as zeroth-order takes them in pairs.
        probes = min(2, args.n_probes) if method.probes_alone else args.n_probes
        warm = _attempt(
            f"{method.name} at batch size {batch_size}",
            lambda method=method, probes=probes: _warm(method, checkpoint, inputs, probes, device),
            device,
            skipped,
        )
        if warm:
            runs[method.name], peaks[method.name] = warm
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(args.rounds):
        _say(f"batch size {batch_size}: round {turn + 1} of {args.rounds}")
        # Each round begins with another, so that none always follows the same one.
        names = list(runs)
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            taken = _attempt(
                f"{name} at batch size {batch_size}",
                lambda name=name: _seconds(runs[name], inputs, args.n_probes, device),
                device,
                skipped,
            )
            if taken is None:
                del runs[name], seconds[name]
            else:
                seconds[name].append(taken)

    precision = {method.name: method.precision for method in methods}
    fastest = {name: min(values) for name, values in seconds.items()}
    rows = []
    for name, best in fastest.items():
        limit = fastest.get(f"{LIMIT}, {precision[name]}")
        row: dict[str, Any] = {
            "method": name,
            "batch_size": batch_size,
            "ms_per_sample": 1e3 * best / batch_size,
            "ms_per_sample_median": 1e3 * statistics.median(seconds[name]) / batch_size,
            "samples_per_second": batch_size / best,
            "ratio": fastest[RELEASED] / best if RELEASED in fastest else None,
            "share_of_limit": limit / best if limit else None,
            "seconds": seconds[name],
        }
        if device.type == "cuda":
            row["peak_memory_mib"] = peaks[name]
        rows.append(row)
    return rows


def _warm(
    method: Method,
    checkpoint: Checkpoint,
    inputs: tuple[Tensor, Tensor, Tensor],
    probes: int,
    device: torch.device,
) -> tuple[Run, float]:
    """Return a method ready to run, and on CUDA the memory that it takes at most, in MiB."""
    if device.type != "cuda":
        run = method.prepare(checkpoint.model, len(inputs[0]))
        run(*inputs, probes)
        return run, math.nan
    before = torch.cuda.memory_allocated(device)
    run = method.prepare(checkpoint.model, len(inputs[0]))
    # The first call compiles; from the second on, results of the one before are in the way.
    run(*inputs, probes)
    torch.cuda.reset_peak_memory_stats(device)
    run(*inputs, probes)
    return run, (torch.cuda.max_memory_allocated(device) - before) / 2**20


def _seconds(
    run: Run, inputs: tuple[Tensor, Tensor, Tensor], n_probes: int, device: torch.device
) -> float:
    _synchronise(device)
    started = time.perf_counter()
    run(*inputs, n_probes)
    _synchronise(device)
    return time.perf_counter() - started


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _attempt(
    what: str, work: Callable[[], Result], device: torch.device, skipped: list[str]
) -> Result | None:
    """Return the result of `work`, or None and a line in `skipped` if memory ran out."""
    try:
        return work()
    except torch.OutOfMemoryError:
        skipped.append(f"{what}: out of memory, left out")
    # Not where the exception is: while it lives, so do the tensors.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
