"""Pictures of the findings.

Colours are told apart by colour-blind readers and in print: the palette of Okabe & Ito, with other
line styles as well, and the map *cividis*, whose lightness grows along it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from daskcurv.analysis.groups import PARTS
from daskcurv.report.findings import LEVELS, Findings
from daskcurv.spread import evenly

STYLE: Any = {
    "font.size": 10,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 100,
}
MAP = "cividis"
LINES: tuple[tuple[str, Any], ...] = (
    ("#0072B2", "-"),
    ("#D55E00", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#56B4E9", (0, (5, 1))),
    ("#000000", (0, (3, 1, 1, 1))),
    ("#E69F00", (0, (1, 1))),
)

_LABEL = "curvature (nat)"
_WIDTH = 9.0


def draw(findings: Findings) -> dict[str, Figure]:
    """Draw every figure for which there are numbers.

    Parameters
    ----------
    findings : Findings

    Returns
    -------
    dict
        Figure by name, in the order of the page.
    """
    with mpl.rc_context(STYLE):
        drawn = {name: function(findings) for name, function in FIGURES.items()}
    return {name: figure for name, figure in drawn.items() if figure is not None}


def _cohort_medians(findings: Findings) -> Figure | None:
    medians = findings.cohorts[:, :, LEVELS.index(0.5)]
    if not _any(medians):
        return None
    figure, axes = _one(4.2)
    count = len(medians)
    few = count <= len(LINES)
    # Up to where the map is dark enough on white.
    colours = mpl.colormaps[MAP](np.linspace(0, 0.85, count))
    for number, (start, values) in enumerate(zip(findings.cohort_starts, medians, strict=True)):
        colour, line = LINES[number] if few else (colours[number], "-")
        axes.plot(
            findings.epochs, values, color=colour, ls=line, lw=1.4, marker=_marker(findings),
            label=f"added at epoch {start}",
        )  # fmt: skip
    _over_epochs(axes, findings)
    axes.set_ylabel(f"median {_LABEL}")
    if few:
        axes.legend(frameon=False)
    else:
        scale = mpl.cm.ScalarMappable(
            mpl.colors.BoundaryNorm(np.arange(count + 1) - 0.5, count),
            mpl.colors.ListedColormap(colours),
        )
        bar = figure.colorbar(scale, ax=axes, label="cohort: classes added together, by epoch")
        places = evenly(count, 6)
        bar.set_ticks(
            places.tolist(), labels=[str(findings.cohort_starts[place]) for place in places]
        )
    return figure


def _cohort_bands(findings: Findings) -> Figure | None:
    count = len(findings.cohorts)
    if not _any(findings.cohorts):
        return None
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, 0.6 + 1.7 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for number, axes in enumerate(grid.flat[:count]):
        _band(axes, findings, findings.cohorts[number])
        _over_epochs(axes, findings, labelled=number // columns == rows - 1, ticks=12 // columns)
        axes.set_title(f"added at epoch {findings.cohort_starts[number]}", fontsize=9)
    figure.supylabel(_LABEL, fontsize=10)
    return figure


def _classes(findings: Findings) -> Figure | None:
    means = findings.classes.values
    if not _any(means) or len(findings.epochs) < 2:
        return None
    figure, axes = _one(min(8.0, 1.6 + 0.18 * len(means)))
    axes.grid(False)
    mesh = axes.pcolormesh(
        *(_edges(findings.epochs), np.arange(len(means) + 1) - 0.5),
        np.ma.masked_invalid(means),
        norm=_log(means),
        cmap=MAP,
        rasterized=True,
    )
    axes.invert_yaxis()
    axes.set_xlabel("epoch")
    axes.set_ylabel("class, in class order")
    if len(means) <= 40:
        names = findings.classes.coords.get("class_title", findings.classes.class_label)
        axes.set_yticks(range(len(means)), [str(name) for name in names.values], fontsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(mesh, ax=axes, label=f"mean {_LABEL}")
    return figure


def _distributions(findings: Findings) -> Figure | None:
    positive = {e: v[v > 0] for e, v in findings.distributions.items() if (v > 0).sum() > 1}
    if not positive:
        return None
    everything = np.concatenate([*positive.values()])
    edges = np.geomspace(everything.min(), everything.max() * (1 + 1e-9), 61)
    if edges[0] >= edges[-1]:
        return None
    figure, axes = _one(3.8)
    for (colour, line), (epoch, values) in zip(LINES, positive.items(), strict=False):
        weights = np.full(len(values), 1 / len(values))
        axes.hist(
            values, edges.tolist(), weights=weights, histtype="step", color=colour, ls=line, lw=1.6,
            label=f"epoch {epoch} ({len(values):,} samples)",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel(_LABEL)
    axes.set_ylabel("part of the active samples")
    axes.legend(frameon=False)
    return figure


def _held_out(findings: Findings) -> Figure | None:
    if not all(_any(part) for part in findings.parts):
        return None
    figure, axes = _one(3.8)
    for values, name, line in zip(findings.parts, PARTS, LINES, strict=False):
        _band(axes, findings, values, line, name, wide=False)
    _over_epochs(axes, findings)
    axes.set_ylabel(_LABEL)
    axes.legend(frameon=False)
    return figure


def _against_loss(findings: Findings) -> Figure | None:
    curvature, loss = findings.curvature.values, findings.loss.values
    usable = (curvature > 0) & (loss > 0)
    if usable.sum() < 2:
        return None
    figure, axes = _one(4.4)
    axes.grid(False)
    cells = axes.hexbin(
        loss[usable], curvature[usable], xscale="log", yscale="log", gridsize=60, bins="log",
        mincnt=1, cmap=MAP, rasterized=True, linewidths=0.2,
    )  # fmt: skip
    axes.set_xlabel("mean loss over active epochs (nat)")
    axes.set_ylabel(f"mean {_LABEL} over active epochs")
    figure.colorbar(cells, ax=axes, label="samples")
    return figure


def _trajectories(findings: Findings) -> Figure | None:
    few = findings.trajectories
    figure, axes = _one(4.2)
    for number in range(few.sizes["sample"]):
        colour, line = LINES[number % len(LINES)]
        one = few.isel(sample=number)
        mean, error = one.curvature.values, one.curvature_stderr.values
        axes.plot(
            findings.epochs, mean, color=colour, ls=line, lw=1.4, marker=_marker(findings),
            label=describe_sample(one),
        )  # fmt: skip
        low = np.maximum(mean - error, np.nanmin(mean) / 10 if _any(mean) else 0)
        axes.fill_between(findings.epochs, low, mean + error, color=colour, alpha=0.2, lw=0)
    _over_epochs(axes, findings)
    axes.set_ylabel(_LABEL)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    return figure


def _sampling_error(findings: Findings) -> Figure | None:
    if not _any(findings.relative_errors):
        return None
    figure, axes = _one(3.2)
    _band(axes, findings, findings.relative_errors)
    _over_epochs(axes, findings, logarithmic=False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("standard error / curvature")
    return figure


FIGURES: dict[str, Callable[[Findings], Figure | None]] = {
    "cohort_medians": _cohort_medians,
    "cohort_bands": _cohort_bands,
    "classes": _classes,
    "distributions": _distributions,
    "held_out": _held_out,
    "against_loss": _against_loss,
    "trajectories": _trajectories,
    "sampling_error": _sampling_error,
}


def describe_sample(sample: xr.Dataset | xr.DataArray) -> str:
    """Return a sample's number and label, by name where the class has one."""
    name = sample.coords.get("class_name")
    label = str(name.values) if name is not None and str(name.values) else str(sample.label.values)
    return f"sample {int(sample.sample)}, {label}"


def _one(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _band(
    axes: Axes,
    findings: Findings,
    quantiles: NDArray[np.float64],
    line: tuple[str, Any] = LINES[0],
    label: str | None = None,
    wide: bool = True,
) -> None:
    """Draw the median, the band of a half, and perhaps the wide one of nine tenths."""
    epochs, (colour, style) = findings.epochs, line
    outer, inner = (0, len(LEVELS) - 1), (1, len(LEVELS) - 2)
    for (low, high), alpha in ((outer, 0.15), (inner, 0.3))[not wide :]:
        axes.fill_between(
            epochs, quantiles[:, low], quantiles[:, high], color=colour, alpha=alpha, lw=0
        )
    median = quantiles[:, LEVELS.index(0.5)]
    axes.plot(epochs, median, color=colour, ls=style, lw=1.4, marker=_marker(findings), label=label)


def _over_epochs(
    axes: Axes,
    findings: Findings,
    labelled: bool = True,
    logarithmic: bool = True,
    ticks: int = 10,
) -> None:
    """Mark task boundaries and set up the axes."""
    for epoch in findings.boundaries:
        axes.axvline(epoch, color="0.6", lw=0.8, ls=":", zorder=0)
    if logarithmic:
        axes.set_yscale("log")
    if labelled:
        axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(ticks, integer=True))


def _marker(findings: Findings) -> str | None:
    return "." if len(findings.epochs) <= 30 else None


def _any(values: NDArray[Any]) -> bool:
    return bool(np.isfinite(values).any())


def _log(values: NDArray[np.float64]) -> LogNorm | None:
    positive = values[np.isfinite(values) & (values > 0)]
    return LogNorm(positive.min(), positive.max()) if len(positive) else None


def _edges(centres: NDArray[np.int64]) -> NDArray[np.float64]:
    middles = (centres[1:] + centres[:-1]) / 2
    ends = centres[0] - (middles[0] - centres[0]), centres[-1] + (centres[-1] - middles[-1])
    return np.concatenate([[ends[0]], middles, [ends[1]]])
