"""The measures that are computed for every sample at every epoch: one table.

Results, stores, exports and tables derive from it. A measure of the clean pass (the one evaluation
of the network at the sample itself) is a row here and a line in `daskcurv.estimators.clean`. A
results store keeps its own list, so that it can be read whatever the table says by then.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import numpy as np

Pass = Literal["clean", "probes"]


@dataclass(frozen=True)
class Measure:
    """What is known about a measure, apart from how it is computed.

    Attributes
    ----------
    name : str
        Of the store's variable, and in the names of exported files and columns.
    long_name : str
        Definition.
    units : str
        In the notation of the CF conventions; empty for numbers without one.
    comment : str
        What the definition needs to be complete.
    dtype : str
        Of stored values.
    fill : float or int
        What a sample has for which it was not computed.
    computed_in : {"clean", "probes"}
        The clean pass, or a mean over probes.
    h : float, optional
        Step size, if it is not the one of the store's identity.
    gradient_power : int
        Power of the batch size by which a loss averaged over a batch would divide it.
    needs_gradients : bool
        Whether an estimator that takes no gradients leaves it NaN.
    documented : bool
        Whether it is in every npy export, and not only with ``--extras``.
    """

    name: str
    long_name: str
    units: str = ""
    comment: str = ""
    dtype: str = "float32"
    fill: float = math.nan
    computed_in: Pass = "clean"
    h: float | None = None
    gradient_power: int = 0
    needs_gradients: bool = False
    documented: bool = False

    @property
    def is_integer(self) -> bool:
        """Whether its values are integers."""
        return np.dtype(self.dtype).kind in "iu"

    def attrs(self) -> dict[str, str]:
        """Return its attributes in a dataset, by the CF conventions."""
        said = {"long_name": self.long_name, "units": self.units, "comment": self.comment}
        return {name: text for name, text in said.items() if text}

    def to_json(self) -> dict[str, Any]:
        """Return it as a JSON object, the form in which a store keeps it."""
        row = asdict(self)
        if math.isnan(self.fill):
            row["fill"] = "NaN"
        return row

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Measure:
        """Return what `to_json` made an object of; fields that are not known are left out.

        Raises
        ------
        ValueError
            If the object is no measure; the text says why.
        """
        known = {field.name: row[field.name] for field in fields(cls) if field.name in row}
        for name in ("name", "long_name", "dtype"):
            if not isinstance(known.get(name), str):
                raise ValueError(f"a measure has {name} {known.get(name)!r}; expected text")
        if known.get("fill", "NaN") == "NaN":
            known["fill"] = math.nan
        try:
            np.array(known["fill"], np.dtype(known["dtype"]))
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"measure {known['name']}: {error}") from error
        return cls(**known)


_STEP = "Δg = ∇L(x + h v) − ∇L(x), with the step h and probes v of the store's identity"

_over_probes = partial(Measure, units="nat", comment=_STEP, computed_in="probes")

MEASURES = (
    _over_probes(
        "curvature", "mean over probes of the norm of Δg", gradient_power=1, documented=True
    ),
    _over_probes(
        "curvature_sq", "mean over probes of the squared norm of Δg", units="nat2", gradient_power=2
    ),
    _over_probes(
        "directional_eig", "mean over probes of (h v)·Δg", gradient_power=1, documented=True,
        needs_gradients=True,
    ),
    Measure("loss", "cross-entropy of the sample alone", "nat"),
    Measure(
        "grad_norm", "norm of the input gradient of the sample's loss", "nat", gradient_power=1,
        needs_gradients=True,
    ),
    Measure(
        "prediction", "class with the largest logit; -1 where not computed", dtype="int16", fill=-1
    ),
)  # fmt: skip
"""In the order of a new store's list."""

FORMAT_1 = MEASURES[:6]
"""What every store of format 1 holds, without saying so."""
