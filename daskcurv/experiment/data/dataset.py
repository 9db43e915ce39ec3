"""A training set: what every format gives, and what follows from it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


KEY_BYTES = 16


class Dataset:
    """A training set. A subclass gives the attributes, in whatever way; see `Arrays`.

    Attributes
    ----------
    images : ndarray of uint8, shape (N, channels, *size)
        In data-set order.
    labels : ndarray of int64, shape (N,)
        The class of each image, from 0.
    mean, std : tuple of float
        Of each channel: the normalisation of the training run, on pixels scaled to 0 … 1.
    class_names : tuple of str
        Empty if they are not known.
    names : tuple of str
        The file of each image; empty if the format has none.
    """

    if TYPE_CHECKING:
        # Only read, so a subclass can have properties. When running, these would be the defaults of
        # a dataclass's fields.
        @property
        def images(self) -> NDArray[np.uint8]:  # noqa: D102
            ...

        @property
        def labels(self) -> NDArray[np.int64]:  # noqa: D102
            ...

    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...]
    names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Channels and size of an image."""
        return self.images.shape[1:]

    def pixels(self, ids: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return some images, shape (n, channels, *size)."""
        return self.images[ids]

    def keys(self) -> NDArray[np.uint8]:
        """Return the key of each image, shape (N, 16); see `key_of`."""
        return keys_of(self.images)

    def digest(self) -> str:
        """Return the sha256 (hex) of labels and images, independent of how they are stored."""
        digest = hashlib.sha256(f"{self.images.shape}".encode())
        digest.update(np.ascontiguousarray(self.labels, dtype="<i8"))
        digest.update(np.ascontiguousarray(self.images))
        return digest.hexdigest()

    def normalise(self, images: NDArray[np.uint8]) -> Tensor:
        """Scale and standardise pixels as the training run did, without augmentation.

        Parameters
        ----------
        images : ndarray of uint8, shape (N, channels, *size)

        Returns
        -------
        Tensor of float32, shape (N, channels, *size)
        """
        import torch

        shape = (-1,) + (1,) * (images.ndim - 2)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").reshape(shape)
            for values in (self.mean, self.std)
        )
        return (torch.from_numpy(np.array(images)).to(torch.float32) / 255 - mean) / std

    def inputs(self, ids: NDArray[np.int64]) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised images, labels and ids of some samples, for a scorer."""
        import torch

        images = self.normalise(self.pixels(ids))
        return images, torch.from_numpy(self.labels[ids]), torch.from_numpy(ids)


def key_of(image: NDArray[np.uint8]) -> bytes:
    """Return the key of an image, which equal images have in common whatever data set they are in.

    BLAKE2b, with a digest of 16 bytes, of ``uint8 (3, 32, 32)`` (type and shape) and the pixels.

    Parameters
    ----------
    image : ndarray of uint8, shape (channels, *size)
    """
    digest = hashlib.blake2b(f"{image.dtype} {image.shape}".encode(), digest_size=KEY_BYTES)
    digest.update(np.ascontiguousarray(image))
    return digest.digest()


def keys_of(images: Iterable[NDArray[np.uint8]]) -> NDArray[np.uint8]:
    """Return the keys of images, shape (N, 16)."""
    return np.frombuffer(b"".join(map(key_of, images)), np.uint8).reshape(-1, KEY_BYTES)


def class_indices(where: str, labels: NDArray[Any], count: int) -> NDArray[np.int64]:
    """Return the labels of a data set.

    Parameters
    ----------
    where : str
        File and name of the array, for messages.
    labels : ndarray of integers, shape (N,)
    count : int
        Of the images.

    Raises
    ------
    DataError
        If they are something else, or any is negative.
    """
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise DataError(
            f"{where} has shape {labels.shape} and dtype {labels.dtype}; expected one class "
            f"index, an integer, for each of the {count} images"
        )
    if labels.min() < 0:
        raise DataError(f"{where} has {labels.min()}; expected indices from 0")
    return labels.astype(np.int64)


@dataclass(frozen=True, eq=False)
class Arrays(Dataset):
    """A training set in memory; attributes as of `Dataset`.

    Attributes
    ----------
    original_keys : ndarray of uint8, shape (N, 16), optional
        Keys of the images before they were resized; by default those of `images`.

    Raises
    ------
    DataError
        If the arrays do not fit each other.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    class_names: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    original_keys: NDArray[np.uint8] | None = None

    def keys(self) -> NDArray[np.uint8]:
        """Return the key of each image as it was before resizing."""
        return super().keys() if self.original_keys is None else self.original_keys

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim < 3 or images.dtype != np.uint8 or not len(images):
            raise DataError(
                f"the images have shape {images.shape} and dtype {images.dtype}; expected "
                "(N, channels, height, width), N at least 1, and uint8"
            )
        if labels.shape != (len(images),) or labels.dtype != np.int64 or labels.min() < 0:
            raise DataError(
                f"the labels have shape {labels.shape} and dtype {labels.dtype}; expected one "
                f"class index from 0, int64, for each of the {len(images)} images"
            )
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != images.shape[1]:
                raise DataError(
                    f"{name} has {len(values)} values; expected one for each of the "
                    f"{images.shape[1]} channels of the images"
                )
        if min(self.std) <= 0:
            raise DataError(f"std is {self.std}; expected numbers above 0")
