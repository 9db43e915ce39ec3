"""All inputs of a run, found and checked before anything is computed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcurv.config import EstimatorConfig, Identity, recorded_estimator
from daskcurv.errors import CheckpointError, ConfigError, DataError, StoreError
from daskcurv.estimators.probes import GENERATOR
from daskcurv.estimators.selection import recorded_as, resolve
from daskcurv.experiment.checkpoints import discover, read_state_dict
from daskcurv.experiment.class_order import find_class_order
from daskcurv.experiment.curriculum import held_out_split
from daskcurv.experiment.data import cifar as data
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.places import check_writable, exists, place_for
from daskcurv.runs.options import LaunchOptions, parse_epochs
from daskcurv.storage import ResultsStore

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Inputs:
    """A run's inputs, read and consistent with each other.

    Attributes
    ----------
    dataset : Cifar
    checkpoints : dict
        File by epoch, for the epochs to compute.
    model : ModelSpec
        The network that the first of them holds.
    class_order : ndarray of int64
    class_order_source : str
        Where the order comes from.
    estimator : EstimatorConfig
        What workers are to use; ``"auto"`` if they may fall back to direct finite differences.
    identity : dict
        The run's scientific configuration.
    """

    dataset: data.Cifar
    checkpoints: dict[int, Path]
    model: ModelSpec
    class_order: NDArray[np.int64]
    class_order_source: str
    estimator: EstimatorConfig
    identity: Identity


def gather(options: LaunchOptions) -> Inputs:
    """Find and read a run's inputs; quick checks come first.

    The weights are only looked at here; `daskcurv.experiment.checkpoints.check_all` reads them
    through.

    Raises
    ------
    DaskcurvError
        For the first thing that cannot be used.
    """
    _check_places(options)
    available = discover(options.model_dir, options.experiment_index)
    epochs = choose_epochs(options, available)
    checkpoints = {epoch: available[epoch] for epoch in epochs}
    if options.download:
        data.download(options.data_path)
    dataset = data.read_cifar(options.data_path)
    if not dataset.published:
        log.info(
            "%s is not the published CIFAR-100 training set (other checksum): %d samples",
            options.data_path,
            len(dataset),
        )
    first, model = _first_readable(list(checkpoints.values()))
    if (largest := int(dataset.labels.max())) >= model.num_classes:
        raise DataError(
            f"{options.data_path} has label {largest}, but the network of {first} has "
            f"{model.num_classes} outputs; data set and checkpoints do not belong together"
        )
    order, source = find_class_order(options, model.num_classes)
    estimator, _ = selected(options)
    return Inputs(
        dataset,
        checkpoints,
        model,
        order,
        source,
        estimator,
        _identity(options, dataset, model, order, estimator),
    )


def _check_places(options: LaunchOptions) -> None:
    """Refuse places for results that cannot be made."""
    # The lock, the workers' copy of the data and the record of the run lie beside the store.
    store = place_for(options.store)
    place = store.parent if exists(store, "results store") else store
    check_writable(place, directory=True, parents=True, option="--store")
    if options.export:
        tree = options.save_base_dir
        check_writable(tree, directory=True, parents=True, option="--save_base_dir")


def selected(options: LaunchOptions) -> tuple[EstimatorConfig, str]:
    """Return the settings that a run uses, and why; a store is continued as it began."""
    recorded = None
    if options.store.exists():
        identity = ResultsStore.open(options.store).identity
        if "imported" in identity:
            raise StoreError(f"{options.store} was imported, not computed; choose another --store")
        recorded = recorded_estimator(identity)
    return resolve(options.estimator, options.device, recorded)


def _first_readable(paths: list[Path]) -> tuple[Path, ModelSpec]:
    """Infer the network from the first file that can be read.

    Damaged ones are left to the check of all files, which lists every one of them.
    """
    for path in paths[:-1]:
        with contextlib.suppress(CheckpointError):
            return path, ModelSpec.infer(read_state_dict(path)[0])
    return paths[-1], ModelSpec.infer(read_state_dict(paths[-1])[0])


def choose_epochs(options: LaunchOptions, available: Iterable[int]) -> list[int]:
    """Return the epochs to compute, in order.

    Raises
    ------
    ConfigError
        If the epochs are not numbers, negative, repeated, or none.
    CheckpointError
        Listing every epoch without a checkpoint, unless missing ones are to be skipped.
    """
    available = set(available)
    wanted = sorted(available) if options.epochs == "all" else _requested(options)
    missing = [epoch for epoch in wanted if epoch not in available]
    if missing and not options.skip_missing:
        raise CheckpointError(
            f"{options.model_dir} has no checkpoint of experiment index "
            f"{options.experiment_index} for {len(missing)} of {len(wanted)} epochs: "
            f"{', '.join(map(str, missing))}. Name other --epochs (or all), or add --skip_missing"
        )
    if missing:
        log.info("skipping %d epochs without a checkpoint: %s", len(missing), missing)
    chosen = [epoch for epoch in wanted if epoch in available]
    if not chosen:
        raise CheckpointError(
            f"none of the {len(wanted)} requested epochs has a checkpoint in {options.model_dir}"
        )
    return chosen


def _requested(options: LaunchOptions) -> list[int]:
    if options.epochs is not None:
        return parse_epochs(options.epochs)
    if options.start_epoch < 0 or options.end_epoch < options.start_epoch or options.step < 1:
        raise ConfigError(
            f"start_epoch {options.start_epoch}, end_epoch {options.end_epoch}, step "
            f"{options.step} name no epochs; expected 0 <= start_epoch <= end_epoch and step >= 1"
        )
    return list(range(options.start_epoch, options.end_epoch + 1, options.step))


def _identity(
    options: LaunchOptions,
    dataset: data.Cifar,
    model: ModelSpec,
    order: NDArray[np.int64],
    estimator: EstimatorConfig,
) -> Identity:
    return {
        "estimator": {**recorded_as(estimator).to_dict(), "probes": GENERATOR},
        "head": options.head,
        "model": model.to_dict(),
        "dataset": {
            "sha256": dataset.digest(),
            "num_samples": len(dataset),
            "mean": list(data.MEAN),
            "std": list(data.STD),
            "validation_per_class": options.validation_per_class,
        },
        "classes": {"order": order.tolist(), **options.schedule.to_dict()},
        "experiment_index": options.experiment_index,
    }


def sample_columns(inputs: Inputs, options: LaunchOptions) -> Mapping[str, NDArray[np.generic]]:
    """Return the store's per-sample coordinates."""
    labels = inputs.dataset.labels
    position = np.argsort(inputs.class_order)[labels]
    first_active = options.schedule.first_epoch_active(len(inputs.class_order))
    return {
        "sample": np.arange(len(labels)),
        "label": labels,
        "split": held_out_split(labels, options.validation_per_class),
        "class_position": position,
        "first_epoch_active": first_active[position],
    }
