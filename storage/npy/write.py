"""Results out, as the tree of npy files that older scripts read.

A directory is written beside and renamed, so that one that exists is whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from daskcurv.atomic import whole_directory
from daskcurv.config import check_positive
from daskcurv.errors import ConfigError, ExportError, StoreWriteError
from daskcurv.experiment.identity import Recorded
from daskcurv.places import check_writable
from daskcurv.storage import schema
from daskcurv.storage.integrity.lost import refuse_lost, refuse_lost_blocks
from daskcurv.storage.npy import layout
from daskcurv.storage.npy.layout import (
    IMPORTED_METADATA,
    METADATA,
    array_path,
    batch_factors,
    epoch_directory,
)
from daskcurv.storage.working import ResultsStore

Inactive = Literal["nan", "zero", "drop"]
INACTIVE_CHOICES: tuple[str, ...] = get_args(Inactive)


def is_exported(
    store: ResultsStore, out: Path, epoch: int, supersedes: ResultsStore | None = None
) -> bool:
    """Return whether `out` has this epoch from this store.

    Exports of the store that it supersedes, if any, are to be replaced and do not count.

    Raises
    ------
    ExportError
        If it has the epoch from somewhere else, which is not ours to replace.
    """
    target = epoch_directory(out, epoch)
    if not target.exists():
        return False
    try:
        metadata = json.loads((target / METADATA).read_text())
    except (OSError, ValueError):
        metadata = {}
    if not isinstance(metadata, dict):
        metadata = {}
    found = metadata.get("fingerprint")
    if supersedes is not None and found == supersedes.fingerprint:
        return False
    if found != store.fingerprint:
        origin = "another configuration" if found else "another program"
        raise ExportError(
            f"{target} exists and was made by {origin}; it is left alone. Move it away, or export "
            "into another directory",
            option="--save_base_dir",
        )
    checkpoint = str(store.read("checkpoint_sha256")[store.rows[epoch]])
    return bool(metadata.get("checkpoint_sha256") == checkpoint)


def export_epochs(
    store: ResultsStore, out: Path, epochs: Iterable[int] | None = None, **options: Any
) -> Iterator[int]:
    """Export epochs one by one, after checking that all of them can be.

    Parameters
    ----------
    store : ResultsStore
    out : Path
    epochs : iterable of int, optional
        By default every epoch of the store.
    **options
        As for `export_epoch`.

    Yields
    ------
    int
        Each epoch once its directory is in place.

    Raises
    ------
    ExportError
        Before anything is written, if an epoch is absent or unfinished, or its directory holds
        something else.
    StoreError
        If an epoch has lost a file.
    """
    wanted = finished_epochs(store, epochs)
    for epoch in wanted:
        is_exported(store, out, epoch)
    check_writable(out, directory=True, parents=True)
    for epoch in wanted:
        export_epoch(store, out, epoch, **options)
        yield epoch


def finished_epochs(store: ResultsStore, epochs: Iterable[int] | None) -> list[int]:
    """Return the epochs to export, by default all, after checking that they are there.

    Raises
    ------
    ExportError
        If an epoch is absent or unfinished.
    StoreError
        If one has lost a file.
    """
    wanted = sorted(store.rows) if epochs is None else list(epochs)
    if absent := [epoch for epoch in wanted if epoch not in store.rows]:
        raise ExportError(f"results store {store.path} has no epochs {absent}")
    done = store.recorded_blocks()
    if unfinished := [epoch for epoch in wanted if not done[store.rows[epoch]].all()]:
        raise ExportError(
            f"epochs {unfinished} of {store.path} are not finished; launch again to finish them, "
            "or name finished ones with --epochs"
        )
    refuse_lost(store, wanted)
    return wanted


def export_epoch(
    store: ResultsStore,
    out: Path,
    epoch: int,
    *,
    inactive: str | None = None,
    divide_by: int | None = None,
    extras: bool = False,
) -> Path:
    """Export one finished epoch.

    With nothing else asked for, an epoch that was imported is exported as the files that it was.

    Parameters
    ----------
    store : ResultsStore
    out : Path
    epoch : int
    inactive : {"nan", "zero", "drop"}, optional
        What samples of inactive classes get: NaN (the default), 0, or no entry at all. With
        ``"drop"`` the arrays are shorter, and ``per_image_sample_ids.npy`` (int64) says which
        samples they hold.
    divide_by : int, optional
        Divide as a loss averaged over this batch size would have, for comparison with results of
        older scripts: gradients and their differences by it, squares by its square.
    extras : bool
        Also write the store's other variables.

    Returns
    -------
    Path
        The epoch's directory.
    """
    names = layout.documented(store.measures)
    if extras:
        names += layout.extras(store.measures)
    kept_text = None
    if "imported" in store.attrs and inactive is None and divide_by is None and not extras:
        imported = store.attrs["imported"]
        inactive, divide_by = imported["inactive"], imported["divided_by"]
        names += tuple(imported["extras"])
        kept_text = _kept_text(store, epoch)
    inactive = inactive or "nan"
    if inactive not in INACTIVE_CHOICES:
        raise ConfigError(f"inactive is {inactive!r}; expected one of {INACTIVE_CHOICES}")
    check_positive(divide_by=divide_by)
    refuse_lost_blocks(store, [epoch])
    factors = batch_factors(store.measures, divide_by or 1)
    row = store.rows[epoch]
    active = store.read("status", row) == schema.COMPUTED
    kept = active if inactive == "drop" else np.ones_like(active)

    def column(name: str) -> NDArray[Any]:
        values = store.read(name, row)
        if name in factors:
            values = values / factors[name]
        if inactive == "zero" and values.dtype.kind == "f":
            values[~active] = 0
        result: NDArray[Any] = values[kept]
        return result

    arrays = {name: column(name) for name in names}
    arrays["labels"] = store.read("label").astype(np.int64)[kept]
    if inactive == "drop":
        arrays["sample_ids"] = np.flatnonzero(kept).astype(np.int64)
    metadata = _metadata(store, row, epoch)
    if "curvature" in arrays:
        metadata["curvature_stats"] = _statistics(arrays["curvature"][active[kept]])
    metadata.update(inactive=inactive, divided_by=divide_by or 1)

    target = epoch_directory(out, epoch)
    try:
        _write_directory(target, arrays, kept_text or _as_text(metadata))
    except OSError as error:
        raise StoreWriteError(
            f"cannot export to {target}: {error.strerror or error}. The results store is not "
            "affected; free space or permissions, then export again"
        ) from error
    return target


def _metadata(store: ResultsStore, row: int, epoch: int) -> dict[str, Any]:
    order = list(Recorded.of(store.identity).curriculum.order)
    num_active = int(store.read("num_active_classes")[row])
    return {
        "epoch": epoch,
        "total_samples": store.num_samples,
        "num_gpus": int(store.read("num_workers")[row]),
        "compute_time_seconds": float(store.read("compute_seconds")[row]),
        "allowed_classes": order[:num_active],
        "curvature_stats": None,
        "method": str(store.read("method")[row]),
        "active_samples": int((store.read("status", row) == schema.COMPUTED).sum()),
        "checkpoint": str(store.read("checkpoint")[row]),
        "checkpoint_sha256": str(store.read("checkpoint_sha256")[row]),
        "identity": store.identity,
        "fingerprint": store.fingerprint,
    }


def _as_text(metadata: dict[str, Any]) -> str:
    return json.dumps(metadata, indent=2, allow_nan=False) + "\n"


def _kept_text(store: ResultsStore, epoch: int) -> str:
    text = str(store.read(IMPORTED_METADATA)[store.rows[epoch]])
    if not text:
        raise ExportError(
            f"{IMPORTED_METADATA} of epoch {epoch} is lost in {store.path}; import the tree again"
        )
    return text


def _statistics(values: NDArray[np.float32]) -> dict[str, float | None]:
    """Return mean, population standard deviation, minimum and maximum.

    All are None if there are no samples, or if one has no finite value: JSON has no NaN.
    """
    wide = values.astype(np.float64)
    names = ("mean", "std", "min", "max")
    if not len(wide) or not np.isfinite(wide).all():
        return dict.fromkeys(names)
    return {name: float(getattr(wide, name)()) for name in names}


def _write_directory(target: Path, arrays: dict[str, NDArray[Any]], metadata: str) -> None:
    with whole_directory(target) as building:
        for name, values in arrays.items():
            np.save(array_path(building, name), values)
        (building / METADATA).write_bytes(metadata.encode())
