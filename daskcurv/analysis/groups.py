"""Means over groups of samples: classes, the cohorts in which they arrived, the split.

At each epoch they are over the samples that were computed and whose class the epoch's weights had
been trained on, or with ``include_untrained=True`` over all that were computed, as
`daskcurv.analysis.per_sample` says.
"""

from __future__ import annotations

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.analysis.per_sample import counted, described, epochs_counted

PARTS = ("trained", "held out")


def by_class(dataset: xr.Dataset, name: str, *, include_untrained: bool = False) -> xr.DataArray:
    """Average a measure over the samples of each class, at each epoch.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether samples count whose class the weights had not been trained on.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(position, epoch)``
        In class order, with the coordinates ``class_label`` and, where the classes have names,
        ``class_title``. NaN where no sample of the class counts, or the measure of one that does is
        not a number.
    """
    position = dataset.class_position.values
    known = np.unique(position[position >= 0])
    means = _by_epoch(dataset, name, position, known, include_untrained)
    result = means.rename(group="position").assign_coords(position=known)
    one_of_each = np.array([np.flatnonzero(position == place)[0] for place in known], dtype=int)
    # Not by the samples' own names, so that both fit into one Dataset.
    for own, coordinate in (("label", "class_label"), ("class_name", "class_title")):
        if own in dataset.coords:
            values = dataset[own].values[one_of_each]
            result = result.assign_coords({coordinate: ("position", values)})
    return result


def by_cohort(dataset: xr.Dataset, name: str, *, include_untrained: bool = False) -> xr.DataArray:
    """Average a measure over the samples of the classes that one task introduced, at each epoch.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether samples count whose class the weights had not been trained on.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(cohort, epoch)``
        Cohorts are numbered from 0, in the order of their first active epoch, the coordinate
        ``active_from``.
    """
    first = dataset.first_epoch_active.values
    starts = np.unique(first[first >= 0])
    means = _by_epoch(dataset, name, first, starts, include_untrained)
    return means.rename(group="cohort").assign_coords(
        cohort=np.arange(len(starts)), active_from=("cohort", starts)
    )


def by_split(dataset: xr.Dataset, name: str, *, include_untrained: bool = False) -> xr.DataArray:
    """Average a measure over the samples that were trained on, and over those held out.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether samples count whose class the weights had not been trained on.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(part, epoch)``
        The parts are ``"trained"`` and ``"held out"``; NaN where no sample of one counts.
    """
    parts = np.arange(len(PARTS))
    means = _by_epoch(dataset, name, dataset.split.values, parts, include_untrained)
    return means.rename(group="part").assign_coords(part=list(PARTS))


def boundary_changes(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Return how the mean of a measure over each cohort changes as new classes are trained on.

    The weights of the epoch at which classes are added precede the addition: they are the last
    before it, and those of the next epoch that the store has are the first after. The mean is over
    the samples that count at both, that is, over old classes only.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimensions ``(cohort, boundary)``
        The mean at the first weights after training on new classes, less that at the last before.
        A boundary is named by the epoch at which the classes are added; the coordinates
        ``epoch_before`` and ``epoch_after`` say which were compared. With few epochs stored there
        can be several additions, or much training, between them. NaN for cohorts of which no
        sample counts at both.

        Where a store does not record the schedule, whether the weights of a boundary epoch precede
        the addition is not known; the epochs on both sides of it are compared.
    """
    first = dataset.first_epoch_active.values
    starts = np.unique(first[first >= 0])
    additions, before, after = _additions(dataset)
    old, new = (dataset.isel(epoch=rows).drop_vars("epoch") for rows in (before, after))
    both = xr.DataArray(counted(old).variable & counted(new).variable)
    levels = [_means(side, name, first, starts, both) for side in (old, new)]
    change = (levels[1] - levels[0]).transpose("group", "epoch").reset_coords(drop=True)
    epochs = dataset.epoch.values
    return described(
        change.rename(group="cohort", epoch="boundary"),
        f"change of the mean of {name} from epoch_before to epoch_after",
        units=dataset[name].attrs.get("units", "1"),
        epochs=epochs_counted(dataset),
    ).assign_coords(
        cohort=np.arange(len(starts)),
        active_from=("cohort", starts),
        boundary=additions,
        epoch_before=("boundary", epochs[before]),
        epoch_after=("boundary", epochs[after]),
    )


def _additions(
    dataset: xr.Dataset,
) -> tuple[NDArray[np.int64], NDArray[np.intp], NDArray[np.intp]]:
    """Return at which epochs classes were added, and the rows of the weights around them."""
    epochs, trained = dataset.epoch.values, dataset.first_epoch_trained.values
    if known := (trained >= 0).any():
        additions = np.unique(trained[trained >= 0])[1:] - 1
    else:
        active = dataset.first_epoch_active.values
        additions = np.unique(active[active >= 0])[1:]
    # Weights known to precede the addition: the addition's own only if the schedule is recorded.
    before = np.searchsorted(epochs, additions, side="right" if known else "left") - 1
    after = np.searchsorted(epochs, additions, side="right")
    within = (before >= 0) & (after < len(epochs))
    return additions[within], before[within], after[within]


def _by_epoch(
    dataset: xr.Dataset,
    name: str,
    group: NDArray[np.generic],
    known: NDArray[np.generic],
    include_untrained: bool,
) -> xr.DataArray:
    means = _means(dataset, name, group, known, counted(dataset, include_untrained))
    return described(
        means.transpose("group", "epoch"),
        f"mean of {name}",
        units=dataset[name].attrs.get("units", "1"),
        epochs=epochs_counted(dataset, include_untrained),
    )


def _means(
    dataset: xr.Dataset,
    name: str,
    group: NDArray[np.generic],
    known: NDArray[np.generic],
    counts: xr.DataArray,
) -> xr.DataArray:
    """Average over the samples of each group that count, shape (groups, epochs)."""
    values = dataset[name].where(counts, 0).astype(np.float64)
    unknown = values.isnull()
    # A matrix product takes one pass over the data for all groups.
    member = xr.DataArray(
        (group[:, None] == known[None, :]).astype(np.float64), dims=("sample", "group")
    )
    total, count, lost = (
        xr.dot(part.astype(np.float64), member, dim="sample")
        for part in (values.where(~unknown, 0), counts, unknown)
    )
    means: xr.DataArray = (total / count.where(count > 0)).where(lost == 0)
    return means
