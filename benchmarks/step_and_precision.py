"""What the step h and the precision do to the curvature, on a trained full-size ResNet-18.

The network is that of `estimators.py`, at its last checkpoint. At each h, the curvature of the same
samples is computed in float64 with the same probes, and by every method. Writes JSON and a plot::

    python benchmarks/step_and_precision.py --out results.json --plot results.png
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _curvature_methods import digits, resnet18, train
from _curvature_report import environment
from matplotlib.figure import Figure
from torch import Tensor, nn

from daskcurv.audit.comparison import with_tf32_convolutions
from daskcurv.config import EstimatorConfig
from daskcurv.estimators.scoring import Scorer

STEPS = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
SEED = 0
TRAINED_ON = 1200
METHODS = {
    "direct, TF32 convolutions": ("finite-difference", "float32"),
    "difference propagation, bfloat16": ("difference-propagation", "bfloat16"),
    "direct, float32": ("finite-difference", "float32"),
    "difference propagation, float32": ("difference-propagation", "float32"),
}
COLOURS = {
    "direct, TF32 convolutions": ("#D55E00", "s"),
    "difference propagation, bfloat16": ("#0072B2", "o"),
    "direct, float32": ("#555555", "^"),
    "difference propagation, float32": ("#009E73", "v"),
}


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--n_probes", type=int, default=10)
    parser.add_argument("--train_steps", type=int, default=60)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    images, labels = digits(SEED)
    device = torch.device("cpu")
    pool = images[:TRAINED_ON], labels[:TRAINED_ON]
    *_, late = train(resnet18(SEED), *pool, args.train_steps, device, SEED)
    # Half of them were trained on.
    rows = torch.arange(TRAINED_ON - args.samples // 2, TRAINED_ON + args.samples // 2)
    result = {
        "environment": environment(device),
        "samples": args.samples,
        "n_probes": args.n_probes,
        "steps": [
            measure(late.model, images[rows], labels[rows], rows, h, args.n_probes) for h in STEPS
        ],
    }
    for row in result["steps"]:
        print(json.dumps(row))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")
    if args.plot:
        plot(result).savefig(args.plot, dpi=120)


def measure(
    model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, h: float, n_probes: int
) -> dict[str, Any]:
    """Return the median curvature at a step, and every method's error."""

    def curvature(network: nn.Module, method: str, precision: str, dtype: torch.dtype) -> Any:
        config = EstimatorConfig(method=method, precision=precision, h=h, n_probes=n_probes)
        scorer = Scorer(network, config, batch_size=len(images), dtype=dtype)
        return scorer.score(images, labels, ids).curvature

    true = curvature(model, "finite-difference", "float32", torch.float64)
    errors = {}
    for name, (method, precision) in METHODS.items():
        network = with_tf32_convolutions(model) if "TF32" in name else model
        error = np.abs(curvature(network, method, precision, torch.float32) / true - 1)
        errors[name] = {"median": float(np.median(error)), "worst": float(error.max())}
    return {"h": h, "median_curvature": float(np.median(true)), "errors": errors}


def plot(result: dict[str, Any]) -> Figure:
    """Draw the curvature, and the errors, against h."""
    steps = result["steps"]
    h = np.array([row["h"] for row in steps])
    curvature = np.array([row["median_curvature"] for row in steps])
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.loglog(h, curvature, "o-", color="black", label="median curvature ‖Δg‖ (float64)")
    anchor = len(h) // 2
    for power, style, name in ((0.5, "--", "∝ √h"), (1, ":", "∝ h (a smooth loss)")):
        line = curvature[anchor] * (h / h[anchor]) ** power
        left.loglog(h, line, style, color="#777777", label=name)
    left.set(xlabel="step h (units of the normalised input)", ylabel="curvature")
    left.set_title("The curvature of a ReLU network belongs to its h")
    left.legend()
    for name, (colour, marker) in COLOURS.items():
        for what, style in (("median", "-"), ("worst", ":")):
            values = [row["errors"][name][what] for row in steps]
            label = name if what == "median" else None
            right.loglog(h, values, style, marker=marker, color=colour, label=label)
    right.set(xlabel="step h (units of the normalised input)", ylabel="relative error of curvature")
    right.set_title(f"Error against float64, {result['samples']} samples (dotted: worst)")
    right.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    return figure


if __name__ == "__main__":
    main()
