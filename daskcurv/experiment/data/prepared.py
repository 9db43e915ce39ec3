"""The copy of a training set that workers map, whatever format it was read from."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.atomic import whole_directory
from daskcurv.errors import DataError, StoreWriteError
from daskcurv.experiment.data.dataset import Arrays, Dataset

log = logging.getLogger(__name__)


RECORD = "record.json"
"""In a copy of images that were decoded chunk by chunk."""


@dataclass(frozen=True)
class Chunk:
    """Images of a copy that were decoded together.

    Attributes
    ----------
    sources : str
        Digest of names, sizes and times of their files.
    pixels : str
        Digest of their pixels and keys.
    """

    sources: str
    pixels: str


@dataclass(frozen=True)
class Record:
    """What a copy that was decoded chunk by chunk says of itself.

    Attributes
    ----------
    sha256 : str
        Digest of the data set, as of `Dataset.digest`.
    shape : tuple of int
        Of the images.
    chunk_size : int
        Images in a chunk.
    image_size : int or None
        To which they were resized.
    chunks : list of Chunk
    """

    sha256: str
    shape: tuple[int, ...]
    chunk_size: int
    image_size: int | None
    chunks: list[Chunk]

    def ids(self, number: int, count: int) -> range:
        """Return the samples of a chunk."""
        return range(number * self.chunk_size, min((number + 1) * self.chunk_size, count))

    def to_json(self) -> str:
        """Return the record as text."""
        return json.dumps(asdict(self))

    @classmethod
    def read(cls, path: Path) -> Record:
        """Read a record; a ValueError if it is damaged."""
        try:
            found = json.loads(path.read_text())
            chunks = [Chunk(**chunk) for chunk in found["chunks"]]
            return cls(**{**found, "shape": tuple(found["shape"]), "chunks": chunks})
        except (KeyError, TypeError) as error:
            raise ValueError(f"its {path.name} is damaged") from error


def digest_of_chunk(images: NDArray[np.uint8], keys: NDArray[np.uint8]) -> str:
    """Return the digest of a chunk: of its pixels and its keys."""
    digest = hashlib.blake2b(np.ascontiguousarray(images), digest_size=16)
    digest.update(np.ascontiguousarray(keys))
    return digest.hexdigest()


@dataclass(frozen=True)
class Prepared(Dataset):
    """A copy on a file system that the workers can read; travels without its arrays.

    They are mapped when they are first used, and compared with the digest in the directory's name.
    Every reader checks it, because another machine can see other contents than the one that wrote
    it. A full-size copy takes 0.1 s and is then in memory. Of a large one, which was decoded chunk
    by chunk and has a record, each chunk is compared when it is first used.

    Attributes
    ----------
    directory : Path
        Holds ``images.npy`` and ``labels.npy``.
    """

    directory: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()

    def __reduce__(self) -> tuple[Any, ...]:
        return Prepared, (self.directory, self.mean, self.std, self.class_names)

    @cached_property
    def images(self) -> NDArray[np.uint8]:
        """Read-only memory map."""
        return self._arrays.images

    @cached_property
    def labels(self) -> NDArray[np.int64]:
        """As in memory."""
        return self._arrays.labels

    @cached_property
    def record(self) -> Record | None:
        """What was noted when it was decoded chunk by chunk; None of other copies."""
        with self._explained():
            path = self.directory / RECORD
            return Record.read(path) if path.exists() else None

    def digest(self) -> str:
        """Return the digest of the data set."""
        return super().digest() if self.record is None else self.record.sha256

    def keys(self) -> NDArray[np.uint8]:
        """Return the key of each image as it was before resizing."""
        return super().keys() if self.record is None else np.array(self._keys)

    def pixels(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return some images, shape (n, channels, height, width)."""
        if self.record is not None:
            for number in np.unique(ids // self.record.chunk_size).tolist():
                self._check(number, self.record)
        return self.images[ids]

    def _check(self, number: int, record: Record) -> None:
        if number in self._checked:
            return
        ids = record.ids(number, len(self))
        part = slice(ids.start, ids.stop)
        with self._explained():
            if digest_of_chunk(self.images[part], self._keys[part]) != record.chunks[number].pixels:
                raise ValueError(f"images {ids.start} to {ids.stop - 1} are not as written")
        self._checked.add(number)

    @cached_property
    def _checked(self) -> set[int]:
        """Chunks that were compared."""
        return set()

    @cached_property
    def _keys(self) -> NDArray[np.uint8]:
        with self._explained():
            keys: NDArray[np.uint8] = np.load(self.directory / "keys.npy", mmap_mode="r")
            return keys

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError, EOFError, DataError) as error:
            raise DataError(
                f"the workers' copy of the data set, {self.directory}, cannot be used: {error}. "
                + (
                    "Run the same command again to write it again"
                    if not (self.directory / RECORD).exists()
                    else "Remove it and run the same command again to decode the images again"
                )
            ) from error

    @cached_property
    def _arrays(self) -> Arrays:
        with self._explained():
            images = np.load(self.directory / "images.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(self.directory / "labels.npy", allow_pickle=False)
            arrays = Arrays(images, labels, self.mean, self.std)
            digest = arrays.digest() if self.record is None else self.record.sha256
            if not digest.startswith(self.directory.name):
                raise ValueError("its contents do not have the digest in its name")
            return arrays


def prepare(dataset: Dataset, parent: Path) -> Prepared:
    """Write the copy that workers map, unless an undamaged one exists.

    Parameters
    ----------
    dataset : Dataset
    parent : Path
        On a file system that the workers can read; the copy's directory is named by its digest.
    """
    if isinstance(dataset, Prepared) and dataset.directory.parent == parent:
        return dataset
    copy = Prepared(parent / dataset.digest()[:16], dataset.mean, dataset.std, dataset.class_names)
    target = copy.directory
    if target.exists():
        if _is_whole(copy):
            return copy
        log.warning("the workers' copy of the data set, %s, is damaged; writing it again", target)
    try:
        with whole_directory(target) as building:
            np.save(building / "images.npy", dataset.images)
            np.save(building / "labels.npy", dataset.labels)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write the workers' copy of the data set under {parent}: {error}"
        ) from error
    return copy


def _is_whole(copy: Prepared) -> bool:
    try:
        return len(copy) > 0
    except DataError:
        return False
