"""How many blocks the launcher can hand out, and what it costs it, without computing any.

The launcher's own code feeds a run of a full training history (4,001 epochs in 50 blocks each) to
sixteen workers that do nothing. The workers are threads of one other process, as so many processes
would need more cores than a small machine has; to the scheduler they are workers like any others,
connected by TLS. The store is not written. Prints a table and writes JSON::

    python benchmarks/scheduler_scale.py --out benchmarks/results/scheduler_scale.json
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dask
import psutil
from _curvature_report import environment
from _nothing import nothing
from distributed import Client, Scheduler, Worker
from distributed.deploy.spec import SpecCluster
from distributed.security import Security
from torch import device as torch_device

from daskcurv.clusters.base import scheduler_settings
from daskcurv.clusters.local import LocalWorkers
from daskcurv.clusters.slurm.run_directory import credentials
from daskcurv.runs.events import Done
from daskcurv.runs.tasks import BlockTask
from daskcurv.runs.window import feed

SAMPLES = 20


def main() -> None:
    """Run the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=4001)
    parser.add_argument("--blocks_per_epoch", type=int, default=50)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--join", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.join:
        asyncio.run(work(args.workers, *args.join))
        return
    with tempfile.TemporaryDirectory() as directory:
        result = measure(args, Path(directory))
    for name, value in result.items():
        print(f"{name:>32}  {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Feed all tasks; return rates and memory."""
    security = credentials(directory)
    options = {
        "protocol": "tls://",
        "host": "127.0.0.1",
        "security": security,
        "dashboard_address": "127.0.0.1:0",
    }
    with (
        dask.config.set(scheduler_settings(20)),
        SpecCluster(
            workers={},
            scheduler={"cls": Scheduler, "options": options},
            security=security,
            silence_logs=logging.CRITICAL,
        ) as cluster,
        Client(cluster, security=security) as client,
    ):
        command = [sys.executable, *sys.argv, "--join", cluster.scheduler_address, str(directory)]
        with subprocess.Popen(command) as workers:
            try:
                client.wait_for_workers(args.workers, timeout=120)
                return _feed(LocalWorkers(client, cluster), args)
            finally:
                workers.terminate()


def _feed(workers: LocalWorkers, args: argparse.Namespace) -> dict[str, Any]:
    launcher = psutil.Process()
    total = args.epochs * args.blocks_per_epoch
    marks: list[tuple[int, float, float, int]] = []

    def mark(done: int) -> None:
        times = launcher.cpu_times()
        marks.append(
            (done, time.monotonic(), times.user + times.system, launcher.memory_info().rss)
        )

    mark(0)
    done = 0
    for event in feed(workers, nothing, tasks(args.epochs, args.blocks_per_epoch)):
        if isinstance(event, Done):
            done += 1
            if done % max(1, total // SAMPLES) == 0:
                mark(done)
    first, second, last = marks[0], marks[1], marks[-1]
    wall = last[1] - first[1]
    return {
        "tasks": done,
        "workers": args.workers,
        "seconds": round(wall, 1),
        "tasks_per_second": round(done / wall, 1),
        "tasks_per_second_first_twentieth": round(second[0] / (second[1] - first[1]), 1),
        "tasks_per_second_last_twentieth": round(
            (last[0] - marks[-2][0]) / (last[1] - marks[-2][1]), 1
        ),
        "launcher_cpu_ms_per_task": round(1e3 * (last[2] - first[2]) / done, 3),
        "launcher_rss_mib": [round(entry[3] / 2**20) for entry in marks],
        "environment": environment(torch_device("cpu")),
    }


def tasks(epochs: int, blocks: int) -> Iterator[BlockTask]:
    """Yield tasks like those of a real run."""
    for epoch in range(epochs):
        path = Path(f"results2/base_deep_learning_system/model_parameters/index-0_epoch-{epoch}.pt")
        for block in range(blocks):
            yield BlockTask(epoch, epoch, block, path, f"{epoch:064x}", 1000, path)


async def work(count: int, scheduler: str, directory: str) -> None:
    """Be so many workers, each with one thread, until the end."""
    key, cert = (str(Path(directory) / f"tls_scheduler_{kind}.pem") for kind in ("key", "cert"))
    security = Security(
        require_encryption=True,
        tls_ca_file=str(Path(directory) / "tls_ca_file.pem"),
        tls_worker_cert=cert,
        tls_worker_key=key,
    )
    workers = [
        Worker(scheduler, nthreads=1, security=security, dashboard_address="127.0.0.1:0")
        for _ in range(count)
    ]
    await asyncio.gather(*workers)
    await asyncio.gather(*(worker.finished() for worker in workers))


if __name__ == "__main__":
    main()
