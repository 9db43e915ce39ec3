"""How fast a folder of JPEG files is decoded onto disk, in how much memory, and after a kill.

Makes images of noise in class folders, decodes them in a process that is killed half-way, goes on
in another, and decodes all of them in a third. Prints the figures and writes JSON::

    python benchmarks/preparation.py --out benchmarks/results/preparation.json
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _curvature_report import environment
from PIL import Image

from daskcurv.experiment.data import encoded, read_dataset
from daskcurv.experiment.data.draft import Draft
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.preparation import prepare_encoded

CLASSES = 100


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="(default: %(default)s)")
    parser.add_argument("--width", type=int, default=64, help="of the files (default: %(default)s)")
    parser.add_argument("--height", type=int, default=64)
    parser.add_argument("--image_size", type=int, help="resize them to this")
    parser.add_argument("--out", type=Path, help="JSON")
    parser.add_argument("--decode", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.decode:
        print(json.dumps(decode(args.decode, args.image_size)))
        return
    with tempfile.TemporaryDirectory() as directory:
        result = measure(Path(directory), args)
    for name, value in result.items():
        print(f"{name:>32}  {value}")
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def make_images(root: Path, count: int, width: int, height: int) -> None:
    """Write JPEG files; each differs from all others."""
    generator = np.random.default_rng(0)
    coarse = generator.integers(0, 256, (200, height // 8 + 1, width // 8 + 1, 3), np.uint8)
    for number in range(count):
        directory = root / f"class_{number % CLASSES:03d}"
        directory.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(coarse[number % len(coarse)]).resize((width, height))
        image.putpixel((number % 7, 0), (number % 256, number // 256 % 256, number // 65536))
        file = BytesIO()
        image.save(file, "JPEG", quality=90)
        (directory / f"{number:07d}.jpg").write_bytes(file.getvalue())


def decode(directory: Path, image_size: int | None) -> dict[str, Any]:
    """Decode what is missing; the figures of this process."""
    encoded.IN_MEMORY = 0
    decoded = 0
    write = Draft.write

    def counting(self: Draft, number: int, images: Any, keys: Any) -> None:
        nonlocal decoded
        write(self, number, images, keys)
        decoded += len(images)

    Draft.write = counting  # type: ignore[method-assign]
    imported = _peak()
    began = time.perf_counter()
    dataset = read_dataset(directory / "images", mean=0.5, std=0.2, image_size=image_size)
    assert isinstance(dataset, Encoded)
    listed = time.perf_counter()
    copy = prepare_encoded(dataset, directory / "inputs")
    ended = time.perf_counter()
    return {
        "digest": copy.digest(),
        "decoded": decoded,
        "seconds_to_list": round(listed - began, 1),
        "seconds_to_prepare": round(ended - listed, 1),
        "images_per_second": round(decoded / (ended - listed), 1),
        "peak_mib_before": imported,
        "peak_mib": _peak(),
    }


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def measure(directory: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Kill, go on, and do all at once."""
    make_images(directory / "images", args.images, args.width, args.height)
    command = [sys.executable, __file__, "--decode", str(directory)]
    if args.image_size:
        command += ["--image_size", str(args.image_size)]
    record = directory / "inputs" / "decoding" / "chunks.jsonl"
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    done = 0
    while process.poll() is None:
        lines = record.read_text().splitlines() if record.exists() else []
        if lines:
            done = json.loads(lines[0])["chunk_size"] * (len(lines) - 1)
            if done >= args.images / 2:
                process.send_signal(signal.SIGKILL)
                break
        time.sleep(0.01)
    killed = process.wait() == -signal.SIGKILL
    resumed = _run(command)
    shutil.rmtree(directory / "inputs")
    whole = _run(command)
    assert whole["digest"] == resumed["digest"]
    return {
        "images": args.images,
        "file_size": [args.width, args.height],
        "image_size": args.image_size,
        "killed": killed,
        "done_when_killed": done,
        "after_the_kill": resumed,
        "all_at_once": whole,
        "environment": environment(torch.device("cpu")),
    }


def _run(command: list[str]) -> dict[str, Any]:
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
    result: dict[str, Any] = json.loads(run.stdout)
    return result


if __name__ == "__main__":
    main()
