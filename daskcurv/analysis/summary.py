"""Every analysis of a results store at once, and the files it is kept in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.analysis import groups, per_sample
from daskcurv.analysis.agreement import agreement, auroc, auroc_interval, rank_correlation
from daskcurv.errors import DataError, ExportError, StoreWriteError
from daskcurv.files import whole_directory
from daskcurv.storage.group import consolidate

LOSS_THRESHOLD = 0.1
"""In nats: a loss that leaves the right class a probability of 0.9."""

RANKED = (
    "csl", "cumulative_curvature", "cumulative_grad_norm", "learning_time", "forgetting_events",
)  # fmt: skip
"""Per-sample numbers that are compared with each other, and with what is known from elsewhere."""

_GROUPED = ("curvature", "loss", "grad_norm")


def summarise(dataset: xr.Dataset) -> xr.Dataset:
    """Apply every analysis.

    Parameters
    ----------
    dataset : xarray.Dataset
        As opened by `daskcurv.open_results`; with ``chunks={}`` if it does not fit into memory.

    Returns
    -------
    xarray.Dataset
        In memory. By sample: ``csl`` and ``mean_loss``, the same of curvature and gradient norm,
        ``learning_time`` (squared norms) and ``learning_time_plain``, ``threshold_learning_time``
        of the loss, ``forgetting_events``, ``ever_learned``, ``active_epochs``. By group and
        epoch: curvature, loss and gradient norm ``_by_class``, ``_by_cohort`` and ``_by_split``,
        and the ``_change`` of each cohort at task boundaries. And ``rank_correlation``.
    """
    lazy = {
        "active_epochs": per_sample.active_epochs(dataset),
        "csl": per_sample.cumulative(dataset, "loss"),
        "mean_loss": per_sample.mean_over_active_epochs(dataset, "loss"),
        "learning_time": per_sample.learning_time(dataset, "squared"),
        "learning_time_plain": per_sample.learning_time(dataset, "plain"),
        "threshold_learning_time": per_sample.threshold_learning_time(dataset, LOSS_THRESHOLD),
        **per_sample.forgetting_events(dataset),
    }
    for name in ("curvature", "grad_norm"):
        lazy[f"cumulative_{name}"] = per_sample.cumulative(dataset, name)
        lazy[f"mean_{name}"] = per_sample.mean_over_active_epochs(dataset, name)
    for name in _GROUPED:
        lazy[f"{name}_by_class"] = groups.by_class(dataset, name)
        lazy[f"{name}_by_cohort"] = groups.by_cohort(dataset, name)
        lazy[f"{name}_by_split"] = groups.by_split(dataset, name)
        lazy[f"{name}_change"] = groups.boundary_changes(dataset, name)
    summary = xr.Dataset(lazy).compute()
    summary["rank_correlation"] = rank_correlation(summary[list(RANKED)])
    return summary


def compare(
    summary: xr.Dataset,
    flagged: NDArray[np.bool_] | None = None,
    scores: NDArray[np.float64] | None = None,
) -> dict[str, Any]:
    """Hold the per-sample numbers of a summary against what is known from elsewhere.

    Parameters
    ----------
    summary : xarray.Dataset
        Of `summarise`.
    flagged : ndarray of bool, shape (N,), optional
        Samples that are to be found, such as those with a wrong label.
    scores : ndarray of float64, shape (N,), optional
        Scores of the same samples, such as published memorization scores.

    Returns
    -------
    dict
        JSON-able: for each of `RANKED`, under ``auroc`` the area with its 95 % bootstrap interval,
        and under ``agreement`` what `daskcurv.analysis.agreement` gives.
    """
    found: dict[str, Any] = {}
    if flagged is not None:
        found["flagged"] = int(flagged.sum())
        found["auroc"] = {
            name: {
                "area": auroc(summary[name].values, flagged),
                "interval": auroc_interval(summary[name].values, flagged),
            }
            for name in RANKED
        }
    if scores is not None:
        found["agreement"] = {
            name: {
                key: value.tolist() if isinstance(value, np.ndarray) else value
                for key, value in asdict(agreement(summary[name].values, scores)).items()
            }
            for name in RANKED
        }
    return found


def write_summary(
    summary: xr.Dataset, out: Path, run: int, epochs: list[int], compared: Mapping[str, Any]
) -> None:
    """Write a summary: as a Zarr store, and as the npy files of an older pipeline.

    ``analysis.zarr`` holds all of it. ``csl_cifar100_run{i}_noise_{noise}.npy`` (float32, the sum
    of losses), ``lt_…npy`` (float32, the learning time by plain norms) and ``metrics_…json`` have
    the names, and the last the fields, that scripts for an earlier pipeline look for; its noise
    level is 0 here.

    Parameters
    ----------
    summary : xarray.Dataset
        Of `summarise`.
    out : Path
        Directory; must not exist.
    run : int
        Number of the run, in the file names.
    epochs : list of int
    compared : mapping
        Of `compare`; added to the metrics.

    Raises
    ------
    ExportError
        If `out` exists.
    StoreWriteError
    """
    if out.exists():
        raise ExportError(f"{out} exists; name another directory, or move it away")
    name = f"cifar100_run{run}_noise_0.0"
    shape = [len(epochs), summary.sizes["sample"]]
    metrics = {
        "dataset": "cifar100",
        "run_idx": run,
        "noise_level": 0.0,
        "kept_epochs": epochs,
        "num_epochs": len(epochs),
        "losses_shape": shape,
        "loss_grads_shape": shape,
        "csl_path": f"csl_{name}.npy",
        "lt_path": f"lt_{name}.npy",
        "tau": summary.learning_time_plain.attrs["tau"],
        "tau_squared": summary.learning_time.attrs["tau"],
        **compared,
    }
    try:
        with whole_directory(out.absolute()) as building:
            texts = {
                name: values.astype(object)
                for name, values in summary.coords.items()
                if values.dtype.kind == "U"
            }
            summary.assign_coords(texts).to_zarr(
                building / "analysis.zarr", zarr_format=3, consolidated=False
            )
            consolidate(building / "analysis.zarr")
            np.save(building / f"csl_{name}.npy", summary.csl.values.astype(np.float32))
            lt = summary.learning_time_plain.values.astype(np.float32)
            np.save(building / f"lt_{name}.npy", lt)
            (building / f"metrics_{name}.json").write_text(_as_json(metrics))
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


def read_flags(path: Path, num_samples: int) -> NDArray[np.bool_]:
    """Read which samples are flagged from an npy or CSV file.

    The file has either 1 or 0 for each sample, in data-set order, or the numbers of those flagged.

    Raises
    ------
    DataError
        If the file cannot be read, or does not fit.
    """
    values = _read_numbers(path, f"({num_samples},) of 1 and 0, or the flagged samples' numbers")
    if values.shape == (num_samples,) and np.isin(values, (0, 1)).all():
        return np.asarray(values == 1)
    if values.ndim != 1 or not np.isin(values, np.arange(num_samples)).all():
        raise DataError(
            f"{path} has shape {values.shape} and numbers that are not of samples; expected "
            f"({num_samples},) of 1 and 0, or numbers from 0 to {num_samples - 1}"
        )
    flagged = np.zeros(num_samples, bool)
    flagged[values.astype(int)] = True
    return flagged


def read_scores(path: Path, num_samples: int) -> NDArray[np.float64]:
    """Read one number per sample, in data-set order, from an npy or CSV file.

    A CSV file has one number per line, or ``sample,number``, and perhaps a line of names first.
    Samples that it does not list are NaN.

    Raises
    ------
    DataError
        If the file cannot be read, or does not fit.
    """
    values = _read_numbers(path, f"({num_samples},), or lines of sample,number")
    if values.ndim == 2 and values.shape[1] == 2:
        places, numbers = values.T
        values = np.full(num_samples, np.nan)
        if not np.isin(places, np.arange(num_samples)).all():
            raise DataError(f"{path} has samples other than 0 to {num_samples - 1}")
        values[places.astype(int)] = numbers
    if values.shape != (num_samples,):
        raise DataError(
            f"{path} has shape {values.shape}; expected ({num_samples},), one number per sample in "
            "data-set order"
        )
    return values


def _read_numbers(path: Path, expected: str) -> NDArray[np.float64]:
    try:
        if path.suffix == ".npy":
            return np.asarray(np.load(path, allow_pickle=False), np.float64)
        lines = path.read_text().split()
        has_names = any(character.isalpha() for character in lines[0].replace("nan", ""))
        rows = np.array([line.split(",") for line in lines[has_names:]], np.float64)
    except (OSError, ValueError, IndexError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected numbers: {expected}") from error
    return rows[:, 0] if rows.shape[1] == 1 else rows
