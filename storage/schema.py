"""What a results store holds: its variables, their types and meanings.

Which measures it holds, the store itself says, in an attribute; the other variables are the same
for all stores.

One Zarr v3 group with dimensions ``(epoch, sample)``. A *block* is one epoch × one run of
consecutive samples; it is one chunk of every per-sample variable, and the unit of work, of writing
and of resuming.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass, field
from typing import Any

from daskcurv.measures import Measure

FORMAT_VERSION = 2
"""Raised whenever a reader of the previous version would misread a store.

Since 2, a store lists its measures. One of format 1 holds `daskcurv.measures.FORMAT_1`.
"""

MEASURES = "measures"
"""Attribute of a store that lists its measures, each as `Measure.to_json` gives it."""

MISSING, COMPUTED, INACTIVE = 0, 1, 2
"""Codes of the `status` variable."""

EPOCH_CHUNK = 4096
"""Rows per chunk of the per-epoch variables, at least: a training run fits into one file each."""

DEFAULT_BLOCK_SIZE = 5000

COMPACT = "compact"
"""The layout attribute of a store made for reading; one that a launch fills has none."""


@dataclass(frozen=True)
class Variable:
    """A variable of the store.

    Attributes
    ----------
    name : str
    dims : tuple of str
    dtype : str
        Zarr data type.
    fill : Any
        Value of what was never written.
    attrs : dict
        CF-style attributes.
    coordinate : bool
        Whether xarray should present it as a coordinate.
    """

    name: str
    dims: tuple[str, ...]
    dtype: str
    fill: Any
    attrs: dict[str, Any] = field(default_factory=dict)
    coordinate: bool = False


STATUS = Variable(
    "status",
    ("epoch", "sample"),
    "uint8",
    MISSING,
    {
        "long_name": "state of the sample at this epoch",
        "flag_values": [MISSING, COMPUTED, INACTIVE],
        "flag_meanings": "missing computed class_not_active",
    },
)

DIGEST = Variable(
    "integrity/block_digest",
    ("epoch", "block", "variable"),
    "uint64",
    0,
    {
        "long_name": "digest of a block of a variable, and of where it belongs",
        "comment": "in the order of the store's list of measures, then status; see daskcurv verify",
    },
)
"""Tells a block's chunks from those of any other block, which a checksum within a file cannot.

In a group of its own, so that xarray does not show it among the results."""


def by_sample(name: str) -> str:
    """Return the name of a per-sample variable's second array in a compact store.

    There, samples are in the order that ``by_sample/sample`` gives.
    """
    return f"by_sample/{name}"


SAMPLE_VARIABLES = (
    Variable("sample", ("sample",), "int32", -1, {"long_name": "index into the training set"}),
    Variable("label", ("sample",), "int16", -1, {"long_name": "class of the sample"}, True),
    Variable(
        "split",
        ("sample",),
        "uint8",
        0,
        {
            "long_name": "whether the training run trained on the sample",
            "flag_values": [0, 1],
            "flag_meanings": "train validation",
        },
        True,
    ),
    Variable(
        "class_position",
        ("sample",),
        "int16",
        -1,
        {"long_name": "position of the sample's class in the class order"},
        True,
    ),
    Variable(
        "first_epoch_active",
        ("sample",),
        "int64",
        -1,
        {"long_name": "first epoch at which the sample's class is active; -1 if not known"},
        True,
    ),
)

EPOCH_VARIABLES = (
    Variable("epoch", ("epoch",), "int64", -1, {"long_name": "epoch of the training run"}),
    Variable("task", ("epoch",), "int16", -1, {"long_name": "number of class additions"}, True),
    Variable(
        "num_active_classes",
        ("epoch",),
        "int16",
        -1,
        {"long_name": "classes that are active"},
        True,
    ),
    Variable("checkpoint", ("epoch",), "str", "", {"long_name": "file name"}, True),
    Variable(
        "checkpoint_sha256", ("epoch",), "str", "", {"long_name": "SHA-256 of that file"}, True
    ),
    Variable(
        "checkpoint_size",
        ("epoch",),
        "int64",
        -1,
        {"long_name": "size of that file", "units": "byte"},
        True,
    ),
    Variable(
        "checkpoint_mtime_ns",
        ("epoch",),
        "int64",
        -1,
        {"long_name": "when that file was last modified, in ns since 1970"},
        True,
    ),
)
"""Written by the launcher when an epoch is added."""

PROGRESS_VARIABLES = (
    Variable(
        "complete", ("epoch",), "bool", False, {"long_name": "all blocks of the epoch done"}, True
    ),
    Variable(
        "compute_seconds",
        ("epoch",),
        "float64",
        0.0,
        {"long_name": "worker time spent on the epoch's blocks", "units": "s"},
        True,
    ),
    Variable(
        "method",
        ("epoch",),
        "str",
        "",
        {"long_name": "how the epoch was computed; more than one if workers disagreed"},
        True,
    ),
    Variable(
        "num_workers",
        ("epoch",),
        "int16",
        0,
        {"long_name": "most workers that shared the epoch's blocks in one run"},
        True,
    ),
)
"""Written by the launcher while it runs."""

SAMPLE_TEXTS = (
    Variable(
        "sample_key",
        ("sample",),
        "str",
        "",
        {
            "long_name": "digest of the sample's pixels",
            "comment": "BLAKE2b with 16 bytes, hexadecimal, of type, shape and pixels as they were "
            "before resizing",
        },
        True,
    ),
    Variable("sample_name", ("sample",), "str", "", {"long_name": "file of the sample"}, True),
)
"""Columns that a store has if it was created with them: older ones and imported ones were not."""

_TEXTS = frozenset(variable.name for variable in SAMPLE_TEXTS)

COLUMNS = (*SAMPLE_VARIABLES, *EPOCH_VARIABLES, *PROGRESS_VARIABLES, *SAMPLE_TEXTS)
"""Variables of one dimension. What is added is added last: its place decides a column's chunks."""

COLUMN = {variable.name: variable for variable in COLUMNS}


def per_sample(measures: Iterable[Measure]) -> tuple[Variable, ...]:
    """Return the variables by epoch and sample: measures, and last the status.

    A block's status is written after the measures, and its digests are in this order.
    """
    dims = ("epoch", "sample")
    return (*(Variable(m.name, dims, m.dtype, m.fill, m.attrs()) for m in measures), STATUS)


def columns(names: Container[str]) -> tuple[Variable, ...]:
    """Return the columns of a store with those `SAMPLE_TEXTS` that are in `names`."""
    return tuple(one for one in COLUMNS if one not in SAMPLE_TEXTS or one.name in names)


def all_variables(
    measures: Iterable[Measure], names: Container[str] = _TEXTS
) -> tuple[Variable, ...]:
    """Return every variable of a store with these measures and those `SAMPLE_TEXTS` in `names`."""
    return (*per_sample(measures), DIGEST, *columns(names))
