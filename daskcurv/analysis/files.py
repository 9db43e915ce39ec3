"""The files that an analysis is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from daskcurv.atomic import whole_directory
from daskcurv.errors import ExportError, StoreWriteError
from daskcurv.experiment.identity import Recorded
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.group import consolidate

_CIFAR100 = {"classes": 100, "samples of each": 500}


@dataclass(frozen=True)
class Naming:
    """What the files of an analysis are called, and what they say of the data.

    Attributes
    ----------
    suffix : str
        Of the file names, after ``csl_``, ``lt_`` and ``metrics_``.
    fields : dict
        ``dataset``, ``run_idx`` and ``noise_level`` of the metrics; None where not known.
    """

    suffix: str
    fields: dict[str, Any]


def naming(dataset: xr.Dataset, store: Path) -> Naming:
    """Choose the names by what a store holds.

    A store that a launch computed from all of CIFAR-100 (100 classes with 500 samples each) has the
    names that scripts for an earlier pipeline look for, ``cifar100_run{i}_noise_0.0`` with the
    experiment index i. Any other is named after the store, ``curvature`` for ``curvature.zarr``,
    and its data set is given by the digest on record.

    Parameters
    ----------
    dataset : xarray.Dataset
        As opened by `daskcurv.open_results`.
    store : Path
        Where it was opened.
    """
    recorded = Recorded.of(identity_of(dataset))
    run = recorded.experiment_index
    _, sizes = np.unique(dataset.label.values, return_counts=True)
    whole = len(sizes) == _CIFAR100["classes"] and (sizes == _CIFAR100["samples of each"]).all()
    if run is not None and whole:
        fields = {"dataset": "cifar100", "run_idx": run, "noise_level": 0.0}
        return Naming(f"cifar100_run{run}_noise_0.0", fields)
    digest = recorded.dataset.get("sha256")
    fields = {
        "dataset": f"sha256:{digest}" if digest else None,
        "run_idx": run,
        "noise_level": None,
    }
    return Naming(store.absolute().stem, fields)


def write_summary(
    summary: xr.Dataset,
    out: Path,
    name: Naming,
    epochs: list[int],
    compared: Mapping[str, Any],
) -> None:
    """Write a summary: as a Zarr store, and as the npy files of an older pipeline.

    ``analysis.zarr`` holds all of it. ``csl_….npy`` (float32, the sum of losses), ``lt_….npy``
    (float32, the learning time by plain norms) and ``metrics_….json`` have the fields that scripts
    for an earlier pipeline look for. The metrics also say which epochs count, and how many values
    were left out.

    Parameters
    ----------
    summary : xarray.Dataset
        Of `daskcurv.analysis.summary.summarise`.
    out : Path
        Directory; must not exist.
    name : Naming
    epochs : list of int
    compared : mapping
        Of `daskcurv.analysis.summary.compare_with_known`; added to the metrics.

    Raises
    ------
    ExportError
        If `out` exists.
    StoreWriteError
    """
    if out.exists():
        raise ExportError(f"{out} exists; name another directory, or move it away")
    shape = [len(epochs), summary.sizes["sample"]]
    metrics = {
        **name.fields,
        "kept_epochs": epochs,
        "num_epochs": len(epochs),
        "epochs_counted": summary.attrs["epochs"],
        "values_counted": int(summary.active_epochs.sum()),
        "values_left_out": int(summary.untrained_epochs.sum()),
        "losses_shape": shape,
        "loss_grads_shape": shape,
        "csl_path": f"csl_{name.suffix}.npy",
        "lt_path": f"lt_{name.suffix}.npy",
        "tau": summary.learning_time_plain.attrs["tau"],
        "tau_squared": summary.learning_time.attrs["tau"],
        **compared,
    }
    try:
        with whole_directory(out.absolute()) as building:
            texts = {
                name: values.astype(object)
                for name, values in summary.coords.items()
                if values.dtype.kind in "UT"
            }
            summary.assign_coords(texts).to_zarr(
                building / "analysis.zarr", zarr_format=3, consolidated=False
            )
            consolidate(building / "analysis.zarr")
            np.save(building / metrics["csl_path"], summary.csl.values.astype(np.float32))
            lt = summary.learning_time_plain.values.astype(np.float32)
            np.save(building / metrics["lt_path"], lt)
            (building / f"metrics_{name.suffix}.json").write_text(_as_json(metrics))
    except OSError as error:
        raise StoreWriteError(
            f"cannot write {out}: {error.strerror or error}; free space or permissions, then run "
            "the same command again"
        ) from error


def _as_json(metrics: Mapping[str, Any]) -> str:
    """Return JSON, in which what is not a number is null."""

    def plain(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: plain(part) for key, part in value.items()}
        if isinstance(value, list | tuple):
            return [plain(part) for part in value]
        return None if isinstance(value, float) and not np.isfinite(value) else value

    return json.dumps(plain(metrics), indent=2, allow_nan=False) + "\n"
