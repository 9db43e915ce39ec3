"""A copy of decoded images that is being made, and what is known of it after an interruption.

A line in its record says that a chunk is done, from which files and with which digest. In the end
everything is read again: for the digest of the data set, and to find chunks that are not on disk as
they were written, so that nothing has to be synced before.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from daskcurv.atomic import sync
from daskcurv.experiment.data.dataset import KEY_BYTES
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.prepared import RECORD, Chunk, Record, digest_of_chunk
from daskcurv.experiment.data.preprocessing import in_threads

log = logging.getLogger(__name__)

CHUNK_BYTES = 2**25
"""Of pixels in a chunk; a few chunks are in memory at a time."""

_DONE = "chunks.jsonl"


class Stamps:
    """What tells whether the files of a chunk have changed."""

    def __init__(self, dataset: Encoded, chunk_size: int):
        starts = range(0, len(dataset), chunk_size)
        self._stamps = [""] * len(starts)

        def fill(chunks: range) -> None:
            for number in chunks:
                start = starts[number]
                ids = range(start, min(start + chunk_size, len(dataset)))
                text = "\n".join(map(stamp, ids))
                self._stamps[number] = hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

        def stamp(i: int) -> str:
            try:
                return dataset.sources.stamp(i)
            except OSError as error:
                return str(error)

        in_threads(fill, len(starts), "looking for changed files", quiet=True)

    def of(self, number: int) -> str:
        """Return the digest of a chunk's names, sizes and times."""
        return self._stamps[number]


class Draft:
    """A copy that is being made."""

    def __init__(self, dataset: Encoded, directory: Path):
        self.dataset, self.directory = dataset, directory
        self.shape = (len(dataset), *dataset.image_shape)
        self.chunk_size = max(1, CHUNK_BYTES // math.prod(dataset.image_shape))
        self.count = -(-len(dataset) // self.chunk_size)
        self.done: dict[int, Chunk] = {}
        layout = {
            "shape": list(self.shape),
            "chunk_size": self.chunk_size,
            "image_size": dataset.preprocessing.image_size,
        }
        lines = lines_of(directory / _DONE)
        if not lines or lines[0] != layout:
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir(parents=True)
            for name, shape in (("images", self.shape), ("keys", (len(dataset), KEY_BYTES))):
                with open(directory / f"{name}.npy", "wb") as file:
                    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
            (directory / _DONE).write_text(json.dumps(layout) + "\n")
            return
        recorded = {line["number"]: Chunk(line["sources"], line["pixels"]) for line in lines[1:]}
        for number, chunk in recorded.items():
            if chunk.sources == self._stamps.of(number):
                self.done[number] = chunk
        changed = len(recorded) - len(self.done)
        log.info(
            "%s: going on where an earlier launch was interrupted: %d of %d chunks of images are "
            "decoded%s",
            dataset.path,
            len(self.done),
            self.count,
            f"; files of {changed} more have changed since and are decoded again"
            if changed
            else "",
        )

    @cached_property
    def _stamps(self) -> Stamps:
        return Stamps(self.dataset, self.chunk_size)

    @property
    def missing(self) -> list[int]:
        """Chunks that are not decoded."""
        return [number for number in range(self.count) if number not in self.done]

    def ids(self, number: int) -> range:
        """Return the samples of a chunk."""
        start = number * self.chunk_size
        return range(start, min(start + self.chunk_size, len(self.dataset)))

    def write(self, number: int, images: NDArray[np.uint8], keys: NDArray[np.uint8]) -> None:
        """Write a chunk, and then that it is done."""
        start = self.ids(number).start
        for name, values in (("images", images), ("keys", keys)):
            with open(self.directory / f"{name}.npy", "r+b") as file:
                np.lib.format.read_magic(file)
                np.lib.format.read_array_header_1_0(file)
                # Not through a map: on a full disk, that would kill the process.
                file.seek(start * values[0].nbytes, os.SEEK_CUR)
                file.write(np.ascontiguousarray(values))
        self.done[number] = Chunk(self._stamps.of(number), digest_of_chunk(images, keys))
        with open(self.directory / _DONE, "a") as file:
            file.write(json.dumps({"number": number, **vars(self.done[number])}) + "\n")

    def finish(self, parent: Path, decode: Callable[[list[int]], None]) -> Path:
        """Read everything again, decode what is damaged, give the copy its name and return it."""
        np.save(self.directory / "labels.npy", self.dataset.labels)
        while True:
            sha256, damaged = self._read_again()
            if not damaged:
                break
            log.warning("%d chunks are not on disk as they were written; again", len(damaged))
            for number in damaged:
                del self.done[number]
            decode(damaged)
        record = Record(
            sha256,
            self.shape,
            self.chunk_size,
            self.dataset.preprocessing.image_size,
            [self.done[number] for number in range(self.count)],
        )
        (self.directory / RECORD).write_text(record.to_json())
        (self.directory / _DONE).unlink()
        for path in (*self.directory.iterdir(), self.directory):
            sync(path)
        target = parent / sha256[:16]
        shutil.rmtree(target, ignore_errors=True)
        os.rename(self.directory, target)
        sync(parent)
        log.info("%s: decoded into %s", self.dataset.path, target)
        return target

    def _read_again(self) -> tuple[str, list[int]]:
        """Return the digest of the data set, and the chunks that are not as they were written."""
        whole = hashlib.sha256(f"{self.shape}".encode())
        whole.update(np.ascontiguousarray(self.dataset.labels, dtype="<i8"))
        damaged = []
        for number in tqdm(range(self.count), "reading again", unit=" chunks", disable=None):
            ids = self.ids(number)
            images, keys = (self._read(name, ids) for name in ("images", "keys"))
            whole.update(images)
            if digest_of_chunk(images, keys) != self.done[number].pixels:
                damaged.append(number)
        return whole.hexdigest(), damaged

    def _read(self, name: str, ids: range) -> NDArray[np.uint8]:
        try:
            # Mapped anew for each chunk, so that what was read is not counted as memory.
            mapped = np.load(self.directory / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        except ValueError:  # shorter than its header says
            return np.zeros(0, np.uint8)
        return np.array(mapped[ids.start : ids.stop])


def lines_of(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a record, up to one that was interrupted."""
    found: list[dict[str, Any]] = []
    try:
        for line in path.read_text().splitlines():
            found.append(json.loads(line))
    except (OSError, ValueError):
        pass
    return found
