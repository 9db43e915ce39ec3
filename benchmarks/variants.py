"""Errors of the curvature away from the standard case: other steps, heads, losses and networks.

Full-size networks are trained for a moment on scikit-learn's digits, some of them mislabelled. At
their last checkpoint the curvature of the same samples, half of them trained on, is computed in
float64 by direct finite differences, and by every method with the same probes.

Processors with matrix units for bfloat16 add the products in float32 and round the sum. That is
emulated, so that the errors are the same on every machine: a CPU without such units is very slow at
bfloat16, and PyTorch rounds partial sums too there on the way back.

Prints a table, and writes JSON::

    python benchmarks/variants.py --out results.json
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from _curvature_methods import LEARNING_RATE, digits, error, referee, resnet18, seeded, train
from _curvature_report import environment, error_table
from torch import Tensor, nn

from daskcurv.audit.comparison import with_tf32_convolutions
from daskcurv.config import EstimatorConfig
from daskcurv.estimators.layers import Affine
from daskcurv.estimators.scoring import Scorer

SEED = 0
TRAINED_ON = 1200
ACTIVE = range(5)
BATCH_SIZE = 24
BFLOAT16 = "difference propagation, bfloat16"
TF32 = "direct, TF32 convolutions"
METHODS = {
    BFLOAT16: ("difference-propagation", "bfloat16"),
    "difference propagation, float32": ("difference-propagation", "float32"),
    "direct, float32": ("finite-difference", "float32"),
    TF32: ("finite-difference", "float32"),
}


@dataclass(frozen=True)
class Variant:
    """One case.

    Attributes
    ----------
    network : str
        Which of those that `untrained` returns.
    settings : dict
        Of the estimator, where they are not the standard ones.
    classes : range, optional
        Outputs that take part in the loss; samples are of these classes.
    """

    network: str = "ResNet-18"
    settings: dict[str, float] = field(default_factory=dict)
    classes: range | None = None


VARIANTS = {
    "standard (h = 1e-3)": Variant(),
    "h = 1e-4": Variant(settings={"h": 1e-4}),
    "h = 1e-2": Variant(settings={"h": 1e-2}),
    "5 active of 100 outputs": Variant(classes=ACTIVE),
    "temperature 2": Variant(settings={"temperature": 2.0}),
    "no normalisation": Variant("ResNet-18, identity for norm"),
    "softplus for ReLU": Variant("ResNet-18, softplus"),
    "VGG-11": Variant("VGG-11"),
}


def main() -> None:
    """Run the benchmark."""
    started = time.monotonic()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=24, help="an even number")
    parser.add_argument("--n_probes", type=int, default=10)
    parser.add_argument("--width", type=int, default=64, help="of the networks' first layer")
    parser.add_argument("--train_steps", type=int, default=60)
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()

    images, labels = digits(SEED)
    device = torch.device("cpu")
    networks, training = {}, {}
    for name, (model, learning_rate) in untrained(args.width).items():
        pool = images[:TRAINED_ON], labels[:TRAINED_ON]
        *_, late = train(model, *pool, args.train_steps, device, SEED, learning_rate)
        networks[name] = late.model
        training[name] = {"steps": late.step, "learning_rate": learning_rate, "loss": late.loss}
        _say(f"{name}: training loss {late.loss:.3f}")
    errors = {}
    for name, variant in VARIANTS.items():
        samples = choose(images, labels, args.samples, variant.classes)
        config = EstimatorConfig(n_probes=args.n_probes, seed=SEED, **variant.settings)
        errors[name] = measure(name, networks[variant.network], samples, config, variant.classes)

    result = {
        "settings": {name: value for name, value in vars(args).items() if name != "out"},
        "environment": environment(device),
        "bfloat16": "emulated: products added in float32, their sum rounded",
        "training": training,
        "errors": errors,
        "seconds": round(time.monotonic() - started, 1),
    }
    print(error_table(errors, "variant"))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def untrained(width: int) -> dict[str, tuple[nn.Module, float]]:
    """Return every network by name, and the learning rate that it is trained at."""
    return {
        "ResNet-18": (resnet18(SEED, width), LEARNING_RATE),
        # Unchecked by normalisation, activations grow from block to block.
        "ResNet-18, identity for norm": (resnet18(SEED, width, "identity"), LEARNING_RATE / 100),
        "ResNet-18, softplus": (_smooth(resnet18(SEED, width)), LEARNING_RATE),
        "VGG-11": (seeded(SEED, lambda: vgg11(width)), LEARNING_RATE),
    }


def _smooth(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.ReLU):
                setattr(module, name, nn.Softplus())
    return model


def vgg11(width: int) -> nn.Module:
    """Return VGG's configuration A for 32 × 32 images: biases, max-pooling, no normalisation."""
    layers: list[nn.Module] = []
    channels = 3
    for factors in ((1,), (2,), (4, 4), (8, 8), (8, 8)):
        for factor in factors:
            layers += [nn.Conv2d(channels, factor * width, 3, padding=1), nn.ReLU()]
            channels = factor * width
        layers.append(nn.MaxPool2d(2))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
    head = nn.Linear(channels, channels), nn.ReLU(), nn.Linear(channels, 100)
    return nn.Sequential(*layers, nn.Flatten(), *head)


def choose(
    images: Tensor, labels: Tensor, count: int, classes: range | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return samples of some classes, half of them trained on, and their ids."""
    allowed = torch.tensor([classes is None or int(label) in classes for label in labels])
    rows = allowed.nonzero().flatten()
    border = int((rows < TRAINED_ON).sum())
    rows = rows[border - count // 2 : border + count // 2]
    return images[rows], labels[rows], rows


def measure(
    name: str,
    model: nn.Module,
    samples: tuple[Tensor, Tensor, Tensor],
    config: EstimatorConfig,
    classes: range | None,
) -> dict[str, dict[str, float | None]]:
    """Return every method's error."""
    _say(f"{name}: float64")
    expected = referee(model, samples, torch.device("cpu"), config, classes)
    errors = {}
    for method, (estimator, precision) in METHODS.items():
        network = with_tf32_convolutions(model) if method == TF32 else model
        settings = replace(config, method=estimator, precision=precision)
        batch_size = min(BATCH_SIZE, len(samples[0]))
        scorer = Scorer(network, settings, classes=classes, batch_size=batch_size)
        with rounding_as_a_matrix_unit() if method == BFLOAT16 else contextlib.nullcontext():
            found = torch.from_numpy(scorer.score(*samples).curvature)
        errors[method] = error(found, expected)
        _say(f"{name}: {method}: {errors[method]}")
    return errors


@contextlib.contextmanager
def rounding_as_a_matrix_unit() -> Iterator[None]:
    """Let bfloat16 products be added in float32, and only their sum be rounded to bfloat16.

    A product of two bfloat16 numbers is exact in float32.
    """

    def wide(function: Any) -> Any:
        def wrapped(self: Affine, values: Tensor, weight: Tensor, *rest: Any) -> Tensor:
            result: Tensor = function(self, values.float(), weight.float(), *rest)
            return result.to(values.dtype)

        return wrapped

    with (
        mock.patch.object(Affine, "_apply", wide(Affine._apply)),
        mock.patch.object(Affine, "_transpose", wide(Affine._transpose)),
    ):
        yield


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
