"""The experiment that a run's options name, found and checked before anything is computed."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from daskcurv.config import EstimatorConfig
from daskcurv.errors import CheckpointError, ConfigError, StoreError
from daskcurv.estimators.selection import resolve
from daskcurv.experiment.data import Dataset, cifar, read_dataset
from daskcurv.experiment.data.preparation import decoded_before
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.held_out import first_of_each_class, read_held_out
from daskcurv.experiment.identity import Recorded
from daskcurv.experiment.naming import Naming
from daskcurv.experiment.networks import Factory, Network
from daskcurv.experiment.payload import BARE, Payload, find_payload, weights_in
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.experiment.search import discover, find
from daskcurv.experiment.weight_files import look_into
from daskcurv.logs import counted
from daskcurv.places import check_writable, exists, listed, place_for
from daskcurv.runs.curricula import curriculum_of, described
from daskcurv.runs.options import RESNET18, LaunchOptions, parse_epochs
from daskcurv.storage import ResultsStore
from daskcurv.storage.lock import beside

log = logging.getLogger(__name__)

HELD_OUT = 50
"""Samples of each class that the documented run held out."""


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
    available = found_checkpoints(options)
    checkpoints = {epoch: available[epoch] for epoch in choose_epochs(options, available)}
    if options.download:
        cifar.download(options.data_path)
    dataset = read_dataset(
        options.data_path,
        mean=_numbers("mean", options.mean),
        std=_numbers("std", options.std),
        image_size=options.image_size,
    )
    if not getattr(dataset, "published", True):
        log.info(
            "%s is not the published CIFAR-100 training set (other checksum): %d samples",
            options.data_path,
            len(dataset),
        )
    dataset = decoded_before(dataset, beside(options.store, ".inputs"))
    first, network, payload = _first_usable(options, list(checkpoints.values()), dataset)
    curriculum, source = curriculum_of(options, network.num_classes)
    per_class, held_out = _held_out(options, len(dataset))
    experiment = Experiment(
        dataset=dataset,
        checkpoints=checkpoints,
        network=network,
        payload=payload,
        curriculum=curriculum,
        estimator=selected(options)[0],
        head=options.head,
        outputs=options.outputs,
        experiment_index=options.experiment_index,
        validation_per_class=per_class,
        held_out=held_out,
        class_order_source=source,
    )
    experiment.check_parts(str(options.data_path), str(first))
    if not options.documented:
        log.info("%s", described(curriculum, source))
    return experiment


def as_used(options: LaunchOptions, experiment: Experiment) -> LaunchOptions:
    """Return the options with what an experiment took for those that leave it open."""
    return replace(
        options,
        epochs="all" if _all_epochs(options) else options.epochs,
        estimator=experiment.estimator,
        # One of them only, as a user has to give it.
        held_out=None if experiment.held_out is None else options.held_out,
        validation_per_class=None
        if experiment.held_out is not None
        else experiment.validation_per_class,
    )


def found_checkpoints(options: LaunchOptions) -> dict[int, Path]:
    """Return the files of the weights by epoch, of all epochs."""
    if options.checkpoints is None:
        return discover(options.model_dir, options.experiment_index, task=options.task)
    root, naming = Naming.of(options.checkpoints)
    return find(root, naming, experiment=options.experiment_index, task=options.task)


def _held_out(options: LaunchOptions, num_samples: int) -> tuple[int, NDArray[np.bool_] | None]:
    """Return how many of each class were held out, and which samples if a file says so."""
    if options.held_out is not None:
        first = first_of_each_class(options.held_out)
        if first is not None:
            return first, None
        held_out = read_held_out(Path(options.held_out), num_samples)
        log.info("%s: %d of %d samples held out", options.held_out, held_out.sum(), num_samples)
        return 0, held_out
    if options.validation_per_class is not None:
        return options.validation_per_class, None
    return HELD_OUT if options.documented else 0, None


def _numbers(name: str, text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(word) for word in text.split(",")]
    except ValueError:
        raise ConfigError(
            f"{name} is {text!r}; expected a number for each channel, such as 0.49,0.48,0.44"
        ) from None


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


def _first_usable(
    options: LaunchOptions, paths: list[Path], dataset: Dataset
) -> tuple[Path, Network, Payload]:
    """Return the first file that can be read, the network, and where its weights are in a file.

    Damaged files are left to the check of all files, which lists every one of them.
    """
    network: Network | None = None
    if options.model == RESNET18:
        model: nn.Module = ModelSpec().build()
    else:
        image = dataset.inputs(np.arange(1))[0]
        network, model = Factory.named(options.model, _arguments(options.model_args), image)
        log.info("network %s: %d outputs", options.model, network.num_classes)
    names = model.state_dict().keys()
    for path in paths:
        try:
            content = look_into(path)
            payload = find_payload(content, path, names, key=options.weights_key or "")
        except CheckpointError:
            if path == paths[-1]:
                raise
            continue
        if options.strip_prefix is not None:
            payload = Payload(payload.key, options.strip_prefix)
        if payload != BARE:
            log.info("weights in %s and files like it: %s", path, payload)
        weights = weights_in(content, payload, path)
        if network is None and not weights.keys() & set(names):
            raise CheckpointError(
                f"the weights in {path} are those of another network than {RESNET18}: unexpected "
                f"{listed(list(weights))}. Name the network with --model"
            )
        if network is None:
            network = _widest(ModelSpec.infer(weights), options, dataset)
        return path, network, payload
    raise AssertionError("there is at least one file")


def _widest(spec: ModelSpec, options: LaunchOptions, dataset: Dataset) -> ModelSpec:
    """Return the documented network with the outputs of all classes, if they are added later."""
    classes = int(dataset.labels.max()) + 1
    if options.head != "active" or classes <= spec.num_classes:
        return spec
    log.info(
        "the first weights have %d outputs, and the data set has %d classes: outputs are taken to "
        "be added with the classes",
        spec.num_classes,
        classes,
    )
    return replace(spec, num_classes=classes)


def _arguments(text: str | None) -> dict[str, Any]:
    try:
        arguments = json.loads(text or "{}")
    except json.JSONDecodeError as error:
        raise ConfigError(f"model_args is no JSON: {error}; got {text}") from error
    if not isinstance(arguments, dict):
        raise ConfigError(f'model_args is {text}; expected an object such as {{"num_classes": 10}}')
    return arguments


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
    place = options.checkpoints or options.model_dir
    wanted = sorted(available) if _all_epochs(options) else _requested(options)
    missing = [epoch for epoch in wanted if epoch not in available]
    if missing and not options.skip_missing:
        raise CheckpointError(
            f"{place} has no checkpoint of experiment index {options.experiment_index} for "
            f"{len(missing)} of {counted(len(wanted), 'epoch')}: "
            f"{', '.join(map(str, missing))}. Name other --epochs (or all), or add --skip_missing"
        )
    if missing:
        log.info("skipping %s without a checkpoint: %s", counted(len(missing), "epoch"), missing)
    chosen = [epoch for epoch in wanted if epoch in available]
    if not chosen:
        raise CheckpointError(
            f"none of the requested epochs ({len(wanted)}) has a checkpoint in {place}"
        )
    return chosen


def _all_epochs(options: LaunchOptions) -> bool:
    # The default range is the documented run's.
    chosen = options.start_epoch, options.end_epoch, options.step
    usual = LaunchOptions.start_epoch, LaunchOptions.end_epoch, LaunchOptions.step
    of_another = options.checkpoints is not None and options.epochs is None and chosen == usual
    return options.epochs == "all" or of_another


def _requested(options: LaunchOptions) -> list[int]:
    if options.epochs is not None:
        return parse_epochs(options.epochs)
    if options.start_epoch < 0 or options.end_epoch < options.start_epoch or options.step < 1:
        raise ConfigError(
            f"start_epoch {options.start_epoch}, end_epoch {options.end_epoch}, step "
            f"{options.step} name no epochs; expected 0 <= start_epoch <= end_epoch and step >= 1"
        )
    return list(range(options.start_epoch, options.end_epoch + 1, options.step))
