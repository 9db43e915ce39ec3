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
from daskcurv.experiment.curriculum import VALIDATION
from daskcurv.report.findings import LEVELS, Findings, sizes
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

MARKERS = ("o", "^", "s", "D", "v", "P", "X")

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
    if not _any(findings.cohorts):
        return None
    figure, axes = _one(4.2)
    for number, (look, name) in enumerate(_looks(findings)):
        _line(axes, findings, findings.cohorts[number], look, name)
    _over_epochs(axes, findings)
    axes.set_ylabel(f"median {_LABEL}")
    _key(figure, axes, findings)
    return figure


def _cohort_bands(findings: Findings) -> Figure | None:
    if not _any(findings.cohorts):
        return None
    figure, panels, titles = _panels(findings)
    counts = sizes(findings)
    for number, axes in enumerate(panels):
        _band(axes, findings, findings.cohorts[number])
        axes.set_title(f"{titles[number]}\n{counts[number]:,} samples", fontsize=8)
    figure.supylabel(_LABEL, fontsize=10)
    return figure


def _classes(findings: Findings) -> Figure | None:
    """Draw a column for each epoch: nothing is known of the epochs between those of the store."""
    means = findings.classes.values
    if not _any(means):
        return None
    figure, axes = _one(min(8.0, 1.6 + 0.18 * len(means)))
    axes.grid(False)
    epochs = findings.epochs
    mesh = axes.pcolormesh(
        *(np.arange(len(epochs) + 1) - 0.5, np.arange(len(means) + 1) - 0.5),
        np.ma.masked_invalid(means),
        norm=_log(means),
        cmap=MAP,
        rasterized=True,
    )
    axes.invert_yaxis()
    axes.set_xlabel("epoch (one column per drawn epoch)")
    axes.set_ylabel("class, in class order")
    columns = np.arange(0, len(epochs), -(-len(epochs) // 13))
    axes.set_xticks(columns, [str(epoch) for epoch in epochs[columns]])
    for column in np.flatnonzero(np.isin(epochs, findings.boundaries)):
        axes.axvline(column - 0.5, color="0.6", lw=0.8, ls=":")
    if len(means) <= 40:
        names = findings.classes.coords.get("class_title", findings.classes.class_label)
        axes.set_yticks(range(len(means)), [str(name) for name in names.values], fontsize=8)
    figure.colorbar(mesh, ax=axes, label=f"mean {_LABEL}")
    return figure


def _distributions(findings: Findings) -> Figure | None:
    some = {
        epoch: cohorts
        for epoch, cohorts in findings.distributions.items()
        if any((values > 0).any() for values in cohorts)
    }
    positive = [values[values > 0] for cohorts in some.values() for values in cohorts]
    everything = np.concatenate([np.empty(0), *positive])
    if len(everything) < 2 or everything.min() == everything.max():
        return None
    edges = np.geomspace(everything.min(), everything.max() * (1 + 1e-9), 41).tolist()
    rows = -(-len(some) // 2)
    figure = Figure(figsize=(_WIDTH, 0.6 + 2.2 * rows), layout="constrained")
    grid = figure.subplots(rows, min(len(some), 2), sharex=True, sharey=True, squeeze=False)
    _blank_from(grid, len(some))
    for axes, (epoch, cohorts) in zip(grid.flat, some.items(), strict=False):
        for ((colour, line), name), values in zip(_looks(findings), cohorts, strict=True):
            if len(values):
                axes.hist(
                    values[values > 0], edges, histtype="step", color=colour, ls=line, lw=1.5,
                    weights=np.full(int((values > 0).sum()), 1 / len(values)),
                    label=f"{name} ({len(values):,})",
                )  # fmt: skip
        axes.set_xscale("log")
        axes.set_title(f"epoch {epoch}", fontsize=9)
        if _few(findings):
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel(_LABEL, fontsize=10)
    figure.supylabel("fraction of the cohort's samples", fontsize=10)
    if not _few(findings):
        _key(figure, list(grid.flat), findings)
    return figure


def _held_out(findings: Findings) -> Figure | None:
    if not all(_any(part) for part in findings.parts):
        return None
    figure, panels, titles = _panels(findings)
    counts = [sizes(findings, part) for part in range(len(PARTS))]
    for number, axes in enumerate(panels):
        for part, (name, line) in enumerate(zip(PARTS, LINES, strict=False)):
            _band(axes, findings, findings.parts[part, number], line, name, wide=False)
        both = ", ".join(f"{counts[part][number]:,} {name}" for part, name in enumerate(PARTS))
        axes.set_title(f"{titles[number]}\n{both}", fontsize=8)
    panels[0].legend(frameon=False, fontsize=8)
    figure.supylabel(_LABEL, fontsize=10)
    return figure


def _against_loss(findings: Findings) -> Figure | None:
    curvature, loss = findings.curvature.values, findings.loss.values
    usable = (curvature > 0) & (loss > 0)
    if usable.sum() < 2:
        return None
    figure, axes = _one(4.6)
    for number, ((colour, _), name) in enumerate(_looks(findings)):
        own = usable & (findings.cohort == number)
        axes.scatter(
            loss[own], curvature[own], s=6, color=colour, lw=0, alpha=0.5, rasterized=True,
            marker=MARKERS[number % len(MARKERS)], label=f"{name} ({own.sum():,})",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("mean loss (nat)")
    axes.set_ylabel(f"mean {_LABEL}")
    _key(figure, axes, findings, markerscale=3)
    return figure


def _trajectories(findings: Findings) -> Figure | None:
    few = findings.trajectories
    figure, axes = _one(4.2)
    for number in range(few.sizes["sample"]):
        colour, line = LINES[number % len(LINES)]
        one = few.isel(sample=number)
        trained = one.trained.values
        mean, error = one.curvature.values, one.curvature_stderr.values
        solid = np.where(trained, mean, np.nan)
        axes.plot(
            findings.epochs, solid, color=colour, ls=line, lw=1.4, marker=_marker(findings),
            label=describe_sample(one),
        )  # fmt: skip
        axes.plot(
            findings.epochs, np.where(trained, np.nan, mean), color=colour, ls="", marker="o",
            mfc="none", ms=5,
        )  # fmt: skip
        low = np.maximum(solid - error, np.nanmin(solid) / 10 if _any(solid) else 0)
        axes.fill_between(findings.epochs, low, solid + error, color=colour, alpha=0.2, lw=0)
    _over_epochs(axes, findings)
    axes.set_ylabel(_LABEL)
    figure.legend(frameon=False, fontsize=9, ncols=3, loc="outside lower center")
    return figure


def _sampling_error(findings: Findings) -> Figure | None:
    if not _any(findings.relative_errors):
        return None
    figure, axes = _one(3.4)
    for number, (look, name) in enumerate(_looks(findings)):
        if _few(findings):
            _band(axes, findings, findings.relative_errors[number], look, name, wide=False)
        else:
            _line(axes, findings, findings.relative_errors[number], look, name)
    _over_epochs(axes, findings, logarithmic=False)
    axes.set_ylim(bottom=0)
    axes.set_ylabel("standard error / curvature")
    _key(figure, axes, findings)
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


def class_of(sample: xr.Dataset | xr.DataArray) -> str:
    """Return the name of a sample's class, or its number where the class has no name."""
    name = sample.coords.get("class_name")
    return str(name.values) if name is not None and str(name.values) else str(sample.label.values)


def describe_sample(sample: xr.Dataset | xr.DataArray, labelled: bool = True) -> str:
    """Return a sample's number, its class, and whether it was held out from training."""
    parts = [f"sample {int(sample.sample)}"]
    if labelled:
        parts.append(class_of(sample))
    if int(sample.split) == VALIDATION:
        parts.append(PARTS[1])
    return ", ".join(parts)


def _looks(findings: Findings) -> list[tuple[tuple[Any, Any], str]]:
    """Return the colour and line of each cohort, and its name."""
    starts = findings.cohort_starts
    names = [f"added at epoch {start}" for start in starts]
    if _few(findings):
        return list(zip(LINES, names, strict=False))
    # Up to where the map is dark enough on white.
    colours = mpl.colormaps[MAP](np.linspace(0, 0.85, len(starts)))
    return [((colour, "-"), name) for colour, name in zip(colours, names, strict=True)]


def _few(findings: Findings) -> bool:
    return len(findings.cohort_starts) <= len(LINES)


def _key(
    figure: Figure, axes: Axes | list[Axes], findings: Findings, markerscale: float = 1
) -> None:
    """Say which colour is which cohort: with a legend, or for many with a bar."""
    if isinstance(axes, Axes) and _few(findings):
        axes.legend(frameon=False, markerscale=markerscale)
        return
    count = len(findings.cohort_starts)
    scale = mpl.cm.ScalarMappable(
        mpl.colors.BoundaryNorm(np.arange(count + 1) - 0.5, count),
        mpl.colors.ListedColormap([look[0] for look, _ in _looks(findings)]),
    )
    bar = figure.colorbar(scale, ax=axes, label="cohort: classes added together, by epoch")
    places = evenly(count, 6)
    bar.set_ticks(places.tolist(), labels=[str(findings.cohort_starts[place]) for place in places])


def _panels(findings: Findings) -> tuple[Figure, list[Axes], list[str]]:
    """Return a panel for each cohort, with axes over epochs, and their titles."""
    count = len(findings.cohort_starts)
    columns = min(count, 4)
    rows = -(-count // columns)
    figure = Figure(figsize=(_WIDTH, 0.6 + 1.9 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = list(grid.flat[:count])
    for number, axes in enumerate(panels):
        last = number + columns >= count
        _over_epochs(axes, findings, labelled=last, ticks=12 // columns)
    _blank_from(grid, count)
    return figure, panels, [name for _, name in _looks(findings)]


def _one(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    return figure, figure.subplots()


def _blank_from(grid: NDArray[np.object_], count: int) -> None:
    """Leave the last places of a grid empty, and number the axes of the panels above them."""
    for axes in grid.flat[count:]:
        axes.set_axis_off()
    for axes in grid.flat[max(0, count - grid.shape[1]) : count]:
        axes.tick_params(labelbottom=True)


def _band(
    axes: Axes,
    findings: Findings,
    quantiles: NDArray[np.float64],
    look: tuple[Any, Any] = LINES[0],
    label: str | None = None,
    wide: bool = True,
) -> None:
    """Draw the median, the band of a half, and perhaps the wide one of nine tenths."""
    outer, inner = (0, len(LEVELS) - 1), (1, len(LEVELS) - 2)
    for (low, high), alpha in ((outer, 0.15), (inner, 0.3))[not wide :]:
        axes.fill_between(
            findings.epochs, quantiles[:, low], quantiles[:, high], color=look[0], alpha=alpha, lw=0
        )
    _line(axes, findings, quantiles, look, label)


def _line(
    axes: Axes,
    findings: Findings,
    quantiles: NDArray[np.float64],
    look: tuple[Any, Any],
    label: str | None,
) -> None:
    """Draw the median."""
    colour, line = look
    axes.plot(
        findings.epochs, quantiles[:, LEVELS.index(0.5)], color=colour, ls=line, lw=1.4,
        marker=_marker(findings), label=label,
    )  # fmt: skip


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
