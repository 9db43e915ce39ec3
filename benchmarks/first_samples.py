"""How fast a process is from its first sample on: ``auto`` beside direct finite differences.

The first batches of a process also trace the network, check the fast method against the direct one
and compile kernels. Each method runs in processes of its own, by turns, with one thread as in a
worker. The network is a full-size ResNet-18 after a few steps of training.

Prints the ratio of their times over the first samples and over those after, and writes JSON::

    python benchmarks/first_samples.py --out results.json
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from _curvature_methods import digits, resnet18, train
from _curvature_report import environment

from daskcurv.clusters.environment import WORKER_ENVIRONMENT
from daskcurv.config import EstimatorConfig
from daskcurv.estimators.scoring import Scorer

DIRECT, AUTO = "finite-difference", "auto"
SEED = 0
TRAIN_STEPS = 12


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=128, help="which count as the first")
    parser.add_argument("--n_probes", type=int, default=10)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--width", type=int, default=64, help="of the ResNet-18")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--method", choices=[DIRECT, AUTO], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    if args.method:
        print(json.dumps(_seconds(args)))
        return
    measured: dict[str, list[list[float]]] = {DIRECT: [], AUTO: []}
    for round_ in range(args.rounds):
        for method in (DIRECT, AUTO) if round_ % 2 == 0 else (AUTO, DIRECT):
            measured[method].append(_in_a_process(method))
            print(f"{method}: {measured[method][-1]}", file=sys.stderr)
    ratios = {
        when: [
            direct[place] / auto[place]
            for direct, auto in zip(measured[DIRECT], measured[AUTO], strict=True)
        ]
        for place, when in enumerate(("first", "after"))
    }
    for when, values in ratios.items():
        text = ", ".join(f"{value:.2f}" for value in values)
        print(
            f"{when:<5} {args.samples} samples: auto at {statistics.median(values):.2f} times the "
            f"speed of direct (rounds: {text})"
        )
    if args.out:
        settings = {name: value for name, value in vars(args).items() if name not in ("out",)}
        result = {
            "settings": settings,
            "environment": environment(torch.device("cpu")),
            "seconds": measured,
            "ratios": ratios,
        }
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def _in_a_process(method: str) -> list[float]:
    run = subprocess.run(
        [sys.executable, *sys.argv, "--method", method],
        env={**os.environ, **WORKER_ENVIRONMENT},
        stdout=subprocess.PIPE,
        check=True,
    )
    seconds: list[float] = json.loads(run.stdout)
    return seconds


def _seconds(args: argparse.Namespace) -> list[float]:
    """Return the seconds that the first samples take, and the next ones."""
    torch.set_num_threads(1)
    images, labels = digits(SEED)
    pool = images[args.samples :], labels[args.samples :]
    *_, trained = train(resnet18(SEED, args.width), *pool, TRAIN_STEPS, torch.device("cpu"), SEED)
    images, labels = images[: args.samples], labels[: args.samples]
    precision = args.precision if args.method == AUTO else "float32"
    config = EstimatorConfig(method=args.method, precision=precision, n_probes=args.n_probes)
    started = time.perf_counter()
    scorer = Scorer(trained.model, config)
    seconds = []
    for _ in range(2):
        scorer.score(images, labels, torch.arange(args.samples))
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    if args.method == AUTO and not scorer.method.startswith("difference-propagation"):
        sys.exit(f"auto used {scorer.method}: there is nothing to compare")
    return seconds


if __name__ == "__main__":
    main()
