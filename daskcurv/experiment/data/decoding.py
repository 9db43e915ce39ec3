"""Image files and images in tables, decoded in threads.

Their headers are looked at first, so that images that do not fit each other are known before hours
are spent on them, and each image is decoded into its place in one array.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.preprocessing import Preprocessing, in_threads
from daskcurv.places import listed

if TYPE_CHECKING:
    from PIL.Image import Image

log = logging.getLogger(__name__)

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".tif", ".tiff"}
_FORMATS = ["PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF"]
_GREY = {"1", "L", "LA", "La"}
_SHOWN = 3


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    """Height and width."""
    grey: bool
    transparent: bool


def decode(
    path: Path,
    sources: Sequence[Path] | Sequence[bytes],
    name_of: Callable[[int], str],
    preprocessing: Preprocessing,
) -> NDArray[np.uint8]:
    """Decode images, and resize them if that is wanted.

    Of an animated image the first frame counts. Transparency is left out and orientation marks are
    not followed, as by torchvision's data sets.

    Parameters
    ----------
    path : Path
        The data set, for messages.
    sources : sequence of Path or of bytes
        Encoded images, at least one.
    name_of : callable
        Names the image of a number, for messages.
    preprocessing : Preprocessing

    Returns
    -------
    ndarray of uint8, shape (N, channels, height, width)
        One channel if all images are grey, else three.

    Raises
    ------
    DataError
        If images cannot be decoded, or have several sizes that are not to be changed.
    """
    from PIL import Image

    Image.init()  # Loads its decoders: not in several threads at once.
    failures: dict[int, str] = {}
    headers: dict[int, _Header] = {}

    def look(ids: range) -> None:
        for i in ids:
            try:
                headers[i] = _header(sources[i])
            # A damaged image can raise nearly anything, and all of it means the same here.
            except Exception as error:
                failures[i] = _reason(error)

    in_threads(look, len(sources), "looking at images")
    if not headers:
        raise _undecodable(path, failures, len(sources), name_of)
    size = preprocessing.image_size
    height, width = (size, size) if size else _common_size(path, headers, name_of)
    channels = 1 if all(header.grey for header in headers.values()) else 3
    # Wrong numbers of channels are noticed before the images are decoded.
    preprocessing.normalisation(path, channels)
    shape = (len(sources), channels, height, width)
    try:
        images = np.empty(shape, np.uint8)
    except MemoryError as error:
        raise DataError(
            f"the images of {path} do not fit into memory: they take "
            f"{np.prod(shape, dtype=float) / 2**30:,.0f} GiB as pixels. Use a smaller "
            "--image_size, fewer images or a machine with more memory"
        ) from error

    def fill(ids: range) -> None:
        for i in ids:
            if i not in headers:
                continue
            try:
                pixels = _pixels(sources[i], channels)
            except Exception as error:
                failures[i] = _reason(error)
            else:
                images[i] = preprocessing.resized_image(pixels)

    in_threads(fill, len(sources), "decoding images")
    if failures:
        raise _undecodable(path, failures, len(sources), name_of)
    if transparent := sum(header.transparent for header in headers.values()):
        log.info("%s: the transparency of %d images is left out", path, transparent)
    return images


def _open(source: Path | bytes) -> Image:
    from PIL import Image

    return Image.open(BytesIO(source) if isinstance(source, bytes) else source, formats=_FORMATS)


def _header(source: Path | bytes) -> _Header:
    with _open(source) as image:
        if image.mode.startswith("I") or image.mode == "F":
            raise ValueError("it has more than 8 bits a pixel; convert it to 8")
        return _Header(
            (image.height, image.width), image.mode in _GREY, image.has_transparency_data
        )


def _pixels(source: Path | bytes, channels: int) -> NDArray[np.uint8]:
    """Return the pixels of an image, (channels, height, width)."""
    with _open(source) as image:
        if channels == 1:
            return np.array(image.convert("L"))[None]
        # Pillow warns if a transparent palette is not first converted to what can represent it.
        whole = image.convert("RGBA") if image.mode in ("P", "PA") else image
        return np.array(whole.convert("RGB")).transpose(2, 0, 1)


def _common_size(
    path: Path, headers: dict[int, _Header], name_of: Callable[[int], str]
) -> tuple[int, int]:
    """Return height and width of all images."""
    by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i in sorted(headers):
        by_size[headers[i].size].append(i)
    if len(by_size) > 1:
        common = sorted(by_size.items(), key=lambda item: -len(item[1]))
        sizes = [
            f"{height} × {width} ({len(ids):,}, such as {name_of(ids[0])})"
            for (height, width), ids in common
        ]
        raise DataError(
            f"the images of {path} have {len(sizes)} sizes (height × width): {listed(sizes)}; "
            "expected one. Give --image_size, the side of the squares to which they are resized "
            "and cropped, as the training run did"
        )
    return next(iter(by_size))


def _reason(error: Exception) -> str:
    from PIL import UnidentifiedImageError

    # Its own text ends with the whole path or the address of a buffer.
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(_FORMATS)}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)


def _undecodable(
    path: Path, failures: dict[int, str], count: int, name_of: Callable[[int], str]
) -> DataError:
    first = [f"{name_of(i)} ({failures[i]})" for i in sorted(failures)[:_SHOWN]]
    more = f" and {len(failures) - _SHOWN:,} more" if len(failures) > _SHOWN else ""
    return DataError(
        f"{len(failures):,} of the {count:,} images of {path} cannot be decoded: "
        f"{', '.join(first)}{more}. Replace them, or take them out of the data set"
    )
