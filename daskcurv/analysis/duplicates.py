"""Samples that are there more than once, and those among them with different labels."""

from __future__ import annotations

import numpy as np
import xarray as xr

from daskcurv.analysis.per_sample import described
from daskcurv.errors import ConfigError


def duplicates(dataset: xr.Dataset) -> xr.Dataset:
    """Find samples with the same pixels.

    Parameters
    ----------
    dataset : xarray.Dataset
        With the coordinate ``sample_key``, and of NumPy arrays or Dask arrays.

    Returns
    -------
    xarray.Dataset, dimension ``sample``
        In memory. ``duplicate_group``, int64: the same number for samples with the same key, from
        0 in the order of their first samples; −1 for samples whose key no other has.
        ``duplicate_labels_differ``, bool: whether the samples of the group have more than one
        label.

    Raises
    ------
    ConfigError
        If the dataset has no keys.
    """
    if "sample_key" not in dataset.coords:
        raise ConfigError(
            "the dataset has no coordinate 'sample_key', by which equal samples are found; stores "
            "have it since they were created with it, and imported ones do not"
        )
    keys = dataset.sample_key.values.astype(object)
    _, first, of_key, count = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    repeated = np.flatnonzero(count > 1)
    number = np.full(len(count), -1, np.int64)
    number[repeated[np.argsort(first[repeated])]] = np.arange(len(repeated))
    group = number[of_key]
    labels = dataset.label.values
    # A group has one label if its smallest is its largest.
    lowest = np.full(len(count), np.iinfo(np.int64).max)
    highest = np.full(len(count), np.iinfo(np.int64).min)
    np.minimum.at(lowest, of_key, labels)
    np.maximum.at(highest, of_key, labels)
    differ = (lowest != highest)[of_key]
    return xr.Dataset(
        {
            "duplicate_group": described(
                dataset.label.copy(data=group), "group of samples with the same pixels; -1 if alone"
            ),
            "duplicate_labels_differ": described(
                dataset.label.copy(data=differ),
                "whether samples with the same pixels have different labels",
            ),
        }
    )


def told(found: xr.Dataset, most: int = 5) -> str:
    """Say how many there are, and list the first groups whose labels differ.

    Parameters
    ----------
    found : xarray.Dataset
        Of `duplicates`.
    most : int
        Groups to list.
    """
    group, differ = found.duplicate_group.values, found.duplicate_labels_differ.values
    if not (group >= 0).any():
        return "no two samples have the same pixels"
    text = f"{(group >= 0).sum()} samples are {group.max() + 1} images: pixels are the same"
    numbers = np.unique(group[differ]).tolist()
    if not numbers:
        return f"{text}, and so are the labels"
    listed = "; ".join(
        ", ".join(
            f"{sample} (label {label})"
            for sample, label in zip(
                found.sample.values[group == number], found.label.values[group == number],
                strict=True,
            )
        )
        for number in numbers[:most]
    )  # fmt: skip
    more = f"; and {len(numbers) - most} more" if len(numbers) > most else ""
    return f"{text}; the labels of {len(numbers)} differ: samples {listed}{more}"
