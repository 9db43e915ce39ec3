"""What a report on a full-size store takes.

A store of 4,001 epochs of 50,000 samples, made by ``store_scale.py --keep``, and images of noise
for the galleries. Prints times and peak memory and writes JSON::

    python benchmarks/store_scale.py --directory DIR --keep
    python benchmarks/report_scale.py DIR/compact.zarr --out benchmarks/results/report_scale.json
"""

from __future__ import annotations

import argparse
import json
import pickle
import sys
import tempfile
import time
from pathlib import Path
from subprocess import Popen
from typing import Any

import numpy as np
import psutil
from _curvature_report import environment
from torch import device as torch_device

from daskcurv.storage import ResultsStore


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    store = ResultsStore.open(args.store)
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_data(root / "data", store.read("label"))
        page, answers = root / "report.html", root / "answers"
        result = {
            "epochs": len(store.epochs),
            "samples": store.num_samples,
            "layout": "compact" if store.is_compact else "working",
            "report": run("report", args.store, "-o", page, "--data_path", root / "data"),
            "page_mib": round(page.stat().st_size / 2**20, 1),
            "analyze": run("analyze", args.store, answers),
            "environment": environment(torch_device("cpu")),
        }
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def write_data(directory: Path, labels: np.ndarray) -> None:
    """Write a data set of noise with these labels, in CIFAR-100's format."""
    directory.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (len(labels), 3072), np.uint8)
    content = {"data": noise, "fine_labels": labels.tolist()}
    (directory / "train").write_bytes(pickle.dumps(content))
    names = [f"class {label}" for label in range(int(labels.max()) + 1)]
    (directory / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))


def run(*words: Any) -> dict[str, float]:
    """Run a command of the program; return its seconds and peak memory."""
    began = time.monotonic()
    process = Popen([sys.executable, "-m", "daskcurv", *map(str, words)])
    peak = 0
    watched = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            peak = max(peak, watched.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        time.sleep(0.05)
    if process.wait():
        sys.exit(f"{words[0]} failed")
    return {
        "seconds": round(time.monotonic() - began, 1),
        "peak_rss_mib": round(peak / 2**20),
    }


if __name__ == "__main__":
    main()
