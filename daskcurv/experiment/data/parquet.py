"""Parquet tables with encoded images, such as those that Hugging Face's hub offers."""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.data.dataset import Dataset
from daskcurv.experiment.data.encoded import read_encoded
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.places import listed

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

log = logging.getLogger(__name__)

IMAGES = ("image", "img")
LABELS = ("label", "labels", "fine_label")
NAMES = ("path", "file_name", "filename", "name")
_GROUPS = 4
"""Row groups that are kept in memory."""
_MARK = b"PAR1"


def recognises(path: Path) -> bool:
    """Return whether a path is a Parquet file, or a directory of some."""
    if path.is_dir():
        return any(path.glob("*.parquet"))
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return path.suffix == ".parquet" or file.read(len(_MARK)) == _MARK


def read(path: Path, preprocessing: Preprocessing) -> Dataset:
    """Read the images and labels of a table.

    Parameters
    ----------
    path : Path
        A file, or a directory: of its files those whose names begin with ``train``, if there are
        any, in the order of their names. The table has a column of `IMAGES` with encoded images,
        and one of `LABELS` with integers; one of `NAMES` with text, or the paths that are beside
        the images, are the names of the samples.
    preprocessing : Preprocessing

    Raises
    ------
    DataError
        If no file is of a training set, or one is damaged, has no such columns or too many, or
        values are missing or cannot be used.
    """
    files = _files(path)
    tables = [_table(file) for file in files]
    rows = _Rows(tables)
    if not len(rows):
        raise DataError(f"{path} has no rows; expected one for each image")
    log.info("%s: %d images in %s", path, len(rows), listed([file.name for file in files]))
    labels = np.concatenate([table.labels for table in tables])
    class_names = next((table.class_names for table in tables if table.class_names), ())
    names = [name for table in tables for name in table.names]
    if len(names) != len(rows):
        names = []
    return read_encoded(path, rows, labels, preprocessing, class_names, tuple(names))


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


@dataclass(frozen=True)
class _Table:
    """A file: its labels and names are in memory, its images are read when they are wanted."""

    file: Path
    column: str
    starts: NDArray[np.int64]
    """First row of each row group, and the number of rows."""
    labels: NDArray[np.int64]
    names: list[str]
    class_names: tuple[str, ...]
    stamp: str

    def group(self, number: int) -> pa.ChunkedArray:
        """Return the encoded images of a row group."""
        with _opened(self.file) as opened:
            return _bytes_in(opened.read_row_group(number, columns=[self.column]).column(0))


class _Rows:
    """Images in tables; see `Sources`. Holds the row groups that were used last."""

    def __init__(self, tables: list[_Table]):
        self._tables = tables
        self._ends = np.cumsum([table.starts[-1] for table in tables])
        self._lock = Lock()
        self._kept: OrderedDict[tuple[int, int], pa.ChunkedArray] = OrderedDict()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def encoded(self, i: int) -> bytes:
        number, row = self._place(i)
        table = self._tables[number]
        group = int(np.searchsorted(table.starts, row, side="right")) - 1
        # One at a time: others wait for the same group rather than read it again.
        with self._lock:
            if (number, group) not in self._kept:
                self._kept[number, group] = table.group(group)
            self._kept.move_to_end((number, group))
            while len(self._kept) > _GROUPS:
                self._kept.popitem(last=False)
            encoded = self._kept[number, group][row - int(table.starts[group])].as_py()
        if encoded is None:
            raise ValueError("it has no value")
        return bytes(encoded)

    def called(self, i: int) -> str:
        number, row = self._place(i)
        return f"row {row} of {self._tables[number].file.name}"

    def stamp(self, i: int) -> str:
        return f"{self.called(i)} {self._tables[self._place(i)[0]].stamp}"

    def _place(self, i: int) -> tuple[int, int]:
        """Return the number of the file, and the row in it."""
        number = int(np.searchsorted(self._ends, i, side="right"))
        return number, i - int(self._ends[number] - self._tables[number].starts[-1])


@contextmanager
def _opened(file: Path) -> Iterator[ParquetFile]:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as opened:
            yield opened
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{file} cannot be read as Parquet: {error}. Replace the file") from error


def _table(file: Path) -> _Table:
    """Read the labels and names of a file, and where its images are."""
    with _opened(file) as opened:
        there = opened.schema_arrow
        image, label = (_one_of(file, columns, there.names) for columns in (IMAGES, LABELS))
        _check_images(file, there.field(image))
        # The columns come in the file's order, whatever was asked for.
        labels = opened.read(columns=[label]).select([label])
        lengths = [opened.metadata.row_group(i).num_rows for i in range(opened.num_row_groups)]
        names = _names(opened, image)
        _check_images_whole(file, opened, image)
    status = file.stat()
    return _Table(
        file,
        image,
        np.cumsum([0, *lengths]),
        _integers(file, labels),
        names,
        _class_names(labels, label),
        f"{status.st_size} {status.st_mtime_ns}",
    )


def _names(opened: ParquetFile, image: str) -> list[str]:
    """Return a name for each row, or nothing if there is none for each."""
    import pyarrow as pa
    from pyarrow import compute

    there = opened.schema_arrow
    found = [name for name in NAMES if name in there.names and _is_text(there.field(name).type)]
    kind = there.field(image).type
    if len(found) == 1:
        column = opened.read(columns=found).column(0)
    elif not found and pa.types.is_struct(kind) and _is_text(_type_in(kind, "path")):
        column = compute.struct_field(opened.read(columns=[f"{image}.path"]).column(0), "path")
    else:
        return []
    names: list[str] = [] if column.null_count else column.to_pylist()
    return names


def _is_text(kind: pa.DataType | None) -> bool:
    import pyarrow as pa

    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _type_in(kind: pa.StructType, name: str) -> pa.DataType | None:
    return next((field.type for field in kind if field.name == name), None)


def _one_of(file: Path, columns: tuple[str, ...], there: list[str]) -> str:
    found = [name for name in columns if name in there]
    if len(found) != 1:
        raise DataError(
            f"{file} has {'the columns' if found else 'no column'} "
            f"{' and '.join(found) or ' or '.join(columns)}; expected one of them. Rename or drop "
            f"columns (it has {listed(there) or 'none'})"
        )
    return found[0]


def _check_images(file: Path, field: pa.Field) -> None:
    import pyarrow as pa

    kind = _type_in(field.type, "bytes") if pa.types.is_struct(field.type) else field.type
    if kind is None or not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind)):
        raise DataError(
            f"{file}: the column {field.name} has type {field.type}; expected encoded images "
            "(PNG, JPEG), as binary or as a struct with bytes. Save the table with its images"
        )


def _check_images_whole(file: Path, opened: ParquetFile, image: str) -> None:
    """Refuse rows without an image, where the file counts them; others are noticed later."""
    absent = 0
    for number in range(opened.num_row_groups):
        group = opened.metadata.row_group(number)
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema in (image, f"{image}.bytes") and column.statistics:
                absent += column.statistics.null_count or 0
    _check_whole(file, f"{image} (as bytes)", absent, opened.metadata.num_rows)


def _bytes_in(column: pa.ChunkedArray) -> pa.ChunkedArray:
    import pyarrow as pa
    from pyarrow import compute

    return compute.struct_field(column, "bytes") if pa.types.is_struct(column.type) else column


def _integers(file: Path, table: pa.Table) -> NDArray[np.int64]:
    import pyarrow as pa

    name = table.column_names[0]
    column = table.column(0)
    if not pa.types.is_integer(column.type):
        raise DataError(
            f"{file}: the column {name} has type {column.type}; expected class indices, integers "
            "from 0. Number the classes"
        )
    _check_whole(file, name, column.null_count, len(column))
    return np.array(column.to_pylist(), np.int64)


def _check_whole(file: Path, name: str, absent: int, rows: int) -> None:
    if absent:
        raise DataError(
            f"{file}: the column {name} has no value in {absent:,} of {rows:,} "
            "rows; expected one in each. Drop those rows, or fill them"
        )


def _class_names(table: pa.Table, label: str) -> tuple[str, ...]:
    """Return the names that Hugging Face's `datasets` notes in the table; nothing without."""
    found: Any
    try:
        found = json.loads((table.schema.metadata or {})[b"huggingface"])
        found = found["info"]["features"][label]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return tuple(map(str, found)) if isinstance(found, list) else ()
