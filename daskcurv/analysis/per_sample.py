"""One number for each sample, from its values at all active epochs.

Everywhere below, an epoch counts if the store has it; with every 200th epoch stored, sums and
counts are over these.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from daskcurv.config import check_choice
from daskcurv.storage import schema

NORMS = ("squared", "plain")


def _is_active(dataset: xr.Dataset) -> xr.DataArray:
    """Return where a sample was computed, shape (epoch, sample)."""
    active: xr.DataArray = dataset.status == schema.COMPUTED
    return active


def described(array: xr.DataArray, long_name: str, **attrs: Any) -> xr.DataArray:
    """Return an array with these attributes and not those of what it was computed from."""
    result: xr.DataArray = array.drop_attrs(deep=False).assign_attrs(long_name=long_name, **attrs)
    return result


def active_epochs(dataset: xr.Dataset) -> xr.DataArray:
    """Count the epochs at which a sample is active.

    Parameters
    ----------
    dataset : xarray.Dataset

    Returns
    -------
    xarray.DataArray of int64, dimension ``sample``
    """
    return described(_is_active(dataset).sum("epoch"), "active epochs", units="1")


def cumulative(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Sum a measure over active epochs.

    Of ``loss`` this is the cumulative sample loss (CSL) of Ravikumar et al., "Towards Memorization
    Estimation: Fast, Formal and Free" (ICML 2025); of ``curvature`` the cumulative curvature.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        NaN for samples that are never active, and for those whose measure is not a number at some
        active epoch.
    """
    active = _is_active(dataset)
    total = dataset[name].where(active, 0).astype(np.float64).sum("epoch", skipna=False)
    label = dataset[name].attrs.get("long_name", name)
    return described(
        total.where(active.any("epoch")),
        f"sum over active epochs of {label}",
        units=dataset[name].attrs.get("units", "1"),
    )


def mean_over_active_epochs(dataset: xr.Dataset, name: str) -> xr.DataArray:
    """Average a measure over active epochs.

    Cumulative sums grow with the number of epochs summed; where classes arrive at different epochs
    the mean makes their samples comparable.

    Parameters
    ----------
    dataset : xarray.Dataset
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        NaN as for `cumulative`.
    """
    mean = cumulative(dataset, name) / active_epochs(dataset)
    label = dataset[name].attrs.get("long_name", name)
    return described(
        mean,
        f"mean over active epochs of {label}",
        units=dataset[name].attrs.get("units", "1"),
    )


def learning_time(
    dataset: xr.Dataset, norm: str = "squared", tau: float | None = None
) -> xr.DataArray:
    """Return for what part of its active epochs a sample was not learned yet.

    A sample counts as learned at an epoch if the running mean of its gradient norms, over active
    epochs up to that one, is below τ: the learning condition of Ravikumar et al., "Towards
    Memorization Estimation: Fast, Formal and Free" (ICML 2025).

    Parameters
    ----------
    dataset : xarray.Dataset
    norm : {"squared", "plain"}
        Means of the squared norms, as in the paper's theory, or of the norms themselves, as in code
        that was released with it.
    tau : float, optional
        By default the mean of all running means, over samples and epochs, as in that code.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        From 0 (learned throughout) to 1 (never learned); the attribute ``tau`` says what was used.
        NaN for samples that are never active, and for those with a norm that is not a number at
        some active epoch, which the mean leaves out.
    """
    check_choice("norm", norm, NORMS)
    active = _is_active(dataset)
    norms = dataset.grad_norm.astype(np.float64)
    values = (norms**2 if norm == "squared" else norms).where(active, 0)
    # A NaN stays in all sums after it.
    count = active.cumsum("epoch")
    running = (values.cumsum("epoch", skipna=False) / count.where(count > 0)).where(active)
    known = active.any("epoch") & ~(values.isnull().any("epoch"))
    running = running.where(known)
    if tau is None:
        tau = float(running.mean())
    learned = (running < tau).sum("epoch")
    part: xr.DataArray = 1 - learned / active_epochs(dataset).where(known)
    return described(
        part,
        f"part of active epochs before the mean {norm} gradient norm is below tau",
        units="1",
        tau=tau,
    )


def threshold_learning_time(
    dataset: xr.Dataset, threshold: float, name: str = "loss"
) -> xr.DataArray:
    """Return when a measure of a sample first is at most a threshold.

    Parameters
    ----------
    dataset : xarray.Dataset
    threshold : float
        In the unit of the measure.
    name : str
        A per-sample variable.

    Returns
    -------
    xarray.DataArray of float64, dimension ``sample``
        How many epochs the sample had been active for, that one included; NaN where it never comes
        to that.
    """
    active = _is_active(dataset)
    # The count grows with the epoch, so that at the first epoch is the least.
    count = active.cumsum("epoch").where(active & (dataset[name] <= threshold))
    first = count.min("epoch", skipna=True).astype(np.float64)
    return described(first, f"epochs until {name} is ≤ {threshold:g}", units="1")


def forgetting_events(dataset: xr.Dataset) -> xr.Dataset:
    """Count how often a sample goes from being classified correctly to being classified wrongly.

    Forgetting events of Toneva et al., "An Empirical Study of Example Forgetting during Deep Neural
    Network Learning" (ICLR 2019), with the epochs of the store in place of training steps.

    Parameters
    ----------
    dataset : xarray.Dataset

    Returns
    -------
    xarray.Dataset, dimension ``sample``
        ``forgetting_events``, int64: transitions from correct to wrong between epochs that follow
        each other and at both of which the sample is active. ``ever_learned``, bool: whether it is
        classified correctly at any active epoch; one that never is has no events, and is not to be
        taken for unforgettable.
    """
    active = _is_active(dataset)
    correct = active & (dataset.prediction == dataset.label)
    events = active & ~correct & correct.shift(epoch=1, fill_value=False)
    return xr.Dataset(
        {
            "forgetting_events": described(
                events.sum("epoch"), "transitions from correct to wrong", units="1"
            ),
            "ever_learned": described(
                correct.any("epoch"), "classified correctly at some active epoch"
            ),
        }
    )
