"""One number for each sample, from its values at the epochs that count.

An epoch counts for a sample if the store has it, the sample was computed at it, and its weights had
been trained on the sample's class. Weights that had not (those of epoch 0, and those of the epoch
at which the class is added) say nothing about what is memorized of the sample, and the curvature
there is so much larger that it would decide every sum and mean. ``include_untrained=True`` counts
them as well. Where a store does not record the schedule, as an imported one, every epoch counts at
which the sample was computed. The attribute ``epochs`` of each result says which were counted.

With every 200th epoch stored, sums and counts are over these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray

from daskcurv.config import check_choice
from daskcurv.errors import ConfigError
from daskcurv.storage import schema

NORMS = ("squared", "plain")

_SORTED_AT_ONCE = 2**22
"""Values, by each thread."""


def counted(dataset: xr.Dataset, include_untrained: bool = False) -> xr.DataArray:
    """Return which epochs count for which samples.

    Parameters
    ----------
    dataset : xarray.Dataset
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.DataArray of bool, dimensions ``(epoch, sample)``

    Raises
    ------
    ConfigError
        If the dataset does not say which weights had been trained.
    """
    active: xr.DataArray = dataset.status == schema.COMPUTED
    if include_untrained:
        return active
    if "trained" not in dataset.coords:
        raise ConfigError(
            "the dataset has no coordinate 'trained', which says which weights had been trained on "
            "a sample's class; open the store with daskcurv.open_results, or count every epoch "
            "with include_untrained=True"
        )
    counts: xr.DataArray = active & dataset.trained
    return counts


def epochs_counted(dataset: xr.Dataset, include_untrained: bool = False) -> str:
    """Say which epochs count."""
    if include_untrained:
        return "active epochs, whether or not weights had been trained on the sample's class"
    first = dataset.coords.get("first_epoch_trained")
    if first is not None and not (first >= 0).any():
        return "active epochs; whether weights had been trained on the sample's class is not known"
    return "active epochs whose weights had been trained on the sample's class"


def described(array: xr.DataArray, long_name: str, **attrs: Any) -> xr.DataArray:
    """Return an array with these attributes and not those of what it was computed from."""
    result: xr.DataArray = array.drop_attrs(deep=False).assign_attrs(long_name=long_name, **attrs)
    return result


def active_epochs(dataset: xr.Dataset, *, include_untrained: bool = False) -> xr.DataArray:
    """Count the epochs that count for a sample.

    Parameters
    ----------
    dataset : xarray.Dataset
    include_untrained : bool
        As for `counted`.

    Returns
    -------
    xarray.DataArray of int64, dimension ``sample``
    """
    return described(
        counted(dataset, include_untrained).sum("epoch"),
        "active epochs",
        units="1",
        epochs=epochs_counted(dataset, include_untrained),
    )


def cumulative(dataset: xr.Dataset, name: str, *, include_untrained: bool = False) -> xr.DataArray:
    """Sum a measure over epochs.

    Of ``loss`` this is the cumulative sample loss (CSL) of Ravikumar et al., "Towards Memorization
    Estimation: Fast, Formal and Free" (ICML 2025); of ``curvature`` the cumulative curvature.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        NaN for samples for which no epoch counts, and for those whose measure is not a number at
        one that does.
    """
    counts = counted(dataset, include_untrained)
    total = dataset[name].where(counts, 0).astype(np.float64).sum("epoch", skipna=False)
    return _of_measure(total.where(counts.any("epoch")), "sum", dataset, name, include_untrained)


def mean_over_active_epochs(
    dataset: xr.Dataset, name: str, *, include_untrained: bool = False
) -> xr.DataArray:
    """Average a measure over epochs.

    Cumulative sums grow with the number of epochs summed; where classes arrive at different epochs
    the mean makes their samples comparable.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        NaN as for `cumulative`.
    """
    total = cumulative(dataset, name, include_untrained=include_untrained)
    mean = total / active_epochs(dataset, include_untrained=include_untrained)
    return _of_measure(mean, "mean", dataset, name, include_untrained)


def median_over_active_epochs(
    dataset: xr.Dataset, name: str, *, include_untrained: bool = False
) -> xr.DataArray:
    """Return the median of a measure over epochs.

    A few epochs with very large values decide a mean, as those right after a class was added; they
    move the median little.

    Parameters
    ----------
    dataset : xarray.Dataset
        If it has Dask arrays, the whole measure is held in memory for it.
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        Of an even number of epochs the mean of the two in the middle; NaN as for `cumulative`.
    """
    counts = counted(dataset, include_untrained)
    values = dataset[name].where(counts, np.inf)
    if values.chunks is not None:
        values = values.chunk(
            {"epoch": -1, "sample": max(1, _SORTED_AT_ONCE // counts.sizes["epoch"])}
        )
    median = xr.apply_ufunc(
        _median_of_first,
        values,
        counts.sum("epoch"),
        input_core_dims=[["epoch"], []],
        dask="parallelized",
        output_dtypes=[np.float64],
    )
    return _of_measure(median, "median", dataset, name, include_untrained)


def _median_of_first(
    values: NDArray[np.floating[Any]], count: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Return the median of the `count` values of each row that are not filled with infinity."""
    # What is filled comes after what counts, and what is not a number last of all.
    ordered = np.sort(values, axis=-1)
    middle = np.stack([np.maximum(count - 1, 0) // 2, count // 2], axis=-1)
    middle = np.minimum(middle, values.shape[-1] - 1)
    median = np.take_along_axis(ordered, middle, axis=-1).astype(np.float64).mean(axis=-1)
    unknown = (count == 0) | np.isnan(ordered[..., -1])
    return np.where(unknown, np.nan, median)


def _of_measure(
    array: xr.DataArray, what: str, dataset: xr.Dataset, name: str, include_untrained: bool
) -> xr.DataArray:
    attrs = dataset[name].attrs
    return described(
        array,
        f"{what} over active epochs of {attrs.get('long_name', name)}",
        units=attrs.get("units", "1"),
        epochs=epochs_counted(dataset, include_untrained),
    )


def learning_time(
    dataset: xr.Dataset,
    norm: str = "squared",
    tau: float | None = None,
    *,
    include_untrained: bool = False,
) -> xr.DataArray:
    """Return for what part of its epochs a sample was not learned yet.

    A sample counts as learned at an epoch if the running mean of its gradient norms, over the
    epochs that count up to that one, is below τ: the learning condition of Ravikumar et al.,
    "Towards Memorization Estimation: Fast, Formal and Free" (ICML 2025).

    Parameters
    ----------
    dataset : xarray.Dataset
    norm : {"squared", "plain"}
        Means of the squared norms, as in the paper's theory, or of the norms themselves, as in code
        that was released with it.
    tau : float, optional
        By default the mean of all running means, over samples and epochs, as in that code.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        From 0 (learned throughout) to 1 (never learned); the attribute ``tau`` says what was used.
        NaN for samples for which no epoch counts, and for those with a norm that is not a number
        at one that does, which the default `tau` leaves out.
    """
    check_choice("norm", norm, NORMS)
    counts = counted(dataset, include_untrained)
    norms = dataset.grad_norm.astype(np.float64)
    values = (norms**2 if norm == "squared" else norms).where(counts, 0)
    # A NaN stays in all sums after it.
    count = counts.cumsum("epoch")
    running = (values.cumsum("epoch", skipna=False) / count.where(count > 0)).where(counts)
    known = counts.any("epoch") & ~(values.isnull().any("epoch"))
    running = running.where(known)
    if tau is None:
        tau = float(running.mean())
    learned = (running < tau).sum("epoch")
    part: xr.DataArray = 1 - learned / active_epochs(
        dataset, include_untrained=include_untrained
    ).where(known)
    return described(
        part,
        f"part of active epochs before the mean {norm} gradient norm is below tau",
        units="1",
        tau=tau,
        epochs=epochs_counted(dataset, include_untrained),
    )


def threshold_learning_time(
    dataset: xr.Dataset, threshold: float, name: str = "loss", *, include_untrained: bool = False
) -> xr.DataArray:
    """Return when a measure of a sample first is at most a threshold.

    Parameters
    ----------
    dataset : xarray.Dataset
    threshold : float
        In the unit of the measure.
    name : str
        A per-sample variable.
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        How many of the sample's epochs count up to that one, which is included; NaN where the
        measure never comes to that.
    """
    counts = counted(dataset, include_untrained)
    # The count grows with the epoch, so that at the first epoch is the least.
    count = counts.cumsum("epoch").where(counts & (dataset[name] <= threshold))
    first = count.min("epoch", skipna=True).astype(np.float64)
    return described(
        first,
        f"epochs until {name} is ≤ {threshold:g}",
        units="1",
        epochs=epochs_counted(dataset, include_untrained),
    )


def forgetting_events(dataset: xr.Dataset, *, include_untrained: bool = False) -> xr.Dataset:
    """Count how often a sample goes from being classified correctly to being classified wrongly.

    Forgetting events of Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural
    Network Learning" (ICLR 2019), with the epochs of the store in place of training steps.

    Parameters
    ----------
    dataset : xarray.Dataset
    include_untrained : bool
        Whether epochs count whose weights had not been trained on the sample's class.

    Returns
    -------
    xarray.Dataset, dimension ``sample``
        ``forgetting_events``, int64: transitions from correct to wrong between epochs that follow
        each other and both count. ``ever_learned``, bool: whether it is classified correctly at
        any epoch that counts; one that never is has no events, and is not to be taken for
        unforgettable.
    """
    counts = counted(dataset, include_untrained)
    correct = counts & (dataset.prediction == dataset.label)
    wrong = counts & ~correct
    # Pairs of epochs, which a store with a single one does not have; coordinates are of one epoch.
    forgotten = wrong.variable.isel(epoch=slice(1, None)) & correct.variable.isel(
        epoch=slice(None, -1)
    )
    events = counts.sum("epoch").copy(data=forgotten.sum("epoch").data)
    epochs = epochs_counted(dataset, include_untrained)
    return xr.Dataset(
        {
            "forgetting_events": described(
                events, "transitions from correct to wrong", units="1", epochs=epochs
            ),
            "ever_learned": described(
                correct.any("epoch"), "classified correctly at some active epoch", epochs=epochs
            ),
        }
    )
