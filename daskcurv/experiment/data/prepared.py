"""The copy of a training set that workers map, whatever format it was read from."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.atomic import whole_directory
from daskcurv.errors import DataError, StoreWriteError
from daskcurv.experiment.data.dataset import Arrays, Dataset

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Prepared(Dataset):
    """A copy on a file system that the workers can read; travels without its arrays.

    They are mapped when they are first used, and compared with the digest in the directory's name.
    Every reader checks it, because another machine can see other contents than the one that wrote
    it. A full-size copy takes 0.1 s and is then in memory.

    Attributes
    ----------
    directory : Path
        Holds ``images.npy`` and ``labels.npy``.
    """

    directory: Path
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()

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
    def _arrays(self) -> Arrays:
        try:
            images = np.load(self.directory / "images.npy", mmap_mode="r", allow_pickle=False)
            labels = np.load(self.directory / "labels.npy", allow_pickle=False)
            arrays = Arrays(images, labels, self.mean, self.std)
            if not arrays.digest().startswith(self.directory.name):
                raise ValueError("its contents do not have the digest in its name")
        except (OSError, ValueError, EOFError, DataError) as error:
            raise DataError(
                f"the workers' copy of the data set, {self.directory}, cannot be used: {error}. "
                "Run the same command again to write it again"
            ) from error
        return arrays


def prepare(dataset: Dataset, parent: Path) -> Prepared:
    """Write the copy that workers map, unless an undamaged one exists.

    Parameters
    ----------
    dataset : Dataset
    parent : Path
        On a file system that the workers can read; the copy's directory is named by its digest.
    """
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
