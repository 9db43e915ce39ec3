"""Image files and images in tables: what their headers say, and their pixels.

Headers are looked at first, so that images that do not fit each other are known before hours are
spent on them.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

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


class Sources(Protocol):
    """Encoded images, in data-set order; at least one."""

    def __len__(self) -> int: ...

    def encoded(self, i: int) -> Path | bytes:
        """Return the image of a number, or the file that it is in."""
        ...

    def called(self, i: int) -> str:
        """Name the image of a number, for messages."""
        ...

    def stamp(self, i: int) -> str:
        """Return what is another text if the image may have changed: name, size and time."""
        ...


@dataclass(frozen=True)
class _Header:
    size: tuple[int, int]
    """Height and width."""
    grey: bool
    transparent: bool


@dataclass(frozen=True)
class Survey:
    """What the headers say of the images that were looked at.

    Attributes
    ----------
    path : Path
        The data set, for messages.
    sources : Sources
    failures : dict
        By number of the image: why it cannot be decoded.
    """

    path: Path
    sources: Sources
    failures: dict[int, str] = field(default_factory=dict)
    _headers: dict[int, _Header] = field(default_factory=dict)
    _kinds: dict[_Header, _Header] = field(default_factory=dict)

    def look(self, ids: Iterable[int]) -> None:
        """Look at the headers of images that were not looked at yet."""
        from PIL import Image

        Image.init()  # Loads its decoders: not in several threads at once.
        new = [i for i in ids if i not in self._headers and i not in self.failures]

        def look_at(places: range) -> None:
            for i in new[places.start : places.stop]:
                try:
                    header = _header(self.sources.encoded(i))
                    # One object for all that are equal: there can be millions of images.
                    self._headers[i] = self._kinds.setdefault(header, header)
                except DataError:
                    raise
                # A damaged image can raise nearly anything, and all of it means the same here.
                except Exception as error:
                    self.failures[i] = reason(error)

        in_threads(look_at, len(new), "looking at images")

    def is_certain(self, preprocessing: Preprocessing) -> bool:
        """Whether the images that were not looked at cannot change `shape`, if they can be used."""
        sizes = {header.size for header in self._headers.values()}
        one_size = preprocessing.image_size is not None or len(sizes) == 1
        return not self.failures and one_size and self._channels == 3

    def shape(self, preprocessing: Preprocessing) -> tuple[int, int, int]:
        """Return channels, height and width of all images: one channel if all are grey, else three.

        Raises
        ------
        DataError
            If none can be decoded, they have several sizes that are not to be changed, or the
            normalisation is of another number of channels.
        """
        if not self._headers:
            raise self.refusal()
        size = preprocessing.image_size
        height, width = (size, size) if size else self._common_size()
        preprocessing.normalisation(self.path, self._channels)
        return self._channels, height, width

    @property
    def _channels(self) -> int:
        return 1 if all(header.grey for header in self._headers.values()) else 3

    def _common_size(self) -> tuple[int, int]:
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i in sorted(self._headers):
            by_size[self._headers[i].size].append(i)
        if len(by_size) > 1:
            common = sorted(by_size.items(), key=lambda item: -len(item[1]))
            sizes = [
                f"{height} × {width} ({len(ids):,}, such as {self.sources.called(ids[0])})"
                for (height, width), ids in common
            ]
            raise DataError(
                f"the images of {self.path} have {len(sizes)} sizes (height × width): "
                f"{listed(sizes)}; expected one. Give --image_size, the side of the squares to "
                "which they are resized and cropped, as the training run did"
            )
        return next(iter(by_size))

    def refusal(self) -> DataError:
        """Return the error that names the first images that cannot be decoded."""
        failures = self.failures
        first = [f"{self.sources.called(i)} ({failures[i]})" for i in sorted(failures)[:_SHOWN]]
        more = f" and {len(failures) - _SHOWN:,} more" if len(failures) > _SHOWN else ""
        return DataError(
            f"{len(failures):,} of the {len(self.sources):,} images of {self.path} cannot be "
            f"decoded: {', '.join(first)}{more}. Replace them, or take them out of the data set"
        )

    def say_what_is_left_out(self) -> None:
        """Log how many images are transparent."""
        if transparent := sum(header.transparent for header in self._headers.values()):
            log.info("%s: the transparency of %d images is left out", self.path, transparent)


def pixels_of(source: Path | bytes, channels: int) -> NDArray[np.uint8]:
    """Return the pixels of an image, (channels, height, width).

    Of an animated image the first frame counts. Transparency is left out and orientation marks are
    not followed, as by torchvision's data sets.
    """
    with _open(source) as image:
        if channels == 1:
            return np.array(image.convert("L"))[None]
        # Pillow warns if a transparent palette is not first converted to what can represent it.
        whole = image.convert("RGBA") if image.mode in ("P", "PA") else image
        return np.array(whole.convert("RGB")).transpose(2, 0, 1)


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


def reason(error: Exception) -> str:
    """Return why an image cannot be decoded, without its path."""
    from PIL import UnidentifiedImageError

    # Its own text ends with the whole path or the address of a buffer.
    if isinstance(error, UnidentifiedImageError):
        return f"it is none of {', '.join(_FORMATS)}"
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or repr(error)
