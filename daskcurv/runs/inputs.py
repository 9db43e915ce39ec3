"""The experiment that a run's options name, found and checked before anything is computed."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable
from pathlib import Path

from daskcurv.config import EstimatorConfig
from daskcurv.errors import CheckpointError, ConfigError, StoreError
from daskcurv.estimators.selection import resolve
from daskcurv.experiment.class_order import find_class_order
from daskcurv.experiment.curriculum import Curriculum
from daskcurv.experiment.data import cifar, read_dataset
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.identity import Recorded
from daskcurv.experiment.networks import Network
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.experiment.search import discover
from daskcurv.experiment.weight_files import read_state_dict
from daskcurv.places import check_writable, exists, place_for
from daskcurv.runs.options import LaunchOptions, parse_epochs
from daskcurv.storage import ResultsStore

log = logging.getLogger(__name__)


def experiment_of(options: LaunchOptions) -> Experiment:
    """Find and read what a run's options name; quick checks come first.

    From here on, the options only say where results go and what computes them. The weights are only
    looked at; `daskcurv.experiment.checkpoints.check_all` reads them through.

    Raises
    ------
    DaskcurvError
        For the first thing that cannot be used.
    """
    check_places(options)
    available = discover(options.model_dir, options.experiment_index)
    checkpoints = {epoch: available[epoch] for epoch in choose_epochs(options, available)}
    if options.download:
        cifar.download(options.data_path)
    dataset = read_dataset(options.data_path)
    if not getattr(dataset, "published", True):
        log.info(
            "%s is not the published CIFAR-100 training set (other checksum): %d samples",
            options.data_path,
            len(dataset),
        )
    first, network = _first_readable(list(checkpoints.values()))
    order, source = find_class_order(
        options.class_order, options.model_dir, options.experiment_index, network.num_classes
    )
    experiment = Experiment(
        dataset=dataset,
        checkpoints=checkpoints,
        network=network,
        curriculum=Curriculum(tuple(order.tolist()), options.schedule),
        estimator=selected(options)[0],
        head=options.head,
        experiment_index=options.experiment_index,
        validation_per_class=options.validation_per_class,
        class_order_source=source,
    )
    experiment.check(str(options.data_path), str(first))
    return experiment


def check_places(options: LaunchOptions) -> None:
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
        stored = Recorded.of(ResultsStore.open(options.store).identity)
        if stored.imported:
            raise StoreError(f"{options.store} was imported, not computed; choose another --store")
        recorded = stored.estimator
    return resolve(options.estimator, options.device, recorded)


def _first_readable(paths: list[Path]) -> tuple[Path, Network]:
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
