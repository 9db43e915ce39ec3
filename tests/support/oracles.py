"""The measures from their definitions, in float64, by none of the estimators' code."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from daskcurv import SampleScores, rademacher_probes

MEASURES = ("curvature", "curvature_sq", "directional_eig", "loss", "grad_norm")


def referee(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    h: float = 1e-3,
    n_probes: int = 10,
    temperature: float = 1.0,
    seed: int = 0,
    classes: Sequence[int] | None = None,
    ids: Sequence[int] | None = None,
) -> dict[str, np.ndarray]:
    """Return the measures of each sample, from the definitions and in float64."""
    model = copy.deepcopy(model).double().eval()
    ids = range(len(images)) if ids is None else ids

    def input_gradient(image: np.ndarray, label: int) -> tuple[np.ndarray, float, int]:
        point = torch.from_numpy(image)[None].requires_grad_(True)
        logits = model(point)[0]
        candidates = list(range(len(logits))) if classes is None else list(classes)
        scaled = logits[candidates] / temperature
        loss = torch.logsumexp(scaled, dim=0) - scaled[candidates.index(label)]
        (gradient,) = torch.autograd.grad(loss, point)
        return gradient[0].numpy(), loss.item(), candidates[int(scaled.argmax())]

    rows = []
    for sample, image, label in zip(ids, images.double().numpy(), labels.tolist(), strict=True):
        gradient, loss, prediction = input_gradient(image, label)
        norms, squares, products = [], [], []
        for probe in rademacher_probes([sample], image.shape, n_probes, seed)[0]:
            change = input_gradient(image + h * probe, label)[0] - gradient
            norms.append(np.sqrt(np.sum(change**2)))
            squares.append(np.sum(change**2))
            products.append(np.sum(h * probe * change))
        rows.append(
            {
                "curvature": np.mean(norms),
                "curvature_sq": np.mean(squares),
                "directional_eig": np.mean(products),
                "loss": loss,
                "grad_norm": np.sqrt(np.sum(gradient**2)),
                "prediction": prediction,
            }
        )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def relative_errors(
    scores: SampleScores, expected: dict[str, np.ndarray], h: float, size: int
) -> dict[str, np.ndarray]:
    """Return the errors of each measure, relative to what bounds it.

    directional_eig is a sum of signed terms that nearly cancel, so its error is not small compared
    with itself; by the Cauchy-Schwarz inequality it is at most h √size times the error of Δg, and
    is measured in units of h √size ‖Δg‖.
    """
    scale = {name: np.abs(expected[name]) for name in MEASURES}
    scale["directional_eig"] = h * np.sqrt(size) * expected["curvature"]
    return {name: np.abs(getattr(scores, name) - expected[name]) / scale[name] for name in MEASURES}


def assert_scores(
    scores: SampleScores,
    expected: dict[str, np.ndarray],
    size: int,
    *,
    h: float = 1e-3,
    tolerance: float = 1e-9,
) -> None:
    """Compare with a referee's measures, each relative to what bounds it.

    The referee takes Δg as the difference of two gradients, and these are of 1 − p: rounding in
    float64 leaves both an error of 1e-16 of what a gradient can be, however small they are.
    """
    floor = 1e-4 * max(1.0, expected["grad_norm"].max())
    change = expected["curvature"] + floor
    bounds = {
        "curvature": change,
        "curvature_sq": change * np.maximum(change, expected["curvature_sq"] / change),
        "directional_eig": h * np.sqrt(size) * change,
        "loss": expected["loss"] + 1e-3,
        "grad_norm": expected["grad_norm"] + floor,
    }
    for name in MEASURES:
        errors = np.abs(getattr(scores, name) - expected[name])
        assert (errors <= tolerance * bounds[name]).all(), (
            f"{name} is off by {(errors / bounds[name]).max():.1e}"
        )
    np.testing.assert_array_equal(scores.prediction, expected["prediction"])
