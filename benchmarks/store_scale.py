"""The results store at full size: 4,001 epochs of 50,000 samples, before and after `compact`.

A store is filled with generated values through its own writer, under the documented schedule of
classes, exported as the npy tree with the same content, and compacted. The same questions are then
asked of all three, with the operating system's cache warm, and with the files asked for dropped
from it ("cold"). Prints a table and writes JSON::

    python benchmarks/store_scale.py --directory /scratch --out benchmarks/results/store_scale.json

It takes 20 GB in the directory, and removes them in the end unless told to keep them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from _curvature_report import environment
from numpy.typing import NDArray

from daskcurv import open_results
from daskcurv.experiment.curriculum import Schedule, class_order_of
from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, export_epoch, schema
from daskcurv.storage.work import do_all

SAMPLES, CLASSES = 50_000, 100


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--directory", type=Path, required=True)
    parser.add_argument("--epochs", type=int, default=4001)
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--keep", action="store_true", help="leave the files, and use those there")
    args = parser.parse_args()
    store, tree, out = (args.directory / name for name in ("s.zarr", "tree", "compact.zarr"))
    built = args.directory / "built.json"
    result: dict[str, Any] = {"epochs": args.epochs, "samples": SAMPLES}
    if built.exists():
        result |= json.loads(built.read_text())
    if not store.exists():
        result["template"] = in_its_own_process("create", store, args.epochs)
        result["list missing, none done"] = in_its_own_process("list_missing", store)
        result["open, none done"] = in_its_own_process("open_only", store)
        result["fill"] = timed(lambda: in_pieces(fill, store, args.epochs))
    if not tree.exists():
        result["export npy"] = timed(lambda: in_pieces(export, store, args.epochs, tree))
    if not out.exists():
        result["compact"] = compact(store, out)
    built.write_text(json.dumps(result))
    result["list missing, all done"] = in_its_own_process("list_missing", store)
    result["verify"] = timed(lambda: command("verify", store))
    result["verify compact"] = timed(lambda: command("verify", out))
    for name, path in (("store", store), ("compact store", out), ("npy tree", tree)):
        result[name] = {**size(path), **questions(path, tree if path == tree else None)}
    result["open, all done"] = in_its_own_process("open_only", store)
    result["open, compact"] = in_its_own_process("open_only", out)
    result["environment"] = environment_of(args.directory)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if not args.keep:
        built.unlink()
        for path in (store, tree, out):
            shutil.rmtree(path)


def environment_of(directory: Path) -> dict[str, Any]:
    """Return the machine's description, with that of its disk."""
    from torch import device

    found = environment(device("cpu"))
    partition = max(
        (p for p in psutil.disk_partitions(all=True) if directory.is_relative_to(p.mountpoint)),
        key=lambda p: len(p.mountpoint),
    )
    return {**found, "file_system": partition.fstype}


def create(path: Path, epochs: str) -> None:
    """Create the store, with nothing done."""
    numbers = list(range(int(epochs)))
    labels = np.random.default_rng(0).permutation(np.repeat(np.arange(CLASSES), 500))
    order = class_order_of(0)
    position = np.argsort(order)[labels]
    schedule = Schedule()
    ResultsStore.create(
        path,
        identity={
            "estimator": {"method": "difference-propagation", "n_probes": 10},
            "classes": {"order": order.tolist()},
        },
        samples={
            "sample": np.arange(SAMPLES),
            "label": labels,
            "split": np.zeros(SAMPLES, int),
            "class_position": position,
            "first_epoch_active": schedule.first_epoch_active(CLASSES)[position],
        },
        epochs={
            "epoch": numbers,
            "task": [schedule.task(epoch, CLASSES) for epoch in numbers],
            "num_active_classes": [schedule.num_active(epoch, CLASSES) for epoch in numbers],
            "checkpoint": [f"index-0_epoch-{epoch}.pt" for epoch in numbers],
            "checkpoint_sha256": [f"{epoch:064x}" for epoch in numbers],
            "checkpoint_size": [44_000_000] * len(numbers),
            "checkpoint_mtime_ns": [0] * len(numbers),
        },
    )


def list_missing(path: Path) -> None:
    """Do what a launch does to find out what is left."""
    print((~ResultsStore.open(path).done_blocks()).sum())


def open_only(path: Path) -> None:
    """Do what a reader does first."""
    open_results(path)


def in_its_own_process(name: str, *arguments: Any) -> dict[str, float]:
    """Return seconds of one of the functions above, and its process's peak memory in MiB."""
    code = (
        "import resource, sys, time; from pathlib import Path; import store_scale;"
        "import daskcurv.storage; began = time.perf_counter();"
        f"store_scale.{name}(Path(sys.argv[1]), *sys.argv[2:]); took = time.perf_counter() - began;"
        "print(took, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=Path(__file__).parent,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    seconds, peak = map(float, run.stdout.split()[-2:])
    return {"seconds": round(seconds, 3), "peak_rss_mib": round(peak)}


def timed(work: Callable[[], Any]) -> dict[str, float]:
    """Return the seconds that something takes."""
    began = time.perf_counter()
    work()
    return {"seconds": round(time.perf_counter() - began, 1)}


def in_pieces(function: Callable[..., None], store: Path, epochs: int, *rest: Path) -> None:
    """Call a function for every 50 epochs, on all cores."""
    pieces = [
        (store, range(start, min(start + 50, epochs)), *rest) for start in range(0, epochs, 50)
    ]
    do_all(function, pieces, description=function.__name__)


def fill(path: Path, rows: range) -> None:
    """Write the blocks of some epochs: values that differ by sample and drift with the epoch."""
    store = ResultsStore.open(path)
    first_active = store.read("first_epoch_active")
    base = np.random.default_rng(1).normal(size=(len(MEASURES), SAMPLES))
    for row in rows:
        generator = np.random.default_rng([2, row])
        active = first_active <= store.epochs[row]
        values: dict[str, NDArray[Any]] = {}
        for number, variable in enumerate(MEASURES):
            drift = 0.2 * generator.normal(size=SAMPLES) - row / 4000
            column = np.exp(base[number] + drift).astype(variable.dtype)
            if variable.name == "prediction":
                column = generator.integers(0, CLASSES, SAMPLES).astype(variable.dtype)
            column[~active] = variable.fill
            values[variable.name] = column
        values["status"] = np.where(active, schema.COMPUTED, schema.INACTIVE).astype(np.uint8)
        for block in range(store.num_blocks):
            part = slice(*store.bounds(block))
            store.write_block(row, block, {name: column[part] for name, column in values.items()})
    # Rows of one chunk are not for several processes; the launcher writes them in a run.
    if rows.start == 0:
        for row in range(len(store.epochs)):
            store.set_epoch(row, complete=True)


def export(path: Path, rows: range, tree: Path) -> None:
    """Export some epochs with all variables, so that the tree has the same content."""
    store = ResultsStore.open(path)
    for row in rows:
        export_epoch(store, tree, store.epochs[row], extras=True)


def command(name: str, *arguments: Path) -> None:
    """Run a command of the program."""
    subprocess.run([sys.executable, "-m", "daskcurv", name, *map(str, arguments)], check=True)


def compact(store: Path, out: Path) -> dict[str, float]:
    """Return seconds, and the peak memory of all its processes together."""
    began, peak = time.perf_counter(), 0
    process = subprocess.Popen([sys.executable, "-m", "daskcurv", "compact", store, out])
    whole = psutil.Process(process.pid)
    while process.poll() is None:
        try:
            family = [whole, *whole.children(recursive=True)]
            peak = max(peak, sum(member.memory_info().rss for member in family))
        except psutil.NoSuchProcess:
            continue
        time.sleep(0.2)
    if process.returncode:
        sys.exit("compact failed")
    seconds = round(time.perf_counter() - began, 1)
    return {"seconds": seconds, "peak_rss_mib": round(peak / 2**20)}


def size(path: Path) -> dict[str, float]:
    """Return how many files there are, and how much they hold and take on disk."""
    files = directories = held = taken = 0
    for _, subdirectories, names, descriptor in os.fwalk(path):
        files, directories = files + len(names), directories + len(subdirectories)
        for name in names:
            found = os.stat(name, dir_fd=descriptor)
            held, taken = held + found.st_size, taken + 512 * found.st_blocks
    gib = {"gib": round(held / 2**30, 3), "gib_on_disk": round(taken / 2**30, 3)}
    return {"files": files, "directories": directories, **gib}


def questions(path: Path, tree: Path | None) -> dict[str, dict[str, float]]:
    """Return milliseconds of each question to a store, or to the npy tree."""
    if tree:
        epochs = sorted(tree.glob("epoch_*"))
        labels = np.load(epochs[0] / "per_image_labels.npy")
        name = "per_image_curvature.npy"

        def mapped(samples: Any) -> NDArray[Any]:
            return np.stack([np.load(epoch / name, mmap_mode="r")[samples] for epoch in epochs])

        def loaded(samples: Any) -> NDArray[Any]:
            return np.stack([np.load(epoch / name)[samples] for epoch in epochs])

        asked: dict[str, Callable[[int], Any]] = {
            "one epoch, all samples": lambda i: np.load(epochs[i] / name),
            "one sample, all epochs": loaded,
            "one sample, all epochs (mmap)": mapped,
            "one class, all epochs": lambda i: loaded(labels == i % CLASSES),
        }
        slow = {"one sample, all epochs", "one sample, all epochs (mmap)", "one class, all epochs"}
    else:
        results = open_results(path)
        labels, curvature = results.label.values, results.curvature
        asked = {
            "one epoch, all samples": lambda i: curvature.sel(epoch=i).values,
            "one sample, all epochs": lambda i: curvature.sel(sample=i).values,
            "one class, all epochs": lambda i: curvature.sel(sample=labels == i % CLASSES).values,
            "open, then one sample": lambda i: open_results(path).curvature.sel(sample=i).values,
        }
        is_compact = ResultsStore.open(path).is_compact
        slow = set(asked) - {"one epoch, all samples"} if not is_compact else set()
    count = len(epochs) if tree else len(results.epoch)
    picks = np.random.default_rng(3).integers(0, count, 25).tolist()
    answers = {}
    for question, ask in asked.items():
        few = picks[:3] if question in slow else picks
        cold = []
        for pick in few[:5]:
            forget(path)
            cold.append(milliseconds(ask, pick))
        ask(few[0])
        warm = [milliseconds(ask, pick) for pick in few for _ in range(2)][1::2]
        answers[question] = {
            "cold_ms": round(statistics.median(cold), 3),
            "warm_ms": round(statistics.median(warm), 3),
            "warm_worst_ms": round(max(warm), 3),
        }
        print(path.name, question, answers[question], file=sys.stderr, flush=True)
    return answers


def milliseconds(ask: Callable[[int], Any], pick: int) -> float:
    """Return how long an answer takes."""
    began = time.perf_counter()
    ask(pick)
    return 1e3 * (time.perf_counter() - began)


def forget(path: Path) -> None:
    """Drop a directory's contents from the operating system's cache."""
    os.sync()
    try:
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    except OSError:
        for file in path.rglob("curvature*/**/*"):
            if file.is_file():
                descriptor = os.open(file, os.O_RDONLY)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                os.close(descriptor)


if __name__ == "__main__":
    main()
