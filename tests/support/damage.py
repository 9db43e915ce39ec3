"""Damaging the files of a results store, and counting what notices.

The whole campaign::

    python -m tests.support.damage --cases 300 --out benchmarks/results/damage.json
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging.handlers import BufferingHandler
from pathlib import Path
from typing import Any

import numpy as np

from daskcurv.storage import ResultsStore, schema
from daskcurv.storage.integrity.verify import repair, verify
from daskcurv.storage.read import open_results

KINDS = ("flip a bit", "truncate", "empty", "delete", "swap")


def chunk_files(store: Path) -> list[Path]:
    """Every chunk file of a store, in a fixed order."""
    return sorted(path for path in store.rglob("c/**/*") if path.is_file())


def damage(kind: str, files: list[Path], generator: random.Random) -> list[Path]:
    """Damage one file, or two that change places; returns them."""
    path = generator.choice(files)
    content = path.read_bytes()
    if kind == "flip a bit":
        position = generator.randrange(8 * len(content))
        changed = bytearray(content)
        changed[position // 8] ^= 1 << position % 8
        path.write_bytes(bytes(changed))
    elif kind == "truncate":
        path.write_bytes(content[: generator.randrange(1, len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    else:
        # Files of equal content can change places without anything being different.
        others = [other for other in files if other.read_bytes() != content]
        # Half of the time one of the same variable, which is harder to notice.
        name = path.relative_to(path.parents[3]).parts[0]
        akin = [other for other in others if name in other.parts]
        other = generator.choice(akin if akin and generator.random() < 0.5 else others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(content)
        return [path, other]
    return [path]


@contextmanager
def undone(store: Path, scratch: Path) -> Iterator[None]:
    """Put the files back as they were."""
    copy = scratch / "copy"
    shutil.copytree(store, copy)
    try:
        yield
    finally:
        shutil.rmtree(store)
        copy.rename(store)


def contents(store: Path) -> dict[str, np.ndarray]:
    """Everything that a reader sees, but for the account of time and workers."""
    results = open_results(store).load()
    account = {"compute_seconds", "num_workers", "method"}
    return {str(n): v.values for n, v in results.variables.items() if n not in account}


def same(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> bool:
    def equal(a: np.ndarray, b: np.ndarray) -> bool:
        return np.array_equal(a, b, equal_nan=a.dtype.kind == "f")

    return left.keys() == right.keys() and all(equal(left[name], right[name]) for name in left)


def plain_read(store: Path, expected: dict[str, np.ndarray]) -> str:
    """What happens to someone who only reads."""
    listener = BufferingHandler(capacity=1000)
    listener.setLevel(logging.WARNING)
    logging.getLogger("daskcurv.storage").addHandler(listener)
    try:
        found = contents(store)
    except Exception:
        return "refused"
    finally:
        logging.getLogger("daskcurv.storage").removeHandler(listener)
    if same(found, expected):
        return "right"
    # Left out with a warning is what its status calls missing, as if it had not been computed yet.
    there = found["status"] != schema.MISSING

    def part(values: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {n: v[there] if v.shape == there.shape else v for n, v in values.items()}

    return "left out" if listener.buffer and same(part(found), part(expected)) else "wrong"


def campaign(
    store: Path, launch: Callable[[], None], cases: int, batch: int, seed: int = 0
) -> dict[str, Any]:
    """Damage a complete store in `cases` ways; each has to be noticed, and mended by a launch.

    Each case is tried alone. Then every `batch` cases are done together, marked as missing, and
    mended by one launch, after which the store has to be what it was.
    """
    generator = random.Random(seed)
    expected = contents(store)
    noticed: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    reading: defaultdict[str, Counter[str]] = defaultdict(Counter)
    unnoticed, launches = [], 0
    with tempfile.TemporaryDirectory(dir=store.parent) as directory:
        scratch = Path(directory)
        while sum(tried.values()) < cases:
            states = []
            for _ in range(min(batch, cases - sum(tried.values()))):
                kind = KINDS[sum(tried.values()) % len(KINDS)]
                states.append((kind, generator.getstate()))
                with undone(store, scratch):
                    paths = damage(kind, chunk_files(store), generator)
                    tried[kind] += 1
                    found = verify(ResultsStore.open(store)).damage
                    noticed[kind] += bool(found)
                    if not found:
                        unnoticed.append((kind, *map(str, paths)))
                    reading[kind][plain_read(store, expected)] += 1
            for kind, state in states:
                generator.setstate(state)
                # Several together: a file can be gone already.
                damage(kind, [p for p in chunk_files(store) if p.stat().st_size > 1], generator)
            opened = ResultsStore.open(store)
            repair(opened, verify(opened).damage)
            launch()
            launches += 1
            opened = ResultsStore.open(store)
            if verify(opened).damage or not same(contents(store), expected):
                raise AssertionError(f"not mended: {states}")
    return {
        "cases": dict(tried),
        "noticed": dict(noticed),
        "unnoticed": unnoticed,
        "plain_reads": {kind: dict(counts) for kind, counts in reading.items()},
        "launches": launches,
    }


def main() -> None:
    from tests.support.builders import write_checkpoints, write_cifar
    from tests.support.project import Project

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=300)
    parser.add_argument("--batch", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        project = Project(Path(directory))
        write_cifar(project.data)
        write_checkpoints(project.models, [0, 1, 2, 4])

        def launch() -> None:
            run = project.launch("--block_size", "20", "--no_export")
            if run.returncode:
                sys.exit(run.stdout)

        launch()
        result = campaign(project.store, launch, args.cases, args.batch, args.seed)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if result["unnoticed"]:
        sys.exit("something was not noticed")


if __name__ == "__main__":
    main()
