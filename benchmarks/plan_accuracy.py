"""What ``daskcurv plan`` foretells, against what the run then takes.

The demo's data set and weights: a launch of a few epochs gives the rate, a plan of all of them is
made with it, and a launch does the rest. Prints both and writes JSON::

    python benchmarks/plan_accuracy.py --out benchmarks/results/plan_accuracy.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from _curvature_report import environment
from torch import device as torch_device

from daskcurv.clusters.local import available_cores
from daskcurv.demo import demo_options, make_dataset, train
from daskcurv.runs.cost import dry_run
from daskcurv.runs.inputs import experiment_of
from daskcurv.runs.launch import launch
from daskcurv.storage import ResultsStore

MEASURED = "0,6"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory))
    for name, value in result.items():
        print(f"{name:>32}  {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(directory: Path) -> dict[str, Any]:
    """Launch a few epochs, plan all, launch the rest; return both sides."""
    make_dataset(directory)
    train(directory)
    options = demo_options(directory, available_cores())
    few = replace(options, epochs=MEASURED)
    if launch(few).exit_code:
        raise SystemExit("the first launch did not finish")
    store = ResultsStore.open(options.store)
    before, done = float(store.read("compute_seconds").sum()), int(store.done_blocks().sum())
    with redirect_stdout(None):
        estimate = dry_run(options, experiment_of(options))
    assert estimate.device_seconds is not None
    assert estimate.workers is not None
    began = time.monotonic()
    if launch(options).exit_code:
        raise SystemExit("the second launch did not finish")
    wall = time.monotonic() - began
    store = ResultsStore.open(options.store)
    seconds = float(store.read("compute_seconds").sum()) - before
    return {
        "measured_on_epochs": MEASURED,
        "workers": estimate.workers,
        "blocks_planned": int(np.count_nonzero(estimate.plan.missing)),
        "blocks_done": int(store.done_blocks().sum()) - done,
        "worker_seconds_planned": round(estimate.device_seconds, 1),
        "worker_seconds_taken": round(seconds, 1),
        "taken_over_planned": round(seconds / estimate.device_seconds, 3),
        "seconds_planned": round(estimate.device_seconds / estimate.workers, 1),
        "seconds_taken_with_start_and_end": round(wall, 1),
        "environment": environment(torch_device("cpu")),
    }


if __name__ == "__main__":
    main()
