"""Means over groups of samples: classes, the cohorts in which they arrived, the split."""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.analysis.per_sample import described
from daskcurv.storage import schema

PARTS = ("trained", "held out")


def by_class(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Average a measure over the samples of each class, at each epoch.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(position, epoch)``
        In class order, with the coordinates ``class_label`` and, where the classes have names,
        ``class_title``. NaN where the class is not active, or the measure of one of its samples is
        not a number.
    """
    position = dataset.class_position.values
    known = np.unique(position[position >= 0])
    means = _means(dataset, name, position, known)
    result = means.rename(group="position").assign_coords(position=known)
    one_of_each = np.array([np.flatnonzero(position == place)[0] for place in known], dtype=int)
    # Not by the samples' own names, so that both fit into one Dataset.
    for own, coordinate in (("label", "class_label"), ("class_name", "class_title")):
        if own in dataset.coords:
            values = dataset[own].values[one_of_each]
            result = result.assign_coords({coordinate: ("position", values)})
    return result


def by_cohort(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Average a measure over the samples of the classes that one task introduced, at each epoch.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(cohort, epoch)``
        Cohorts are numbered from 0, in the order of their first active epoch, the coordinate
        ``active_from``.
    """
    first = dataset.first_epoch_active.values
    starts = np.unique(first[first >= 0])
    means = _means(dataset, name, first, starts).rename(group="cohort")
    return means.assign_coords(cohort=np.arange(len(starts)), active_from=("cohort", starts))


def by_split(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Average a measure over the samples that were trained on, and over those held out.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(part, epoch)``
        The parts are ``"trained"`` and ``"held out"``; NaN where one has no active sample.
    """
    means = _means(dataset, name, dataset.split.values, np.arange(len(PARTS)))
    return means.rename(group="part").assign_coords(part=list(PARTS))


def boundary_changes(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Return how the mean of a measure over each cohort changes at each task boundary.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(cohort, boundary)``
        The mean at the first epoch of a task that the store has, less that at the last epoch before
        it. A boundary is named by that first epoch; ``epoch_before`` is a coordinate. NaN for
        cohorts that are not active at both.
    """
    means = by_cohort(dataset, name)
    after = np.flatnonzero(np.diff(dataset.task.values) > 0) + 1
    epochs = dataset.epoch.values
    changes = means.values[:, after] - means.values[:, after - 1]
    return xr.DataArray(
        changes,
        dims=("cohort", "boundary"),
        coords={
            "cohort": means.cohort,
            "active_from": means.active_from,
            "boundary": epochs[after],
            "epoch_before": ("boundary", epochs[after - 1]),
        },
        attrs=means.attrs | {"long_name": f"change of {name} at the task boundary"},
    )


def _means(
    dataset: xr.Dataset, name: str, group: NDArray[np.generic], known: NDArray[np.generic]
) -> xr.DataArray:
    """Average over the active samples of each group, shape (groups, epochs)."""
    active = dataset.status == schema.COMPUTED
    values = dataset[name].where(active, 0).astype(np.float64)
    unknown = values.isnull()
    # A matrix product takes one pass over the data for all groups.
    member = xr.DataArray(
        (group[:, None] == known[None, :]).astype(np.float64), dims=("sample", "group")
    )
    total, count, lost = (
        xr.dot(part.astype(np.float64), member, dim="sample")
        for part in (values.where(~unknown, 0), active, unknown)
    )
    means: xr.DataArray = (total / count.where(count > 0)).where(lost == 0)
    units = dataset[name].attrs.get("units", "1")
    return described(means.transpose("group", "epoch"), f"mean of {name}", units=units)
