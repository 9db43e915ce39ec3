"""Killing a run's processes at random instants, again and again, until it is done nevertheless.

The whole campaign::

    python -m tests.support.crashes --kills 200 --out benchmarks/results/crashes.json
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from daskcurv.storage import ResultsStore
from daskcurv.storage.integrity.verify import verify
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.damage import contents, same
from tests.support.project import Project

EPOCHS = [0, 1, 2, 3, 4, 5]
# Blocks so small that much of the time goes into writing them.
ARGUMENTS = ("--block_size", "2", "--n_probes", "1", "--workers", "2")
TARGETS = {"worker": 0.5, "launcher": 0.3, "all processes": 0.2}
LONGEST_WAIT = 6.0


@dataclass
class Tally:
    """What happened in a campaign."""

    kills: Counter[str] = field(default_factory=Counter)
    before_the_store_existed: int = 0
    with_a_write_half_done: int = 0
    strays: int = 0
    launches: int = 0
    completed_runs: int = 0
    blocks: int = 0
    problems: list[str] = field(default_factory=list)


def make_inputs(root: Path) -> Project:
    """60 samples of 10 classes, and checkpoints of six epochs."""
    project = Project(root)
    write_cifar(project.data)
    write_checkpoints(project.models, EPOCHS)
    return project


def campaign(inputs: Project, scratch: Path, kills: int, seed: int = 0) -> Tally:
    """Launch and kill until there have been so many kills, and every run begun is complete.

    After each kill that ends a launch, what the store holds has to be in order, with nothing that
    was recorded before lost or written again. Each complete run has to be what an undisturbed one
    is, bit for bit, in the store and in the export.
    """
    generator = random.Random(seed)
    reference = _project(inputs, scratch / "undisturbed")
    run = reference.launch(*ARGUMENTS)
    if run.returncode:
        sys.exit(run.stdout)
    expected, expected_tree = contents(reference.store), _arrays(reference.tree)
    tally = Tally()
    while sum(tally.kills.values()) < kills:
        project = _project(inputs, scratch / f"run {tally.completed_runs}")
        recorded: dict[Path, tuple[int, int]] = {}
        began = time.time()
        while not _launch_and_kill(project, generator, kills, tally):
            recorded = _in_order(project, recorded, began, tally)
            _leave_strays(project, generator, tally)
            began = time.time()
        recorded = _in_order(project, recorded, began, tally)
        tally.completed_runs += 1
        tally.blocks += len(recorded)
        if not same(contents(project.store), expected):
            tally.problems.append("a complete store differs from the undisturbed one")
        if _arrays(project.tree) != expected_tree:
            tally.problems.append("an export differs from the undisturbed one")
        shutil.rmtree(project.root)
        print(f"{sum(tally.kills.values())} kills, {tally.completed_runs} runs", file=sys.stderr)
    return tally


def _project(inputs: Project, root: Path) -> Project:
    root.mkdir()
    project = Project(root)
    project.data, project.models = inputs.data, inputs.models
    return project


def _launch_and_kill(project: Project, generator: random.Random, kills: int, tally: Tally) -> bool:
    """Launch, and kill a process every few seconds; returns whether it got to its end."""
    process = project.start("launch", *project.launch_arguments(*ARGUMENTS))
    tally.launches += 1
    begun = len(finished_blocks(project))
    # Now and then while it starts; else once it computes.
    while generator.random() < 0.9 and process.poll() is None:
        if len(finished_blocks(project)) > begun:
            break
        time.sleep(0.05)
    while True:
        try:
            output, _ = process.communicate(timeout=generator.uniform(0, LONGEST_WAIT))
        except subprocess.TimeoutExpired:
            pass
        else:
            if process.returncode:
                tally.problems.append(f"a launch failed: {output}")
            return True
        if sum(tally.kills.values()) >= kills:
            continue  # no more; let it finish
        target = generator.choices(list(TARGETS), list(TARGETS.values()))[0]
        workers = workers_of(process)
        if target == "worker" and not workers:
            continue
        tally.kills[target] += 1
        if target == "worker":
            generator.choice(workers).kill()
            continue
        if target == "launcher":
            # Its workers live on for a while, and may still write.
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return False


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """Worker processes of a launch."""
    try:
        children = psutil.Process(process.pid).children(recursive=True)
        return [child for child in children if "spawn_main" in " ".join(child.cmdline())]
    except psutil.NoSuchProcess:
        return []


def finished_blocks(project: Project) -> dict[Path, tuple[int, int]]:
    """Inode and time of each status chunk: writing a block again would change them."""
    chunks = (project.store / "status" / "c").glob("*/*")
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in chunks
        if path.name.isdigit()
    }


def _in_order(
    project: Project, before: dict[Path, tuple[int, int]], since: float, tally: Tally
) -> dict[Path, tuple[int, int]]:
    """Check the store as it is now; returns what it has on record."""
    if not project.store.exists():
        tally.before_the_store_existed += 1
        return {}
    recorded = finished_blocks(project)
    if changed := [path for path, when in before.items() if recorded.get(path) != when]:
        tally.problems.append(f"lost, or written again after it was recorded: {changed}")
    found = verify(ResultsStore.open(project.store))
    tally.problems += [f"{damage.where}: {damage.what}" for damage in found.damage]
    # The curvature is the first of a block to be written, and the status the last.
    written = (project.store / "curvature" / "c").glob("*/*")
    new = {
        path.relative_to(project.store / "curvature") for path in written if _is_new(path, since)
    }
    tally.with_a_write_half_done += bool(
        new - {path.relative_to(project.store / "status") for path in recorded}
    )
    return recorded


def _is_new(path: Path, since: float) -> bool:
    return path.stat().st_mtime > since


def _leave_strays(project: Project, generator: random.Random, tally: Tally) -> None:
    """Leave such files as processes that are killed leave."""
    chunks = sorted(path for path in project.store.rglob("c/**/*") if path.is_file())
    for path in generator.sample(chunks, min(3, len(chunks))):
        stray = path.with_name(f"{path.name}.{generator.getrandbits(64):x}.partial")
        stray.write_bytes(path.read_bytes()[: generator.randrange(20)])
        tally.strays += 1
    beside = project.root / f".{project.store.name}.{generator.getrandbits(32):x}.partial"
    beside.mkdir()
    (beside / "zarr.json").write_text("{")
    tally.strays += 1


def _arrays(tree: Path) -> dict[str, bytes]:
    """The exported arrays; the metadata beside them say how long it took.

    Drafts of exports that were killed are hidden directories.
    """
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.glob("epoch_*/*.npy")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        tally = campaign(make_inputs(root), root, args.kills, args.seed)
    result: dict[str, Any] = {"seed": args.seed, **vars(tally), "kills": dict(tally.kills)}
    text = json.dumps(result, indent=2)
    print(text)
    if args.out:
        args.out.write_text(text + "\n")
    if tally.problems:
        sys.exit("not everything survived")


if __name__ == "__main__":
    main()
