"""What a report says in words and numbers: tables of the page, with how many samples each is of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from daskcurv import analysis
from daskcurv.analysis.groups import PARTS
from daskcurv.experiment.identity import Recorded
from daskcurv.report.findings import LEVELS, Findings
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.chunks import shown
from daskcurv.storage.finite import told

NOT_KNOWN = "not known"
_LISTED = 12

Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Table:
    """Rows under a heading; the first column names them."""

    head: tuple[str, ...]
    rows: Rows


def facts(store: Path, findings: Findings) -> Rows:
    """Return what was run, as names and values.

    Of results that were imported, what the files do not say is not known: what the store has in
    its place is no record of anything.
    """
    dataset = findings.dataset
    identity = identity_of(dataset)
    recorded = Recorded.of(identity)
    complete = int(dataset.complete.sum())
    methods = sorted({text for text in map(str, dataset.method.values) if text})
    rows: Rows = [
        ("store", str(store.absolute())),
        ("fingerprint", dataset.attrs["fingerprint"]),
        ("epochs", f"{dataset.sizes['epoch']:,}, of which {complete:,} are complete"),
        ("samples", f"{dataset.sizes['sample']:,}; {findings.values:,} (epoch, sample) values"),
        ("network", _plain(recorded.network)),
        ("estimator", NOT_KNOWN if findings.imported else _plain(identity["estimator"])),
        ("computed by", ", ".join(methods) or NOT_KNOWN),
        ("loss over", f"{recorded.head} outputs" if recorded.head else NOT_KNOWN),
        ("classes", _plain(identity.get("classes", {}), leave_out=("order",))),
        ("data set", _plain(recorded.dataset)),
        ("class order", str(dataset.attrs.get("class_order_source", NOT_KNOWN))),
        ("weights", _weights(dataset)),
        ("written by", _writer(dataset)),
    ]
    if findings.imported:
        factor = recorded.multiplied_by
        rows.append(("imported", f"from npy files, gradients multiplied by {factor}"))
    return rows + _speed(findings)


def definition(findings: Findings) -> str:
    """Say what the curvature is; the measures' definitions are those of `daskcurv.estimators`."""
    if findings.imported:
        return "The results were imported: how their curvature was computed is not known."
    scale = (
        "of each sample's own loss L, in nats, with the step h and the images as normalised below. "
        "Compare it only with results of the same h."
    )
    if not Recorded.of(identity_of(findings.dataset)).differentiates:
        return (
            "Curvature is the mean over pairs of random directions u, v of h·|q|, q the second "
            f"difference along them that estimates vᵀ∇²L(x)u, {scale}"
        )
    return f"Curvature is the mean over random directions v of ‖∇L(x + hv) − ∇L(x)‖, {scale}"


def left_out(findings: Findings) -> str:
    """Say which results do not count, because the weights had not been trained on the class."""
    if (findings.dataset.first_epoch_trained.values < 0).all():
        return (
            "When the classes were trained is not known, so means and ranks are over all epochs at "
            "which a sample's class is active."
        )
    count = int(findings.untrained.sum())
    if not count:
        return "At all epochs shown, the weights had been trained on the classes of the samples."
    epochs = findings.untrained.epoch.values[findings.untrained.values > 0]
    what = (
        f"{count:,} of {findings.values:,} (epoch, sample) values, at {_listed(epochs)}, are of "
        "weights that had not been trained on the sample's class yet"
    )
    if findings.include_untrained:
        return f"{what}; they are included."
    return f"{what}; they are left out, except from the curves of single samples."


def not_usable(findings: Findings) -> str:
    """Say which results are not finite numbers, and which blocks are lost; "" for none."""
    texts = []
    if findings.not_finite:
        texts.append(
            f"{sum(findings.not_finite.values()):,} results are not finite numbers, at epochs "
            f"{told(findings.not_finite)}. Quantiles leave them out; a mean over epochs that "
            "includes one is not finite either."
        )
    if findings.lost:
        texts.append(
            f"{len(findings.lost):,} blocks have lost a file and are left out: "
            f"{shown(findings.lost)}."
        )
    return " ".join(texts)


def comparability(findings: Findings) -> str:
    """Say which samples are not compared because the store is not finished; "" for none."""
    if not findings.not_comparable:
        return ""
    return (
        f"{findings.not_comparable:,} samples lack results at epochs at which others of their "
        "cohort have some; they are left out where means over epochs are compared."
    )


def correlations(findings: Findings) -> Table | None:
    """Return the rank correlation of curvature and loss within each cohort, and combined."""
    measures = xr.Dataset({"curvature": findings.curvature, "loss": findings.loss})
    found = analysis.rank_correlation_by_cohort(measures).sel(measure="curvature", other="loss")
    found = found.isel(cohort=np.flatnonzero(found.samples.values > 0))
    if not found.sizes["cohort"]:
        return None
    rows: Rows = [
        (
            _added(start),
            f"{count:,}",
            _estimate("{:.3f}", *values),
        )
        for start, count, *values in zip(
            *(found[name].values for name in ("active_from", "samples", "rank_correlation")),
            *(found[name].values for name in ("low", "high")),
            strict=True,
        )
    ]
    if len(rows) > 1:
        names = ("combined", "combined_low", "combined_high")
        value = _estimate("{:.3f}", *(float(found[name]) for name in names))
        rows.append(("cohorts combined", f"{int(found.samples.sum()):,}", value))
    return Table(("cohort", "samples", "Spearman's rank correlation (95 % interval)"), rows)


def held_out(findings: Findings) -> Table:
    """Return medians of trained-on and of held-out samples, cohort by cohort."""
    rows: Rows = []
    split, known = findings.dataset.split.values, findings.curvature.notnull().values
    for number, start in enumerate(findings.cohort_starts):
        for part, name in enumerate(PARTS):
            own = known & (findings.cohort == number) & (split == part)
            estimates = [
                _estimate("{:#.3g}", *analysis.median_interval(measure.values[own]))
                for measure in (findings.curvature, findings.loss)
            ]
            rows.append((_added(start), name, f"{own.sum():,}", *estimates))
    measured = ("median curvature (95 % interval)", "median loss (95 % interval)")
    return Table(("cohort", "part", "samples", *measured), rows)


def sampling_errors(findings: Findings) -> Table:
    """Return the typical relative standard error of each cohort: over epochs, in the median."""
    places = [LEVELS.index(level) for level in (0.5, 0.25, 0.75)]
    rows: Rows = []
    for start, quantiles in zip(findings.cohort_starts, findings.relative_errors, strict=True):
        known = quantiles[np.isfinite(quantiles).all(axis=1)][:, places]
        if len(known):
            median, low, high = np.median(known, axis=0)
            rows.append((_added(start), f"{median:.1%}", f"{low:.1%} to {high:.1%}"))
    return Table(("cohort", "median", "middle half of the samples"), rows)


def of_cohorts(findings: Findings, samples: Sequence[int]) -> str:
    """Say which cohorts some samples are of, and how many were held out."""
    numbers, counts = np.unique(findings.cohort[list(samples)], return_counts=True)
    parts = [
        f"{count} {_added(findings.cohort_starts[number])}"
        for number, count in zip(numbers, counts, strict=True)
    ]
    text = ", ".join(parts)
    if findings.imported:
        return text
    held = int((findings.dataset.split.values[list(samples)] == 1).sum())
    return f"{text}; {held} of them held out"


def _added(start: int) -> str:
    return f"added at epoch {start}"


def _estimate(digits: str, value: float, low: float, high: float) -> str:
    if np.isnan(value):
        return "not defined"
    interval = "too few samples" if np.isnan(low) else f"{digits} to {digits}".format(low, high)
    return f"{digits.format(value)} ({interval})"


def _listed(epochs: Iterable[int]) -> str:
    texts = [str(epoch) for epoch in epochs]
    if len(texts) == 1:
        return f"epoch {texts[0]}"
    if len(texts) > _LISTED:
        return f"{len(texts):,} epochs ({', '.join(texts[:_LISTED])}, …)"
    return f"epochs {', '.join(texts[:-1])} and {texts[-1]}"


def _weights(dataset: xr.Dataset) -> str:
    """Return the first and the last checkpoint; the store has all of them on record."""
    files = [
        f"{name} (sha256 {sha256})" if sha256 else str(name)
        for name, sha256 in zip(
            dataset.checkpoint.values, dataset.checkpoint_sha256.values, strict=True
        )
        if name
    ]
    return " to ".join(dict.fromkeys([files[0], files[-1]])) if files else NOT_KNOWN


def _writer(dataset: xr.Dataset) -> str:
    version = dataset.attrs.get("daskcurv_version")
    return f"daskcurv {version}" if version else NOT_KNOWN


def _speed(findings: Findings) -> Rows:
    dataset = findings.dataset
    seconds = float(dataset.compute_seconds.sum())
    if not seconds:
        return []
    spent = timedelta(seconds=round(seconds))
    if findings.imported:
        # Whether an older script's seconds are those of one worker, its files do not say.
        return [("computed in", f"{spent}, by the record of the imported files")]
    return [
        (
            "throughput",
            f"{findings.values / seconds:,.1f} samples/s per worker, {spent} of worker time, "
            f"at most {int(dataset.num_workers.max())} workers at an epoch",
        )
    ]


def _plain(values: Mapping[str, Any], leave_out: Sequence[str] = ()) -> str:
    text = ", ".join(f"{name} {value}" for name, value in values.items() if name not in leave_out)
    return text or NOT_KNOWN
