"""Attributes of a dataset that every file format can take.

NetCDF has no nested attributes, and its libraries take text only if it is nothing but text. So an
opened store's identity is JSON text in the dataset's attributes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import xarray as xr

from daskcurv.config import Identity


def identity_of(dataset: xr.Dataset) -> Identity:
    """Return the identity of the results in a dataset.

    Parameters
    ----------
    dataset : xarray.Dataset
        Of `daskcurv.open_results`, or read from what it was written to; or a store opened with
        `xarray.open_zarr`.

    Returns
    -------
    dict
        Everything that decided the numbers: estimator, network, data, class order, schedule.
    """
    identity = dataset.attrs["identity"]
    return cast(Identity, json.loads(identity) if isinstance(identity, str) else identity)


def writable(attrs: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return attributes with what is nested, and lists of text, as JSON text."""
    return {
        name: json.dumps(value, ensure_ascii=False) if _is_nested(value) else value
        for name, value in attrs.items()
    }


def _is_nested(value: Any) -> bool:
    # NetCDF 3 takes lists of numbers only.
    return isinstance(value, Mapping) or (
        isinstance(value, list | tuple) and np.asarray(value).dtype.kind not in "biuf"
    )
