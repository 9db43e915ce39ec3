"""Decoding a large training set onto disk, once, before any worker is asked for.

The copy is built in a directory of its own, chunk by chunk (`daskcurv.experiment.data.draft`). A
process that is killed leaves the chunks that are done, and the next one decodes the others. Then
the directory gets the name under which workers look for it.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from daskcurv.errors import DataError, StoreWriteError
from daskcurv.experiment.data.dataset import KEY_BYTES, Dataset
from daskcurv.experiment.data.decoding import Survey
from daskcurv.experiment.data.draft import Draft, Stamps
from daskcurv.experiment.data.encoded import Encoded
from daskcurv.experiment.data.prepared import (
    RECORD,
    Prepared,
    Record,
    digest_of_chunk,
)
from daskcurv.experiment.data.preprocessing import cores
from daskcurv.places import existing
from daskcurv.spread import evenly

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0

_DRAFT = "decoding"
_IN_FLIGHT = 3
_PIECE = 8
"""Images that a thread decodes at a time."""
_TIMED = 64


def size_of(dataset: Encoded) -> int:
    """Return the bytes of pixels of a data set once it is decoded."""
    return len(dataset) * math.prod(dataset.image_shape)


def decoded_before(dataset: Dataset, parent: Path) -> Dataset:
    """Return the copy that a launch has made of a large data set if there is one; else itself.

    Parameters
    ----------
    dataset : Dataset
        Of any kind.
    parent : Path
        As for `prepare_encoded`.
    """
    copy = find_copy(dataset, parent) if isinstance(dataset, Encoded) else None
    return copy or dataset


def find_copy(dataset: Encoded, parent: Path) -> Prepared | None:
    """Return the copy that was made of a data set, if its files have not changed since.

    Parameters
    ----------
    dataset : Encoded
    parent : Path
        As for `prepare_encoded`.
    """
    for path in sorted(parent.glob(f"*/{RECORD}")):
        copy = _copy(dataset, path.parent)
        try:
            record = copy.record
            alike = record is not None and _is_of(record, dataset, copy)
        except DataError as error:
            log.warning("%s", error)
            continue
        if record is None or not alike:
            continue
        stamps = Stamps(dataset, record.chunk_size)
        changed = [k for k, chunk in enumerate(record.chunks) if chunk.sources != stamps.of(k)]
        if not changed or _still_the_same(dataset, record, changed):
            return copy
        log.warning("%s: images changed since they were decoded into %s", dataset.path, path.parent)
    return None


def _copy(dataset: Encoded, directory: Path) -> Prepared:
    return Prepared(directory, dataset.mean, dataset.std, dataset.class_names, dataset.names)


def _is_of(record: Record, dataset: Encoded, copy: Prepared) -> bool:
    return (
        record.shape == (len(dataset), *dataset.image_shape)
        and record.image_size == dataset.preprocessing.image_size
        and np.array_equal(copy.labels, dataset.labels)
    )


def _still_the_same(dataset: Encoded, record: Record, changed: list[int]) -> bool:
    """Return whether chunks whose files have another time still have the same pixels."""
    log.info(
        "%s: files of %d of %d chunks of images have another size, time or name than when they "
        "were decoded; comparing their pixels",
        dataset.path,
        len(changed),
        len(record.chunks),
    )
    for number in changed:
        ids = record.ids(number, len(dataset))
        images, keys = _buffers(dataset, len(ids))
        if dataset.decode(ids, images, keys):
            return False
        if digest_of_chunk(images, keys) != record.chunks[number].pixels:
            return False
    return True


def say_preparation(dataset: Encoded, parent: Path, missing: int | None = None) -> None:
    """Log how much is to be decoded, what it takes on disk, and about how long it will take.

    Parameters
    ----------
    dataset : Encoded
    parent : Path
        As for `prepare_encoded`.
    missing : int, optional
        Images that are still to be decoded; by default all.
    """
    missing = len(dataset) if missing is None else missing
    began = time.perf_counter()
    some = evenly(len(dataset), _TIMED)
    dataset.pixels(some)
    seconds = (time.perf_counter() - began) / len(some) * missing
    log.info(
        "%s: %d of %d images are decoded onto disk before workers start: %.2f GiB in all, under "
        "%s; this takes about %s on this machine's %d cores",
        dataset.path,
        missing,
        len(dataset),
        size_of(dataset) / 2**30,
        parent,
        timedelta(seconds=round(seconds)),
        cores(),
    )


def prepare_encoded(dataset: Encoded, parent: Path) -> Prepared:
    """Decode all images into the copy that workers map, unless there is one.

    Interrupted, it goes on with the chunks that are not done. Nobody else may be doing the same.

    Parameters
    ----------
    dataset : Encoded
    parent : Path
        On a file system that the workers can read.

    Raises
    ------
    DataError
        If images cannot be decoded; they are counted and the first ones named.
    StoreWriteError
        If the disk has not enough space, or cannot be written.
    """
    if copy := find_copy(dataset, parent):
        return copy
    try:
        draft = Draft(dataset, parent / _DRAFT)
        if missing := draft.missing:
            _check_space(dataset, parent, draft)
            say_preparation(dataset, parent, sum(len(draft.ids(k)) for k in missing))
            seen = Survey(dataset.path, dataset.sources)
            seen.look(i for number in missing for i in draft.ids(number))
            if seen.failures:
                raise seen.refusal()
            seen.say_what_is_left_out()
            _decode(draft, missing)
        return _copy(dataset, draft.finish(parent, lambda chunks: _decode(draft, chunks)))
    except OSError as error:
        raise StoreWriteError(
            f"cannot write the decoded images under {parent}: {error.strerror or error}. What was "
            "decoded is kept; free space or permissions, then run the same command again"
        ) from error


def _check_space(dataset: Encoded, parent: Path, draft: Draft) -> None:
    needed = size_of(dataset) * len(draft.missing) // draft.count
    free = shutil.disk_usage(existing(parent)).free
    if needed > free:
        raise StoreWriteError(
            f"the decoded images of {dataset.path} take {size_of(dataset) / 2**30:.2f} GiB under "
            f"{parent}, {needed / 2**30:.2f} GiB more than is there, but only {free / 2**30:.2f} "
            "GiB are free. Free some space, choose another --store, or use a smaller --image_size",
            option="--store",
        )


def _buffers(dataset: Encoded, count: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    return np.empty((count, *dataset.image_shape), "u1"), np.empty((count, KEY_BYTES), "u1")


def _decode(draft: Draft, chunks: Iterable[int]) -> None:
    """Decode chunks, a few at a time, and write them in their order."""
    dataset, chunks = draft.dataset, list(chunks)
    failures: dict[int, str] = {}
    waiting: deque[tuple[int, Any, Any, list[Future[dict[int, str]]]]] = deque()
    total = len(dataset)
    pool = ThreadPoolExecutor(cores())
    progress = _Progress(total, total - sum(len(draft.ids(number)) for number in chunks))

    def finish_first() -> None:
        number, images, keys, pieces = waiting.popleft()
        failed = {i: text for piece in pieces for i, text in piece.result().items()}
        failures.update(failed)
        if not failed:
            draft.write(number, images, keys)
        progress.add(len(images))

    try:
        for number in chunks:
            ids = draft.ids(number)
            images, keys = _buffers(dataset, len(ids))
            parts = [slice(at, at + _PIECE) for at in range(0, len(ids), _PIECE)]
            pieces = [
                pool.submit(dataset.decode, ids[part], images[part], keys[part]) for part in parts
            ]
            waiting.append((number, images, keys, pieces))
            if len(waiting) == _IN_FLIGHT:
                finish_first()
        while waiting:
            finish_first()
    finally:
        pool.shutdown(cancel_futures=True)
        progress.close()
    if failures:
        raise Survey(dataset.path, dataset.sources, failures).refusal()


class _Progress:
    """A bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int):
        self._bar = tqdm(
            total=total, initial=done, desc="decoding images", unit=" images", disable=None
        )
        self._total, self._before, self._done = total, done, done
        self._began = self._logged = time.monotonic()

    def add(self, count: int) -> None:
        self._done += count
        self._bar.update(count)
        now = time.monotonic()
        if self._bar.disable and now - self._logged >= LOG_SECONDS:
            self._logged = now
            rate = (self._done - self._before) / (now - self._began)
            log.info(
                "decoding images: %d of %d, %.0f images/s, %s left",
                self._done,
                self._total,
                rate,
                timedelta(seconds=round((self._total - self._done) / rate)),
            )

    def close(self) -> None:
        self._bar.close()
