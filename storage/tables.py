"""Results out as tables: one row for each epoch and each sample that is active at it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, Literal, get_args

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from pyarrow import csv, parquet
from tqdm import tqdm

from daskcurv.atomic import whole_directory, whole_file
from daskcurv.errors import ConfigError, ExportError, StoreWriteError
from daskcurv.measures import Measure
from daskcurv.places import check_writable
from daskcurv.storage import schema
from daskcurv.storage.masking import standard_error
from daskcurv.storage.npy.write import finished_epochs
from daskcurv.storage.working import ResultsStore

Format = Literal["parquet", "csv"]
FORMATS: tuple[str, ...] = get_args(Format)

_STANDARD_ERROR = schema.Variable(
    "curvature_stderr",
    ("epoch", "sample"),
    "float32",
    float("nan"),
    {"long_name": "standard error of curvature, for want of more probes", "units": "nat"},
)


def table_columns(measures: Iterable[Measure]) -> Iterator[schema.Variable]:
    """Yield the columns of a table of a store that holds these measures."""
    yield from (schema.COLUMN[name] for name in ("epoch", "sample", "label"))
    variables = {variable.name: variable for variable in schema.per_sample(measures)[:-1]}
    # The mean square of the norm is there for the standard error, which is told in its place.
    has_error = variables.pop("curvature_sq", None) and "curvature" in variables
    for name, variable in variables.items():
        yield variable
        if name == "curvature" and has_error:
            yield _STANDARD_ERROR


def _schema_of(measures: Iterable[Measure]) -> pa.Schema:
    return pa.schema(
        pa.field(
            variable.name,
            pa.from_numpy_dtype(np.dtype(variable.dtype)),
            metadata={key: str(value) for key, value in variable.attrs.items()},
        )
        for variable in table_columns(measures)
    )


def export_table(
    store: ResultsStore,
    out: Path,
    epochs: Iterable[int] | None = None,
    *,
    format: str | None = None,
    by_epoch: bool = False,
) -> None:
    """Export finished epochs, one at a time.

    The columns are `table_columns`, in the types of the store; what is NaN there has no value. In
    Parquet each epoch is a row group, and fields say what they are and in which unit.

    Parameters
    ----------
    store : ResultsStore
    out : Path
        File to write, or with `by_epoch` directory for ``epoch_0200.parquet`` …; must not exist.
    epochs : iterable of int, optional
        By default every epoch of the store.
    format : {"parquet", "csv"}, optional
        By default what the suffix of `out` says, and Parquet if it has none.
    by_epoch : bool
        A file for each epoch.

    Raises
    ------
    ExportError
        Before anything is written, if an epoch is absent or unfinished, or `out` exists.
    StoreWriteError
        If there is no space, or no permission; nothing is left of `out` then.
    """
    format = _format(out, format, by_epoch)
    wanted = finished_epochs(store, epochs)
    if out.exists():
        raise ExportError(f"{out} exists; name another path, or move it away")
    check_writable(out, directory=by_epoch, parents=True)
    labels = store.read("label")
    progress = tqdm(wanted, desc="exporting", unit=" epochs", disable=None)
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        if by_epoch:
            with whole_directory(out.absolute()) as building:
                for epoch in progress:
                    path = building / f"epoch_{epoch:04d}.{format}"
                    with path.open("wb") as file, _writer(store, file, format) as writer:
                        writer.write_table(_table(store, epoch, labels))
            return
        with (
            whole_file(out.absolute()) as draft,
            draft.open("wb") as file,
            _writer(store, file, format) as writer,
        ):
            for epoch in progress:
                writer.write_table(_table(store, epoch, labels))
    except OSError as error:
        raise StoreWriteError(
            f"cannot export to {out}: {error.strerror or error}. The results store is not "
            "affected; free space or permissions, then export again"
        ) from error


def _format(out: Path, format: str | None, by_epoch: bool) -> str:
    """Return the format of a table, which its file's name does not contradict."""
    if format is not None and format not in FORMATS:
        raise ConfigError(f"format is {format!r}; expected one of {FORMATS}")
    suffix = out.suffix.removeprefix(".").lower()
    if by_epoch or not suffix:
        return format or "parquet"
    if format is None and suffix not in FORMATS:
        raise ConfigError(f"{out} has the suffix .{suffix}; expected .parquet or .csv, or --format")
    if format is not None and suffix in FORMATS and suffix != format:
        raise ConfigError(
            f"{out} has the suffix .{suffix}, and the format is {format}; change one of them"
        )
    return format or suffix


def _writer(store: ResultsStore, file: BinaryIO, format: str) -> Any:
    # Not given a path: they leave their own files open when the disk is full.
    if format == "csv":
        return csv.CSVWriter(file, _schema_of(store.measures))
    return parquet.ParquetWriter(file, _schema_of(store.measures), compression="zstd")


def _table(store: ResultsStore, epoch: int, labels: NDArray[np.int16]) -> pa.Table:
    row = store.rows[epoch]
    active = np.flatnonzero(store.read(schema.STATUS.name, row) == schema.COMPUTED)
    columns: dict[str, NDArray[Any]] = {
        "epoch": np.full(len(active), epoch),
        "sample": active,
        "label": labels[active],
    }
    for variable in store.measured:
        columns[variable.name] = store.read(variable.name, row)[active]
    wanted = _schema_of(store.measures)
    if _STANDARD_ERROR.name in wanted.names:
        columns[_STANDARD_ERROR.name] = standard_error(
            columns["curvature"], columns["curvature_sq"], store.identity
        )
    return pa.table(
        [
            # from_pandas: NaN becomes null.
            pa.array(columns[field.name].astype(field.type.to_pandas_dtype()), from_pandas=True)
            for field in wanted
        ],
        schema=wanted,
    )
