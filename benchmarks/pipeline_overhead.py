"""What the pipeline costs beyond computing: seconds per block, and the launcher's memory.

A full-size data set is run through a network of width 1 in many small blocks, so that handing out,
reading, writing and accounting are nearly all there is. Prints a table and writes JSON::

    python benchmarks/pipeline_overhead.py --out benchmarks/results/pipeline_overhead.json
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import subprocess
import sys
import tempfile
import threading
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from daskcurv.experiment.resnet18 import ModelSpec  # noqa: E402
from tests.support.builders import write_checkpoints, write_cifar  # noqa: E402

REPORT = re.compile(r"computed=True, seconds=([\d.e-]+), writing_seconds=([\d.e-]+)")


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--block_size", type=int, default=500)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as root:
        result = measure(Path(root), args.epochs, args.block_size, args.workers)
    for name, value in result.items():
        print(f"{name:>34}  {value}")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(root: Path, epochs: int, block_size: int, workers: int) -> dict[str, object]:
    """Launch in `root`; return what it took."""
    write_cifar(root / "data", num_samples=50_000, num_classes=100)
    write_checkpoints(root / "models", list(range(epochs)), ModelSpec(num_classes=100, width=1))
    command = [
        sys.executable, REPOSITORY / "scripts" / "launch.py", "--epochs", "all",
        "--data_path", "data", "--model_dir", "models", "--store", "curvature.zarr",
        "--save_base_dir", "tree", "--workers", str(workers), "--block_size", str(block_size),
        "--n_probes", "1", "--initial_classes", "1", "--class_frequency", "100000",
    ]  # fmt: skip
    started = time.monotonic()
    process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
    memory: list[int] = []
    watcher = threading.Thread(target=_watch, args=(process, memory))
    watcher.start()
    code = process.wait()
    wall = time.monotonic() - started
    watcher.join()
    if code:
        raise SystemExit(f"the launch failed with exit code {code}")
    (log,) = (root / "log").iterdir()
    text = log.read_text()
    seconds, writing = np.array(REPORT.findall(text), dtype=float).T
    rate = re.findall(r"blocks (\d+)/\d+.*, ([\d.]+) samples/s", text)
    store = root / "curvature.zarr"
    half = len(memory) // 2
    return {
        "blocks": len(seconds),
        "workers": workers,
        "wall_seconds": round(wall, 2),
        "active_samples_per_block": block_size / 100,
        "worker_seconds_per_block_median": round(float(np.median(seconds)), 5),
        "writing_seconds_per_block_median": round(float(np.median(writing)), 5),
        "writing_seconds_per_block_p99": round(float(np.quantile(writing, 0.99)), 5),
        "wall_minus_work_seconds_per_block": round(
            (wall * workers - float(seconds.sum())) / len(seconds), 5
        ),
        "last_rate": rate[-1] if rate else None,
        "launcher_rss_mib_halfway": round(memory[half] / 2**20, 1),
        "launcher_rss_mib_peak": round(max(memory) / 2**20, 1),
        "files_in_store": sum(1 for p in store.rglob("*") if p.is_file()),
        "store_mib": round(sum(p.stat().st_size for p in store.rglob("*")) / 2**20, 1),
        "environment": {
            "python": platform.python_version(),
            "cpu_count": psutil.cpu_count(),
            "machine": platform.processor() or platform.machine(),
            **{name: version(name) for name in ("torch", "zarr", "dask", "distributed", "numpy")},
        },
    }


def _watch(process: subprocess.Popen[bytes], memory: list[int]) -> None:
    launcher = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            memory.append(launcher.memory_info().rss)
        except psutil.NoSuchProcess:
            return
        time.sleep(0.25)


if __name__ == "__main__":
    main()
