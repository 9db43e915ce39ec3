"""A training run whose weights were kept, and what is to be computed of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from daskcurv.config import HEADS, OUTPUTS, EstimatorConfig, Identity, check_choice, differences
from daskcurv.errors import CheckpointError, ConfigError, DataError, StoreError
from daskcurv.estimators.auto import CHECK_SAMPLES
from daskcurv.estimators.probes import GENERATOR
from daskcurv.estimators.scoring import Scorer
from daskcurv.estimators.selection import recorded_as
from daskcurv.experiment.checkpoints import Checkpoint, check_weights
from daskcurv.experiment.curriculum import (
    TRAIN,
    VALIDATION,
    Curriculum,
    active_samples,
    held_out_split,
)
from daskcurv.experiment.data import Dataset
from daskcurv.experiment.data.prepared import Prepared
from daskcurv.experiment.held_out import digest_of
from daskcurv.experiment.identity import Recorded
from daskcurv.experiment.networks import Factory, Network, network_of, outputs_of
from daskcurv.experiment.outputs import in_label_order, rows_of_head, widened
from daskcurv.experiment.payload import BARE, Payload
from daskcurv.experiment.weight_files import read_state_dict
from daskcurv.places import listed


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """Data, weights by epoch, network and curriculum of a training run, and the estimator.

    Attributes
    ----------
    dataset : Dataset
    checkpoints : mapping
        File of the weights by epoch, for the epochs to compute.
    network : Network
        The one that they belong to.
    payload : Payload
        Where the weights are in a file.
    curriculum : Curriculum
    estimator : EstimatorConfig
        Its precision is decided; its method is ``"auto"`` if workers may fall back to direct finite
        differences.
    head : {"all", "active"}
        Outputs that take part in the loss: all, or those of the active classes. With the latter, an
        epoch's file may have only the outputs that were there then.
    outputs : {"labels", "class_order"}
        What output j of the network stands for: the class with label j, or the j-th class in the
        curriculum's order. Results are in terms of the labels all the same.
    experiment_index : int
        Which of several training runs it is.
    validation_per_class : int
        The first samples of each class that the training run held out.
    held_out : ndarray of bool, shape (N,), optional
        The samples that it held out, in place of the first ones.
    class_order_source : str
        Where the class order comes from.
    """

    dataset: Dataset
    checkpoints: Mapping[int, Path]
    network: Network
    curriculum: Curriculum
    estimator: EstimatorConfig
    payload: Payload = BARE
    head: str = "all"
    outputs: str = "labels"
    experiment_index: int = 0
    validation_per_class: int = 0
    class_order_source: str = ""
    held_out: NDArray[np.bool_] | None = field(default=None, compare=False)

    @classmethod
    def from_identity(
        cls,
        identity: Identity,
        *,
        dataset: Dataset,
        checkpoints: Mapping[int, Path],
        directory: Path | None = None,
        split: NDArray[np.uint8] | None = None,
    ) -> Experiment:
        """Return the experiment that a store's identity records.

        Parameters
        ----------
        identity : dict
        dataset : Dataset
        checkpoints : mapping
            File by epoch.
        directory : Path, optional
            Where the network's file is, if it is made by one.
        split : ndarray of uint8, shape (N,), optional
            The store's column, needed if a file said which samples were held out.

        Raises
        ------
        StoreError
            If the identity is that of imported results.
        DataError
            If anything is not as recorded; says what differs.
        """
        recorded = Recorded.of(identity)
        if recorded.estimator is None or recorded.head is None or recorded.imported:
            raise StoreError("results that were imported do not say how they were computed")
        experiment = cls(
            dataset=dataset,
            checkpoints=checkpoints,
            network=network_of(recorded.network, directory),
            payload=Payload.of(recorded.payload),
            curriculum=recorded.curriculum,
            estimator=recorded.estimator,
            head=recorded.head,
            outputs=recorded.outputs,
            experiment_index=recorded.experiment_index or 0,
            validation_per_class=recorded.dataset["validation_per_class"],
            held_out=None
            if split is None or "held_out" not in recorded.dataset
            else split != TRAIN,
        )
        if different := differences(identity, experiment.identity()):
            raise DataError(f"this is another experiment: {'; '.join(different)}")
        return experiment

    def identity(self) -> Identity:
        """Return all that changes the results, as a JSON-able dictionary."""
        return self._identity

    @cached_property
    def _identity(self) -> Identity:
        # The digest of the data set takes a while.
        return {
            "estimator": {**recorded_as(self.estimator).to_dict(), "probes": GENERATOR},
            "head": self.head,
            # Stores of networks whose outputs are in the order of the labels have no such entry.
            **({"outputs": self.outputs} if self.outputs != "labels" else {}),
            "model": self.network.to_dict(),
            # Stores of bare state dicts have no such entry.
            **({"payload": self.payload.to_dict()} if self.payload != BARE else {}),
            "dataset": {
                "sha256": self.dataset.digest(),
                "num_samples": len(self.dataset),
                "mean": list(self.dataset.mean),
                "std": list(self.dataset.std),
                "validation_per_class": self.validation_per_class,
                # Stores without such a file have no such entry.
                **({} if self.held_out is None else {"held_out": digest_of(self.held_out)}),
            },
            "classes": self.curriculum.to_dict(),
            "experiment_index": self.experiment_index,
        }

    def travelling(self, copy: Prepared) -> Experiment:
        """Return the experiment as it is sent with a task: without arrays, and without files.

        Parameters
        ----------
        copy : Prepared
            The data set's copy that workers map.
        """
        return replace(self, dataset=copy, checkpoints={}, held_out=None)

    def check(self) -> None:
        """Check that the parts belong together, and try the network on an image.

        Raises
        ------
        DataError, ConfigError
        """
        self.check_parts()
        if not isinstance(self.network, Factory):
            return
        image = self.dataset.inputs(np.arange(1))[0]
        given = outputs_of(self.network.build(), image, self.network.factory)
        if given != self.network.num_classes:
            raise ConfigError(
                f"the network {self.network.factory} cannot be used: it has {given} outputs "
                f"for an image, not the {self.network.num_classes} that are stated"
            )

    def check_parts(self, data: str = "the data set", weights: str = "the checkpoints") -> None:
        """Check that the parts belong together, going by what is known of each.

        Parameters
        ----------
        data, weights : str
            What the messages call them.

        Raises
        ------
        DataError, ConfigError
        """
        check_choice("head", self.head, HEADS)
        check_choice("outputs", self.outputs, OUTPUTS)
        outputs = self.network.num_classes
        if (largest := int(self.dataset.labels.max())) >= outputs:
            raise DataError(
                f"{data} has label {largest}, but the network of {weights} has {outputs} outputs; "
                "data set and checkpoints do not belong together, unless outputs were added during "
                "training: then give the network all of them (--model_args), and add --head active"
            )
        if self.held_out is not None and self.held_out.shape != self.dataset.labels.shape:
            raise DataError(
                f"held_out has shape {self.held_out.shape}; expected one bool for each of the "
                f"{len(self.dataset)} samples of {data}"
            )
        if sorted(self.curriculum.order) != list(range(outputs)):
            raise ConfigError(
                f"the class order has {len(self.curriculum.order)} entries; expected each of the "
                f"{outputs} outputs of the network once"
            )

    def active_classes(self, epoch: int) -> tuple[int, ...]:
        """Return the classes that are active at an epoch."""
        return self.curriculum.active_classes(epoch)

    def active(self, epoch: int) -> NDArray[np.bool_]:
        """Return which samples are active at an epoch, shape (N,)."""
        return self.curriculum.active(epoch, self.dataset.labels)

    def active_per_block(self, epochs: Sequence[int], block_size: int) -> NDArray[np.int64]:
        """Count the active samples of each block, shape (epochs, blocks)."""
        return active_samples(self._first_epoch_active, epochs, block_size)

    @property
    def _first_epoch_active(self) -> NDArray[np.int64]:
        position = self.curriculum.position(self.dataset.labels)
        return self.curriculum.first_epoch_active()[position]

    @property
    def split(self) -> NDArray[np.uint8]:
        """Which samples the training run held out, as codes of the `split` coordinate."""
        if self.held_out is None:
            return held_out_split(self.dataset.labels, self.validation_per_class)
        return np.where(self.held_out, VALIDATION, TRAIN).astype(np.uint8)

    def sample_columns(self) -> dict[str, NDArray[np.generic]]:
        """Return what a store has of each sample besides the results."""
        labels = self.dataset.labels
        return {
            "sample": np.arange(len(labels)),
            "label": labels,
            "split": self.split,
            "class_position": self.curriculum.position(labels),
            "first_epoch_active": self._first_epoch_active,
        }

    def sample_texts(self) -> dict[str, NDArray[np.object_]]:
        """Return what a new store has of each sample to know it again by; takes a moment."""
        keys = self.dataset.keys().tobytes().hex()
        width = len(keys) // len(self.dataset)
        texts = {"sample_key": [keys[i : i + width] for i in range(0, len(keys), width)]}
        if self.dataset.names:
            texts["sample_name"] = list(self.dataset.names)
        return {name: np.array(values, object) for name, values in texts.items()}

    def epoch_columns(self, checkpoints: Sequence[Checkpoint]) -> dict[str, list[Any]]:
        """Return what a store has of each epoch before anything is computed."""
        epochs = [checkpoint.epoch for checkpoint in checkpoints]
        of_files = [checkpoint.columns() for checkpoint in checkpoints]
        return {
            "epoch": epochs,
            "task": [self.curriculum.task(epoch) for epoch in epochs],
            "num_active_classes": [len(self.active_classes(epoch)) for epoch in epochs],
            **{name: [columns[name] for columns in of_files] for name in Checkpoint.COLUMNS},
        }

    def model(self, epoch: int, weights: Mapping[str, Tensor] | None = None) -> nn.Module:
        """Return the network of an epoch.

        Parameters
        ----------
        epoch : int
        weights : mapping, optional
            The contents of the epoch's file, if it has been read already.

        Raises
        ------
        CheckpointError
            If the weights cannot be used.
        """
        path = self.checkpoints[epoch]
        if weights is None:
            weights, _ = read_state_dict(path, self.payload)
        model = self.network.build()
        expected = model.state_dict()
        weights = self.with_all_outputs(epoch, weights, expected)
        check_weights(expected, weights, path)
        model.load_state_dict(weights)
        if self.outputs == "class_order":
            image = self.dataset.inputs(np.arange(1))[0]
            model = in_label_order(model, self.curriculum.order, image)
        return model

    def with_all_outputs(
        self, epoch: int, weights: Mapping[str, Tensor], expected: Mapping[str, Tensor]
    ) -> Mapping[str, Tensor]:
        """Return the weights of an epoch, with outputs added that were not there yet.

        These are of classes that are not active, so that the loss does not depend on them.

        Parameters
        ----------
        epoch : int
        weights, expected : mapping of Tensor
            What the epoch's file has, and what the network has.

        Raises
        ------
        CheckpointError
            If the outputs that are there are not those of the active classes.
        """
        every = self.network.num_classes
        number = rows_of_head(weights, expected, every)
        if number == every:
            return weights
        classes = self.active_classes(epoch)
        what = f"checkpoint {self.checkpoints[epoch]} has {number} of the network's {every} outputs"
        if self.head != "active":
            raise CheckpointError(
                f"{what}; if outputs were added during training, add --head active, and describe "
                "when (docs/your-run.md, Classes)"
            )
        if len(classes) != number:
            raise CheckpointError(
                f"{what}, but {len(classes)} classes are active at epoch {epoch}; correct the "
                "schedule of the classes. At an epoch of additions, --class_partition trained is "
                "for files that were saved before outputs were added"
            )
        if self.outputs == "labels" and set(classes) != set(range(number)):
            raise CheckpointError(
                f"{what}, which cannot be those of the active classes "
                f"{listed(list(map(str, sorted(classes))))} if output j is class j; add --outputs "
                "class_order if they are in the order in which classes were added"
            )
        return widened(weights, expected, every)

    def scorer(
        self,
        epoch: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        batch_size: int | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Scorer:
        """Return the network of an epoch, ready to score samples.

        Parameters
        ----------
        epoch : int
        device : torch.device or str
        dtype : torch.dtype
            Of the network and the images.
        batch_size : int, optional
            Samples per micro-batch.
        weights : mapping, optional
            The contents of the epoch's file, if it has been read already.

        Raises
        ------
        CheckpointError
            If the weights cannot be used.
        """
        scorer = Scorer(
            self.model(epoch, weights),
            self.estimator,
            classes=self.active_classes(epoch) if self.head == "active" else None,
            device=device,
            batch_size=batch_size,
            dtype=dtype,
        )
        # The same samples for every worker and block, so that all choose the same method.
        if len(first := self.first_active(epoch)):
            scorer.choose_method(*self.dataset.inputs(first))
        return scorer

    def first_active(self, epoch: int) -> NDArray[np.int64]:
        """Return the few first active samples of an epoch, with which a scorer is tried."""
        return np.flatnonzero(self.active(epoch))[:CHECK_SAMPLES]
