"""Compare the results of two versions of daskcurv, bit for bit, on one machine.

``python tests/campaigns/same_bits.py OLD NEW WORK [--without_demo]`` runs the same commands with
the sources in the directories OLD and NEW, in subdirectories of WORK: a class-incremental run by
each method, for each head and partition; a store of format 1 that is continued; the demo. Every
array of the stores and every file of the exports has to have the same bytes. What records the run
rather than the results may differ: times, the number of workers, the version and the store's
format. New stores of NEW may have columns that OLD did not write.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import zarr

DATA = Path(__file__).parents[1] / "data" / "format1" / "format1.tar.xz"

RUN = [
    *("--data_path", "cifar-100-python", "--model_dir", "model_parameters"),
    *("--class_order", "regenerate", "--initial_classes", "4", "--class_increment", "4"),
    *("--class_frequency", "2", "--validation_per_class", "1", "--n_probes", "4"),
    *("--batch_size", "8", "--block_size", "16", "--workers", "2", "--epochs", "all"),
]

VARIANTS = {
    "auto": [],
    "float32": ["--precision", "float32"],
    "direct": ["--method", "finite-difference", "--head", "active"],
    "zeroth": ["--method", "zeroth-order", "--class_partition", "trained"],
}

OF_THE_RUN = {"compute_seconds", "num_workers", "checkpoint_mtime_ns"}
ATTRIBUTES_OF_THE_RUN = {
    "daskcurv_version",
    "daskcurv_format",
    "measures",
    "epochs_not_finite",  # version 0.1.0 counted what zeroth order cannot give
}
ADDED = {"sample_key", "sample_name"}
"""Columns that versions before them did not write."""
OF_THE_DEMO = {"checkpoint_sha256"}
"""The demo trains its own network; PyTorch writes the same weights into files that differ."""


def compute(source: Path, work: Path, demo: bool) -> None:
    """Run all commands with one version."""
    work.mkdir(parents=True)
    with tarfile.open(DATA) as archive:
        archive.extractall(work, filter="data")
    for name, options in VARIANTS.items():
        store = ["--store", f"{name}.zarr", "--save_base_dir", f"{name}.tree"]
        # Version 0.1.0 ended with 1 after a run of zeroth order, whose store was right.
        daskcurv(source, work, "launch", *RUN, *store, *options, may_fail=name == "zeroth")
        daskcurv(source, work, "export", f"{name}.zarr", f"{name}.csv")
        daskcurv(source, work, "compact", f"{name}.zarr", f"{name}-compact.zarr")
    store = ["--store", "curvature.zarr", "--save_base_dir", "tree"]
    daskcurv(source, work, "launch", *RUN, *store)
    if demo:
        daskcurv(source, work, "launch", "--demo", "demo")


def daskcurv(source: Path, work: Path, *words: str, may_fail: bool = False) -> None:
    """Run one command to its end."""
    environment = {**os.environ, "PYTHONPATH": str(source)}
    run = subprocess.run(
        [sys.executable, "-m", "daskcurv", *words],
        cwd=work,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if run.returncode and not may_fail:
        sys.exit(f"{source}: daskcurv {' '.join(words)} ended with {run.returncode}:\n{run.stdout}")


def differences(old: Path, new: Path) -> list[str]:
    """Return what differs between the stores, exports and tables in two directories."""
    found: list[str] = []
    stores = sorted(path.relative_to(old) for path in old.rglob("*.zarr"))
    trees = sorted({path.parent.parent.relative_to(old) for path in old.rglob("metadata.json")})
    tables = sorted(path.relative_to(old) for path in old.rglob("*.csv"))
    print(f"comparing {len(stores)} stores, {len(trees)} exports, {len(tables)} tables")
    for store in stores:
        found += [f"{store}: {what}" for what in store_differences(old / store, new / store)]
    for tree in trees:
        found += [f"{tree}: {what}" for what in tree_differences(old / tree, new / tree)]
    for table in tables:
        if not filecmp.cmp(old / table, new / table, shallow=False):
            found.append(f"{table} differs")
    return found


def store_differences(old: Path, new: Path) -> list[str]:
    """Compare two stores: attributes, arrays, and the bytes of the per-sample chunks."""
    before, after = (zarr.open_group(path, mode="r") for path in (old, new))
    names, others = arrays_of(before), arrays_of(after)
    added = (others - names) & ADDED
    attributes = dict(after.attrs)
    listed = str(attributes["coordinates"]).split()
    attributes["coordinates"] = " ".join(name for name in listed if name not in added)
    found = [
        f"attribute {name} differs"
        for name in sorted({*before.attrs, *attributes} - ATTRIBUTES_OF_THE_RUN)
        if before.attrs.get(name) != attributes.get(name)
    ]
    if names != others - added:
        return [*found, f"arrays {sorted(names ^ (others - added))} are in one of them only"]
    skipped = OF_THE_RUN | (OF_THE_DEMO if "demo" in old.parts else set())
    for name in sorted(names - skipped):
        left: Any = before[name]
        right: Any = after[name]
        a, b = np.asarray(left[...]), np.asarray(right[...])
        equal = np.array_equal(a, b) if a.dtype.kind in "OUT" else a.tobytes() == b.tobytes()
        if a.shape != b.shape or a.dtype != b.dtype or not equal:
            found.append(f"{name} differs")
        if len(a.shape) < 2:
            continue
        for chunk in sorted((old / name / "c").rglob("*")):
            other = new / chunk.relative_to(old)
            if chunk.is_file() and not filecmp.cmp(chunk, other, shallow=False):
                found.append(f"the file {chunk.relative_to(old)} differs")
    return found


def arrays_of(group: zarr.Group) -> set[str]:
    """Return the names of all arrays."""
    return {
        name for name, member in group.members(max_depth=None) if isinstance(member, zarr.Array)
    }


def tree_differences(old: Path, new: Path) -> list[str]:
    """Compare two npy exports."""
    files = {path.relative_to(old) for path in old.rglob("*") if path.is_file()}
    others = {path.relative_to(new) for path in new.rglob("*") if path.is_file()}
    if files != others:
        return [f"files {sorted(map(str, files ^ others))} are in one of them only"]
    found = []
    for path in sorted(files):
        if path.name == "metadata.json":
            left, right = (json.loads((root / path).read_text()) for root in (old, new))
            for metadata in (left, right):
                for name in ("compute_time_seconds", "num_gpus"):
                    metadata.pop(name)
                if "demo" in old.parts:
                    metadata.pop("checkpoint_sha256")
            same = list(left) == list(right) and left == right
        else:
            same = filecmp.cmp(old / path, new / path, shallow=False)
        if not same:
            found.append(f"{path} differs")
    return found


def main() -> None:
    """Run the commands of both versions and compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--without_demo", action="store_true")
    parser.add_argument("--compare_only", action="store_true", help="what is in WORK")
    args = parser.parse_args()
    for name, source in (("old", args.old), ("new", args.new)):
        # What one version has computed is kept, so that several can be compared with it.
        if not args.compare_only and (name == "new" or not (args.work / name).exists()):
            compute(source.resolve(), args.work / name, not args.without_demo)
    found = differences(args.work / "old", args.work / "new")
    print("\n".join(found) or "the same bits")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
