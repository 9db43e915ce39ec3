"""Parquet tables with encoded images, such as those that Hugging Face's hub offers."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Arrays
from daskcurv.experiment.data.decoding import decode
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import listed

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")
_MARK = b"PAR1"


def recognises(path: Path) -> bool:
    """Return whether a path is a Parquet file, or a directory of some."""
    if path.is_dir():
        return any(path.glob("*.parquet"))
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".parquet" or file.read(len(_MARK)) == _MARK


def read(path: Path, preprocessing: Preprocessing) -> Arrays:
    """Read the images and labels of a table.

    Parameters
    ----------
    path : Path
        A file, or a directory: of its files those whose names begin with ``train``, if there are
        any, in the order of their names. The table has a column of `IMAGES` with encoded images,
        and one of `LABELS` with integers.
    preprocessing : Preprocessing

    Raises
    ------
    DataError
        If no file is of a training set, or one is damaged, has no such columns or too many, or
        values are missing or cannot be used.
    """
    files = _files(path)
    sources: list[bytes] = []
    labels: list[int] = []
    names: list[str] = []
    class_names: tuple[str, ...] = ()
    for file in files:
        table = _table(file)
        some = _encoded(file, table)
        labels += _integers(file, table)
        sources += some
        names += [f"row {row} of {file.name}" for row in range(len(some))]
        class_names = class_names or _class_names(table)
    if not sources:
        raise DataError(f"{path} has no rows; expected one for each image")
    log.info("%s: %d images in %s", path, len(sources), listed([file.name for file in files]))
    images = decode(path, sources, names.__getitem__, preprocessing)
    return preprocessing.arrays(path, images, np.array(labels, np.int64), class_names)


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("*.parquet"))
    if training := [file for file in files if file.name.startswith("train")]:
        if others := [file.name for file in files if file not in training]:
            log.info("%s: the training set is in train*; not read: %s", path, listed(others))
        return training
    if others := [file.name for file in files if file.name.startswith(("test", "val"))]:
        raise DataError(
            f"{path} has {listed(others)}, but no file of a training set, whose name begins with "
            "train. Put it there, or point --data_path at one file"
        )
    return files


def _table(file: Path) -> pa.Table:
    """Return the column of images and that of labels."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            there = opened.schema_arrow.names
            wanted = [_one_of(file, columns, there) for columns in (IMAGES, LABELS)]
            # The columns come in the file's order, whatever was asked for.
            return opened.read(columns=wanted).select(wanted)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}. Replace the file") from error


def _one_of(file: Path, columns: tuple[str, ...], there: list[str]) -> str:
    found = [name for name in columns if name in there]
    if len(found) != 1:
        raise DataError(
            f"{file} has {'the columns' if found else 'no column'} "
            f"{' and '.join(found) or ' or '.join(columns)}; expected one of them. Rename or drop "
            f"columns (it has {listed(there) or 'none'})"
        )
    return found[0]


def _encoded(file: Path, table: pa.Table) -> list[bytes]:
    import pyarrow as pa
    from pyarrow import compute

    name = table.column_names[0]
    column = table.column(0)
    if pa.types.is_struct(column.type) and "bytes" in [field.name for field in column.type]:
        column = compute.struct_field(column, "bytes")
    if not (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
        raise DataError(
            f"{file}: the column {name} has type {table.column(0).type}; expected encoded images "
            "(PNG, JPEG), as binary or as a struct with bytes. Save the table with its images"
        )
    _check_whole(file, f"{name} (as bytes)", column)
    encoded: list[bytes] = column.to_pylist()
    return encoded


def _integers(file: Path, table: pa.Table) -> list[int]:
    import pyarrow as pa

    name = table.column_names[1]
    column = table.column(1)
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"{file}: the column {name} has type {column.type}; expected class indices, integers "
            "from 0. Number the classes"
        )
    _check_whole(file, name, column)
    integers: list[int] = column.to_pylist()
    return integers


def _check_whole(file: Path, name: str, column: pa.ChunkedArray) -> None:
    if column.null_count:
        raise DataError(
            f"{file}: the column {name} has no value in {column.null_count:,} of {len(column):,} "
            "rows; expected one in each. Drop those rows, or fill them"
        )


def _class_names(table: pa.Table) -> tuple[str, ...]:
    """Return the names that Hugging Face's `datasets` notes in the table; nothing without."""
    found: Any
    try:
        found = json.loads((table.schema.metadata or {})[b"huggingface"])
        found = found["info"]["features"][table.column_names[1]]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()
