"""Training sets of encoded images: small ones are decoded at once, large ones when needed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import KEY_BYTES, Dataset, class_indices, key_of
from daskcurv.experiment.data.decoding import Sources, Survey, pixels_of, reason
from daskcurv.experiment.data.preprocessing import Preprocessing, in_threads
from daskcurv.spread import evenly

IN_MEMORY = 2**30
"""Bytes of pixels up to which a data set is decoded when it is read."""

_FIRST_LOOK = 256
"""Images whose headers say whether a data set is small."""


@dataclass(frozen=True, eq=False)
class Encoded(Dataset):
    """A training set whose images are decoded when they are asked for; attributes as of `Dataset`.

    `daskcurv.experiment.data.preparation.prepare_encoded` decodes all of them onto disk; only then
    is the digest known.

    Attributes
    ----------
    path : Path
        For messages.
    sources : Sources
    preprocessing : Preprocessing
    shape : tuple of int
        Channels, height and width of the images when they are decoded and resized.
    assumed : str, optional
        Digest to be taken for theirs as long as they are not decoded.
    """

    path: Path
    sources: Sources
    preprocessing: Preprocessing
    shape: tuple[int, ...]
    labels: NDArray[np.int64]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    assumed: str | None = None

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels and size of a decoded image."""
        return self.shape

    @property
    def images(self) -> NDArray[np.uint8]:
        """All images, decoded into memory."""
        return self.pixels(np.arange(len(self)))

    def pixels(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Decode some images, shape (n, channels, height, width).

        Raises
        ------
        DataError
            If one cannot be decoded.
        """
        images = np.empty((len(ids), *self.image_shape), np.uint8)
        seen = Survey(self.path, self.sources)

        def fill(places: range) -> None:
            part = slice(places.start, places.stop)
            seen.failures.update(self.decode(ids[part].tolist(), images[part]))

        in_threads(fill, len(ids), "decoding images", quiet=True)
        if seen.failures:
            raise seen.refusal()
        return images

    def decode(
        self,
        ids: Sequence[int],
        images: NDArray[np.uint8],
        keys: NDArray[np.uint8] | None = None,
    ) -> dict[int, str]:
        """Decode images into an array, and note their keys; return why some cannot be decoded.

        Parameters
        ----------
        ids : sequence of int
        images : ndarray of uint8, shape (n, *image_shape)
        keys : ndarray of uint8, shape (n, 16), optional
            Of the images as they are before resizing.
        """
        failures = {}
        for place, i in enumerate(ids):
            try:
                pixels = pixels_of(self.sources.encoded(i), self.image_shape[0])
                if keys is not None:
                    keys[place] = np.frombuffer(key_of(pixels), np.uint8)
                resized = self.preprocessing.resized_image(pixels)
                if resized.shape != self.image_shape:
                    height, width = resized.shape[1:]
                    raise ValueError(f"it is {height} × {width}, unlike others; give --image_size")
                images[place] = resized
            except DataError:
                raise
            except Exception as error:
                failures[i] = reason(error)
        return failures

    def digest(self) -> str:
        """Return the digest that is assumed, as the true one takes all pixels.

        Raises
        ------
        DataError
            If none is.
        """
        if self.assumed is not None:
            return self.assumed
        raise DataError(
            f"the digest of {self.path} is known once its images have been decoded, which a launch "
            "does before anything else"
        )


def read_encoded(
    path: Path,
    sources: Sources,
    labels: NDArray[np.int64],
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    names: tuple[str, ...],
) -> Dataset:
    """Return a training set of encoded images, decoded if that takes little memory.

    Parameters
    ----------
    path : Path
        For messages.
    sources : Sources
    labels : ndarray of integers, shape (N,)
    preprocessing : Preprocessing
    class_names, names : tuple of str

    Raises
    ------
    DataError
        If images cannot be decoded, as far as is known, or have several sizes that are not to be
        changed, or labels or normalisation do not fit them.
    """
    seen = Survey(path, sources)
    seen.look(evenly(len(sources), _FIRST_LOOK).tolist())
    large = seen.is_certain(preprocessing) and _bytes(seen, preprocessing) > IN_MEMORY
    if not large:
        seen.look(range(len(sources)))
    shape = seen.shape(preprocessing)
    labels = class_indices(f"{path}: the array of labels", labels, len(sources))
    mean, std = preprocessing.normalisation(path, shape[0])
    encoded = Encoded(path, sources, preprocessing, shape, labels, mean, std, class_names, names)
    if _bytes(seen, preprocessing) > IN_MEMORY:
        return encoded
    images = np.empty((len(sources), *shape), np.uint8)
    # Without resizing, the keys are those of the images, whenever they are wanted.
    keys = None if preprocessing.image_size is None else np.empty((len(sources), KEY_BYTES), "u1")

    def fill(ids: range) -> None:
        part = slice(ids.start, ids.stop)
        good = [i for i in ids if i not in seen.failures]
        if len(good) == len(ids):
            seen.failures.update(
                encoded.decode(ids, images[part], None if keys is None else keys[part])
            )
        else:  # nothing will come of the images, but all that are damaged are to be known
            seen.failures.update(encoded.decode(good, np.empty_like(images[: len(good)])))

    in_threads(fill, len(sources), "decoding images")
    if seen.failures:
        raise seen.refusal()
    seen.say_what_is_left_out()
    return preprocessing.arrays(path, images, labels, class_names, names, keys)


def _bytes(seen: Survey, preprocessing: Preprocessing) -> int:
    return len(seen.sources) * math.prod(seen.shape(preprocessing))
