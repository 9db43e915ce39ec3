"""What a run computes: validated settings, and the identity that a results store is bound to.

The *identity* is a plain, JSON-able dictionary holding everything that changes the numbers
(estimator, head, model, data set, class order, schedule). Its fingerprint is stored with the
results, and a store is only continued by a run with the same identity. Where and how a run is
executed (workers, batch size, directories) is not part of it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from numbers import Integral, Real
from typing import Any, Literal, get_args

from daskcurv.declared import check_choices, documented, setting
from daskcurv.errors import ConfigError

Head = Literal["all", "active"]
HEADS: tuple[str, ...] = get_args(Head)
OUTPUTS = ("labels", "class_order")


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What the program has to know about a method.

    Attributes
    ----------
    propagates : bool
        Whether it carries differences through the network, in a precision that can be chosen.
    differentiates : bool
        Whether it takes gradients, and so gives the measures of them.
    probes_per_draw : int
        How many probes make one independent value of the curvature.
    """

    propagates: bool = False
    differentiates: bool = True
    probes_per_draw: int = 1


TRAITS = {
    "auto": Traits(propagates=True),
    "difference-propagation": Traits(propagates=True),
    "finite-difference": Traits(),
    "zeroth-order": Traits(differentiates=False, probes_per_draw=2),
}
METHODS: tuple[str, ...] = tuple(TRAITS)

Precision = Literal["auto", "bfloat16", "tf32", "float32"]
PRECISIONS: tuple[str, ...] = get_args(Precision)

Identity = dict[str, Any]


@documented
@dataclass(frozen=True, kw_only=True)
class EstimatorConfig:
    """Settings of the curvature estimator; all of them are part of a store's identity.

    A precision that is given keeps the method ``"auto"`` from choosing by the CPU.
    """

    method: str = setting(
        "auto",
        "auto: difference-propagation; finite-difference for epochs whose self-check fails and on "
        "CPUs without fast bfloat16",
        choices=METHODS,
    )
    precision: str = setting(
        "auto",
        "precision of difference-propagation; auto: the one the store was started with, or the one "
        "that is fast on the device",
        choices=PRECISIONS,
    )
    h: float = setting(1e-3, "step size of the finite difference, in units of the normalised input")
    n_probes: int = setting(10, "random directions per sample")
    temperature: float = setting(1.0, "temperature by which the logits are divided")
    seed: int = setting(0, "random seed of the directions, 0 to 2**64 - 1")

    def __post_init__(self) -> None:
        # What callers pass need not be what the annotations say.
        n_probes: Any = self.n_probes
        seed: Any = self.seed
        for name in ("h", "temperature"):
            value: Any = getattr(self, name)
            if not (isinstance(value, Real) and 0 < float(value) < math.inf):
                raise ConfigError(f"{name} is {value!r}; expected a finite number above 0")
        check_choices(self)
        if not (isinstance(n_probes, Integral) and int(n_probes) >= 1):
            raise ConfigError(f"n_probes is {n_probes!r}; expected an integer, 1 or more")
        if n_probes % self.traits.probes_per_draw:
            raise ConfigError(
                f"n_probes is {n_probes}; {self.method} takes probes in pairs: choose an even "
                "number"
            )
        if not (isinstance(seed, Integral) and 0 <= int(seed) < 2**64):
            raise ConfigError(f"seed is {seed!r}; expected an integer from 0 to 2**64 - 1")

    @property
    def traits(self) -> Traits:
        """What distinguishes the method."""
        return TRAITS[self.method]

    @property
    def draws(self) -> int:
        """How many independent values a mean over the probes is of."""
        return self.n_probes // self.traits.probes_per_draw

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as a JSON-able dictionary."""
        return asdict(self)


def check_positive(**values: int | None) -> None:
    """Raise `ConfigError` naming the first keyword whose value is given but not 1 … 2³¹−1."""
    for name, value in values.items():
        if value is not None and not 1 <= value < 2**31:
            raise ConfigError(f"{name} is {value!r}; expected an integer from 1 to 2**31 - 1")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """Raise `ConfigError` naming `name` unless its value is one of `choices`."""
    if value not in choices:
        raise ConfigError(f"{name} is {value!r}; expected one of {', '.join(choices)}")


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Return the sha256 (hex) of an identity's canonical JSON."""
    text = json.dumps(identity, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Describe, one line per field, where two identities differ.

    Parameters
    ----------
    stored, wanted : mapping
        Identities: nested dictionaries of JSON values.

    Returns
    -------
    list of str
        For example ``["estimator.h: the store has 0.001, this run has 0.01"]``.
    """
    left, right = dict(_leaves(stored)), dict(_leaves(wanted))
    absent = object()
    lines = []
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key, absent), right.get(key, absent)
        if a != b:
            shown = ["nothing" if value is absent else _short(value) for value in (a, b)]
            lines.append(f"{key}: the store has {shown[0]}, this run has {shown[1]}")
    return lines


def _leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _short(value: Any, limit: int = 60) -> str:
    text = json.dumps(value)
    return text if len(text) <= limit else text[: limit - 1] + "…"
