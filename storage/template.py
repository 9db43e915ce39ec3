"""A results store with nothing in it: its arrays, its samples, and what it is bound to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from daskcurv.config import Identity, fingerprint
from daskcurv.measures import Measure
from daskcurv.storage import schema
from daskcurv.storage.group import array_of, consolidate, create_array


def write_template(
    path: Path,
    identity: Identity,
    samples: Mapping[str, Sequence[Any] | NDArray[Any]],
    measures: Sequence[Measure],
    block_size: int,
    attrs: Mapping[str, Any],
) -> None:
    """Write a store without epochs.

    Parameters
    ----------
    path : Path
        An empty directory.
    identity : dict
        Scientific configuration that the store is bound to.
    samples : mapping
        A column of length N for each of `schema.SAMPLE_VARIABLES`.
    measures : sequence of Measure
        The store's list.
    block_size : int
        Samples per block, at most N.
    attrs : mapping
        Further attributes, for the reader's benefit.
    """
    variables = schema.all_variables(measures)
    group = zarr.create_group(
        path,
        zarr_format=3,
        overwrite=True,
        attributes={
            **attrs,
            "daskcurv_format": schema.FORMAT_VERSION,
            "identity": identity,
            "fingerprint": fingerprint(identity),
            "block_size": block_size,
            "epochs": [],
            "coordinates": " ".join(v.name for v in variables if v.coordinate),
            schema.MEASURES: [measure.to_json() for measure in measures],
        },
    )
    group.create_group(schema.DIGEST.name.rpartition("/")[0])
    num_samples = len(samples["sample"])
    for variable in variables:
        create_array(group, variable, num_samples, block_size, len(measures) + 1)
    for variable in schema.SAMPLE_VARIABLES:
        array_of(group, variable.name)[:] = np.asarray(samples[variable.name], dtype=variable.dtype)
    consolidate(path)
