"""Columns of texts, whose files are looked at before Zarr decodes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import google_crc32c
import zarr
from numcodecs.zstd import decompress

_COUNT_BYTES = _CHECKSUM_BYTES = 4


def check_texts(path: Path, array: zarr.Array[Any]) -> None:
    """Check that the files of a column of texts hold as many as they should.

    A file begins with its number of texts, and the codec asks for memory for so many before it
    looks at them: gigabytes, if the file is another column's.

    Parameters
    ----------
    path : Path
        Directory of the column.
    array : zarr.Array
        One-dimensional, of texts.

    Raises
    ------
    ValueError
        Naming the file.
    """
    (expected,) = array.chunks
    for file in sorted((path / "c").glob("*")):
        if not file.name.isdigit():
            continue  # what a process that was killed has left
        stored = file.read_bytes()
        compressed, checksum = stored[:-_CHECKSUM_BYTES], stored[-_CHECKSUM_BYTES:]
        if not compressed or google_crc32c.value(compressed) != int.from_bytes(checksum, "little"):
            continue  # which Zarr says when it reads it
        count = int.from_bytes(decompress(compressed)[:_COUNT_BYTES], "little")
        if count != expected:
            raise ValueError(f"{file} holds {count} texts; expected {expected}")
