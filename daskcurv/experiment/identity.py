"""What the identity of a results store says, read in one place.

An identity is a plain dictionary (see `daskcurv.config`). That of results which were imported says
little more than the class order. Needs no PyTorch: queries, the command line and reports use it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from daskcurv.config import EstimatorConfig, Identity, fingerprint
from daskcurv.experiment.curriculum import Curriculum


@dataclass(frozen=True)
class Recorded:
    """What an identity says; None stands for what it does not say.

    Attributes
    ----------
    estimator : EstimatorConfig or None
        Settings that are not recorded have their defaults.
    curriculum : Curriculum
        Without classes if no order is recorded.
    head : {"all", "active"} or None
    outputs : {"labels", "class_order"}
    network, payload : mapping
        As their own modules read them.
    dataset : mapping
        Digest (``sha256``), number of samples, normalisation, samples held out.
    experiment_index : int or None
    multiplied_by : int or None
        Of imported results: the factor of their gradients.
    """

    estimator: EstimatorConfig | None
    curriculum: Curriculum
    head: str | None
    outputs: str
    network: Mapping[str, Any]
    payload: Mapping[str, Any]
    dataset: Mapping[str, Any]
    experiment_index: int | None
    multiplied_by: int | None

    @classmethod
    def of(cls, identity: Mapping[str, Any]) -> Recorded:
        """Return what an identity says."""
        imported = identity.get("imported")
        index = identity.get("experiment_index")
        return cls(
            estimator=None if imported else _estimator(identity.get("estimator")),
            curriculum=Curriculum.of(identity.get("classes", {})),
            head=identity.get("head"),
            outputs=identity.get("outputs", "labels"),
            network=identity.get("model", {}),
            payload=identity.get("payload", {}),
            dataset=identity.get("dataset", {}),
            experiment_index=index if isinstance(index, int) else None,
            multiplied_by=imported["multiplied_by"] if imported else None,
        )

    @property
    def imported(self) -> bool:
        """Whether the results were imported, not computed."""
        return self.multiplied_by is not None

    @property
    def differentiates(self) -> bool:
        """Whether the results have measures of gradients."""
        return self.estimator is None or self.estimator.traits.differentiates


def lacks_probes_only(recorded: Identity, wanted: Identity) -> bool:
    """Return whether results differ from what is wanted only by having fewer probes."""
    before, after = Recorded.of(recorded).estimator, Recorded.of(wanted).estimator
    if before is None or after is None or before.n_probes >= after.n_probes:
        return False
    estimator = {**recorded["estimator"], "n_probes": after.n_probes}
    return fingerprint({**recorded, "estimator": estimator}) == fingerprint(wanted)


def _estimator(recorded: Mapping[str, Any] | None) -> EstimatorConfig | None:
    if recorded is None:
        return None
    names = [field.name for field in fields(EstimatorConfig) if field.name in recorded]
    return EstimatorConfig(**{name: recorded[name] for name in names})
