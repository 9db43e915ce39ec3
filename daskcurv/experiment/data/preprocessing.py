"""How the training run saw its images: what was done to them before the network."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Arrays, class_indices, keys_of

_LARGEST = 1.5
"""Of a mean or std on pixels scaled to 0 … 1, with room for unusual ones."""
_PIECE = 32


@dataclass(frozen=True)
class Preprocessing:
    """Normalisation and size of the images of a training run.

    Attributes
    ----------
    mean, std : tuple of float
        For each channel, or one for all: the normalisation, on pixels scaled to 0 … 1.
    image_size : int, optional
        Side of the squares to which images are resized; they stay as they are without.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int | None = None

    @classmethod
    def of(
        cls,
        path: Path,
        mean: float | Sequence[float] | None,
        std: float | Sequence[float] | None,
        image_size: int | None,
    ) -> Preprocessing:
        """Check what a user gives, before a large data set is read.

        Raises
        ------
        DataError
            If a value is missing or cannot be right.
        """
        if absent := [name for name, given in (("--mean", mean), ("--std", std)) if given is None]:
            raise DataError(
                f"{path} does not say how the training run normalised its images; give "
                f"{' and '.join(absent)}: one value for each channel, or one for all, on pixels "
                "scaled to 0 … 1"
            )
        if image_size is not None and image_size < 1:
            raise DataError(
                f"--image_size is {image_size}; expected a number of pixels, at least 1"
            )
        return cls(_checked("mean", mean), _checked("std", std), image_size)

    def normalisation(
        self, path: Path, channels: int
    ) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return mean and std of each channel.

        Raises
        ------
        DataError
            If there are other numbers of them than channels.
        """
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, channels):
                expected = f"{channels} values, or one for all channels"
                raise DataError(
                    f"--{name} has {len(values)} values, but the images of {path} have "
                    f"{channels} channel{'s' * (channels > 1)}; give "
                    f"{expected if channels > 1 else 'one value'}"
                )
        mean, std = (v * channels if len(v) == 1 else v for v in (self.mean, self.std))
        return mean, std

    def arrays(
        self,
        path: Path,
        images: NDArray[np.uint8],
        labels: NDArray[Any],
        class_names: tuple[str, ...] = (),
        names: tuple[str, ...] = (),
        keys: NDArray[np.uint8] | None = None,
    ) -> Arrays:
        """Return the training set that a format has read.

        Parameters
        ----------
        path : Path
            For messages.
        images : ndarray of uint8, shape (N, channels, height, width)
            Not resized yet, or resized already.
        labels : ndarray of integers, shape (N,)
        class_names, names : tuple of str
        keys : ndarray of uint8, shape (N, 16), optional
            Of the images before they were resized, if they were.

        Raises
        ------
        DataError
            If images, labels and normalisation do not fit each other.
        """
        if not images.size:
            raise DataError(f"{path} holds no images: their shape is {images.shape}")
        labels = class_indices(f"{path}: the array of labels", labels, len(images))
        mean, std = self.normalisation(path, images.shape[1])
        resized = self.resized(images)
        if keys is None and resized is not images:
            keys = keys_of(images)
        return Arrays(np.ascontiguousarray(resized), labels, mean, std, class_names, names, keys)

    def resized(self, images: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return images of the wanted size; the same array if they have it.

        Parameters
        ----------
        images : ndarray of uint8, shape (N, channels, height, width)
        """
        size = self.image_size
        if size is None or images.shape[2:] == (size, size):
            return images
        resized = np.empty((*images.shape[:2], size, size), np.uint8)

        def fill(ids: range) -> None:
            for i in ids:
                resized[i] = self.resized_image(images[i])

        in_threads(fill, len(images), "resizing images")
        return resized

    def resized_image(self, image: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return one image of the wanted size.

        Parameters
        ----------
        image : ndarray of uint8, shape (channels, height, width)
        """
        import torch

        if self.image_size is None:
            return image
        # Always in the same layout of memory: torch has another kernel for another one.
        pixels: NDArray[np.uint8] = self._resize(torch.tensor(np.ascontiguousarray(image))).numpy()
        return pixels

    @cached_property
    def _resize(self) -> Callable[..., Any]:
        from torchvision.transforms import v2

        size = self.image_size
        resize: Callable[..., Any] = v2.Compose(
            [v2.Resize(size, v2.InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(size)]
        )
        return resize


def in_threads(
    work: Callable[[range], None], count: int, description: str, *, quiet: bool = False
) -> None:
    """Do something for each of many images, a few at a time, with a progress bar.

    Parameters
    ----------
    work : callable
        Takes the numbers of some images.
    count : int
        Of images.
    description : str
        Of the progress bar.
    quiet : bool
        Without that.
    """
    pieces = [range(start, min(start + _PIECE, count)) for start in range(0, count, _PIECE)]
    pool = ThreadPoolExecutor(cores())
    try:
        with tqdm(total=count, desc=description, unit=" images", disable=quiet or None) as bar:
            for piece, _ in zip(pieces, pool.map(work, pieces), strict=True):
                bar.update(len(piece))
    finally:
        # After an interruption, not for the rest of the images.
        pool.shutdown(cancel_futures=True)


def cores() -> int:
    """Return how many threads can run at once."""
    return len(os.sched_getaffinity(0))


def _checked(name: str, given: float | Sequence[float] | None) -> tuple[float, ...]:
    values = tuple(map(float, np.atleast_1d(np.asarray(given, float))))
    shown = " ".join(f"{value:g}" for value in values)
    if not values or not all(map(math.isfinite, values)):
        raise DataError(f"--{name} is {shown or 'empty'}; expected finite numbers")
    if max(values) > _LARGEST:
        raise DataError(
            f"--{name} is {shown}: on the 0 … 255 scale? Give it on pixels scaled to 0 … 1 "
            f"({' '.join(f'{value / 255:.4g}' for value in values)} if it is)"
        )
    if name == "std" and min(values) <= 0:
        raise DataError(f"--std is {shown}; expected numbers above 0")
    return values
