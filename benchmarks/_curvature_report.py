"""What the benchmarks of curvature print, write and draw."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from _curvature_methods import LIMIT, RELEASED
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

import daskcurv

MALLOC = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
# Okabe and Ito's colours, which are told apart with any kind of colour vision.
COLOURS = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7")
MARKERS = ("s", "D", "o", "^", "v", "P", "X")
SHADES = ("#C6DBEF", "#6BAED6", "#2171B5", "#08306B")
DASHES = {"float32": ":", "bfloat16": "--", "tf32": "-."}

Rows = list[dict[str, Any]]
Errors = dict[str, dict[str, float | None]]


def environment(device: torch.device) -> dict[str, Any]:
    """Return what the figures depend on besides the settings."""
    features = torch.cpu.get_capabilities()
    found: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "daskcurv": daskcurv.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cpu": _cpu_model(),
        "cpu_bfloat16": {name: bool(features.get(name, False)) for name in BFLOAT16},
        "cpu_cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "malloc": {name: os.environ.get(name) for name in MALLOC},
        "device": _cpu_model(),
    }
    if device.type == "cuda":
        found |= {
            "device": torch.cuda.get_device_name(device),
            "compute_capability": list(torch.cuda.get_device_capability(device)),
            "device_memory_mib": torch.cuda.get_device_properties(device).total_memory // 2**20,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "driver": _driver(),
        }
    return found


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, check=False).stdout
    return answer.splitlines()[0].strip() if answer.strip() else None


def speed_table(speed: Rows, errors: Errors) -> str:
    """Return one line for each method and batch size."""
    memory = any("peak_memory_mib" in row for row in speed)
    head = ["method", "batch", "ms/sample", "(median)", "samples/s", f"× {RELEASED}", "% of limit"]
    head += ["median error", "worst error", "Spearman", *(["peak MiB"] if memory else [])]
    lines = []
    for row in speed:
        error = errors.get(row["method"], {})
        line = [row["method"], str(row["batch_size"])]
        line += [f"{row[name]:.3f}" for name in ("ms_per_sample", "ms_per_sample_median")]
        line += [f"{row['samples_per_second']:.1f}", _shown(row["ratio"], ".2f")]
        line += [_shown(row["share_of_limit"], ".0%"), *_error_cells(error)]
        if memory:
            line.append(f"{row['peak_memory_mib']:.0f}")
        lines.append(line)
    return _table(head, lines)


def error_table(errors: dict[str, Errors], of: str = "checkpoint") -> str:
    """Return one line for each method and checkpoint, or what else the keys are."""
    head = ["method", of, "median error", "worst error", "Spearman"]
    methods = dict.fromkeys(name for found in errors.values() for name in found)
    lines = [
        [method, key, *_error_cells(found[method])]
        for method in methods
        for key, found in errors.items()
        if method in found
    ]
    return _table(head, lines)


def _error_cells(error: dict[str, float | None]) -> list[str]:
    formats = {"median": ".1e", "worst": ".1e", "spearman": ".4f"}
    return [_shown(error.get(name), form) for name, form in formats.items()]


def _shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: list[str], lines: list[list[str]]) -> str:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in (head, *lines)
    )


def plot(result: dict[str, Any], errors: Errors) -> Figure:
    """Return the errors against the speeds, and the ratios of the speeds."""
    # A bar's label needs an eighth of an inch.
    height = max(6.0, 2 + 0.16 * len(result["speed"]))
    figure = Figure(figsize=(13, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    settings, machine = result["settings"], result["environment"]
    threads = "" if "cuda" in machine else f", {machine['threads']} threads"
    figure.suptitle(
        f"Curvature with a ResNet-18 of width {settings['width']}, {settings['n_probes']} probes "
        f"on {machine['device']}{threads}"
    )
    _draw_errors(left, result["speed"], errors, settings["samples"])
    _draw_ratios(right, result["speed"])
    figure.legend(
        *left.get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=9
    )
    return figure


def _draw_errors(axes: Axes, speed: Rows, errors: Errors, samples: int) -> None:
    best = _at_best(speed)
    for i, (name, error) in enumerate(errors.items()):
        if name not in best:
            continue
        rate, batch = best[name]["samples_per_second"], best[name]["batch_size"]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        values = error["median"], error["worst"]
        axes.plot([rate, rate], values, color=colour, linewidth=1)
        axes.plot(
            rate, values[0], marker, color=colour, markersize=9, label=f"{name} (batch {batch})"
        )
        axes.plot(
            rate, values[1], marker, color=colour, markersize=9, markerfacecolor="white",
        )  # fmt: skip
    for name, row in best.items():
        if name.startswith(LIMIT):
            style = DASHES[name.removeprefix(f"{LIMIT}, ")]
            axes.axvline(
                row["samples_per_second"],
                color="grey",
                linestyle=style,
                label=f"limit: {name} (batch {row['batch_size']})",
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("samples per second, at the best batch size")
    axes.set_ylabel("relative error of curvature")
    axes.set_title(
        f"Error over {samples} samples, last checkpoint: median (filled), worst (hollow)",
        fontsize=11,
    )
    axes.grid(which="major", alpha=0.3)


def _at_best(speed: Rows) -> dict[str, dict[str, Any]]:
    """Return each method's row with the most samples per second."""
    best: dict[str, dict[str, Any]] = {}
    for row in sorted(speed, key=lambda row: row["samples_per_second"]):
        best[row["method"]] = row
    return {row["method"]: best[row["method"]] for row in speed}


def _draw_ratios(axes: Axes, speed: Rows) -> None:
    names = list(dict.fromkeys(row["method"] for row in speed))
    sizes = sorted({row["batch_size"] for row in speed})
    height = 0.8 / len(sizes)
    for i, size in enumerate(sizes):
        rows = [row for row in speed if row["batch_size"] == size and row["ratio"]]
        places = [names.index(row["method"]) + (i - (len(sizes) - 1) / 2) * height for row in rows]
        bars = axes.barh(
            places,
            [row["ratio"] for row in rows],
            height,
            color=_shade(i, len(sizes)),
            edgecolor="black",
            linewidth=0.5,
            label=f"batch {size}",
        )
        axes.bar_label(bars, fmt="%.2f", padding=2, fontsize=7)
    axes.set_yticks(range(len(names)), names, fontsize=9)
    axes.invert_yaxis()
    axes.axvline(1, color="grey", linewidth=0.8, zorder=0)
    axes.margins(x=0.1)
    axes.set_xlabel(f"speed relative to “{RELEASED}” at the same batch size")
    axes.set_title("Ratio of speeds", fontsize=11)
    axes.legend(fontsize=8)


def _shade(index: int, count: int) -> Sequence[float] | str:
    return SHADES[index * len(SHADES) // count]
