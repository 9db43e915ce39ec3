"""What the benchmarks of curvature measure: the methods, the limit, networks to try them on."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from scipy.stats import spearmanr
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.demo import make_dataset
from daskcurv.estimators import ESTIMATORS, true_float32
from daskcurv.estimators.difference_propagation import _most_together, _split, difference_dtype
from daskcurv.estimators.kernels import dense
from daskcurv.estimators.precision import tensor_float32
from daskcurv.estimators.probes import draw_probe
from daskcurv.estimators.scoring import Scorer
from daskcurv.experiment.data.cifar import DIRECTORY, read_cifar
from daskcurv.experiment.resnet18 import ModelSpec

RELEASED = "released, float32"
LIMIT = "bare convolutions"
SAMPLE_SHAPE = (3, 32, 32)
TRAIN_BATCH = 32
LEARNING_RATE = 0.02

Run = Callable[[Tensor, Tensor, Tensor, int], Tensor]
"""Maps images, labels and sample ids, all on the CPU, and a number of probes to curvatures.

Raises `torch.OutOfMemoryError` where the batch size does not fit.
"""


@dataclass(frozen=True)
class Method:
    """A way to compute curvature, or the part of one that sets the limit.

    Attributes
    ----------
    name : str
    precision : str
        That of most of its convolutions: which limit it is held against.
    prepare : callable
        Maps a model and a batch size to a `Run`.
    probes_alone : bool
        Whether probes go through the network one by one, so that few will do to warm up.
    """

    name: str
    precision: str
    prepare: Callable[[nn.Module, int], Run]
    probes_alone: bool = True

    @property
    def is_limit(self) -> bool:
        """Whether this is the limit in its precision, which returns no curvature."""
        return self.name.startswith(LIMIT)


def all_methods(device: torch.device, config: EstimatorConfig) -> list[Method]:
    """Return the methods to compare on a device, the limits last.

    Parameters
    ----------
    device : torch.device
    config : EstimatorConfig
        Its h, number of probes and seed are those of all methods.
    """
    cuda = device.type == "cuda"
    precisions = ["float32", "bfloat16", *(["tf32"] if cuda else [])]

    def scorer(name: str, method: str, precision: str) -> Method:
        settings = replace(config, method=method, precision=precision)
        together = method == "difference-propagation" and not cuda
        return Method(
            name, precision, lambda m, b: _scorer_run(m, b, device, settings), not together
        )

    methods = [
        Method(
            "released, default",
            "tf32" if cuda else "float32",
            lambda m, b: _released_run(m, b, device, config, exact=False),
        ),
        Method(RELEASED, "float32", lambda m, b: _released_run(m, b, device, config, exact=True)),
        scorer("direct, float32", "finite-difference", "float32"),
        *(
            scorer(f"difference propagation, {precision}", "difference-propagation", precision)
            for precision in precisions
        ),
    ]
    # It takes probes in pairs.
    if "zeroth-order" in ESTIMATORS and config.n_probes % 2 == 0:
        methods.append(scorer("zeroth-order, float32", "zeroth-order", "float32"))
    for precision in precisions:
        methods.append(
            Method(
                f"{LIMIT}, {precision}",
                precision,
                lambda m, b, precision=precision: _bare_run(m, b, device, precision),
                probes_alone=False,
            )
        )
    return methods


def referee(
    model: nn.Module,
    inputs: tuple[Tensor, ...],
    device: torch.device,
    config: EstimatorConfig,
    classes: Sequence[int] | None = None,
) -> Tensor:
    """Return the curvatures by direct finite differences in float64."""
    settings = replace(config, method="finite-difference", precision="auto")
    scorer = Scorer(
        model,
        settings,
        classes=classes,
        device=device,
        batch_size=min(32, len(inputs[0])),
        dtype=torch.float64,
    )
    return torch.from_numpy(scorer.score(*inputs).curvature)


def error(found: Tensor, expected: Tensor) -> dict[str, float | None]:
    """Return how curvatures differ from those expected, which are in float64."""
    relative = ((found.double() - expected) / expected).abs()
    rank = float(spearmanr(found.numpy(), expected.numpy()).statistic)
    return {
        "median": relative.median().item(),
        "worst": relative.max().item(),
        # Undefined where all are equal.
        "spearman": None if math.isnan(rank) else rank,
    }


def _scorer_run(
    model: nn.Module, batch_size: int, device: torch.device, config: EstimatorConfig
) -> Run:
    scorer = Scorer(model, config, device=device, batch_size=batch_size)

    def run(images: Tensor, labels: Tensor, sample_ids: Tensor, n_probes: int) -> Tensor:
        scores = scorer.score(images, labels, sample_ids, range(n_probes))
        if scorer.batch_size < batch_size:
            raise torch.OutOfMemoryError(f"batch size {batch_size} does not fit")
        return torch.from_numpy(scores.curvature)

    return run


def _released_run(
    model: nn.Module, batch_size: int, device: torch.device, config: EstimatorConfig, exact: bool
) -> Run:
    """Return the scheme as it was published, in true float32 or in the framework's default.

    For every probe the loss, a mean over the batch, is taken at the shifted and at the original
    images, and the gradient of the difference of the two is computed in one backward pass.
    """
    model = copy.deepcopy(model).to(device).eval()
    criterion = nn.CrossEntropyLoss()

    def batch(images: Tensor, labels: Tensor, sample_ids: Tensor, n_probes: int) -> Tensor:
        images, labels, sample_ids = (part.to(device) for part in (images, labels, sample_ids))
        total = torch.zeros(len(images), device=device)
        for k in range(n_probes):
            probe = draw_probe(sample_ids, k, images.shape[1:], config.seed).to(images.dtype)
            inputs = images.detach().requires_grad_(True)
            loss_pos = criterion(model(inputs + config.h * probe), labels)
            loss_orig = criterion(model(inputs), labels)
            (change,) = torch.autograd.grad(loss_pos - loss_orig, inputs)
            total += change.flatten(1).norm(dim=1)
        # A mean over the batch divides each sample's gradient by the batch size.
        return (total / n_probes * len(images)).cpu()

    def run(images: Tensor, labels: Tensor, sample_ids: Tensor, n_probes: int) -> Tensor:
        parts = zip(*(x.split(batch_size) for x in (images, labels, sample_ids)), strict=True)
        if not exact:
            return torch.cat([batch(*part, n_probes) for part in parts])
        with true_float32(device):
            return torch.cat([batch(*part, n_probes) for part in parts])

    return run


def _bare_run(model: nn.Module, batch_size: int, device: torch.device, precision: str) -> Run:
    """Return the convolutions that difference propagation cannot do without, and nothing else.

    Every convolution forward and back to its input: once in float32 for the clean pass, then for
    the probes in the precision of the differences, as many rows at a time as difference propagation
    takes, under the same settings. The rest of its work comes on top.
    """
    clean = [_Convolution(*found, torch.float32) for found in _convolutions(model, device)]
    dtype = difference_dtype(precision, torch.float32)
    low = [_Convolution(*found, dtype) for found in _convolutions(model, device)]
    most = _most_together(torch.empty(batch_size, device=device), dtype)
    # Values of one shape share their memory: nothing is gained by bringing in more of it.
    pool: dict[tuple[Any, ...], Tensor] = {}

    def values(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if (shape, dtype) not in pool:
            pool[shape, dtype] = dense(torch.randn(shape, device=device).to(dtype))
        return pool[shape, dtype]

    def through(layers: list[_Convolution], rows: int) -> None:
        for layer in layers:
            layer.forward(values((rows, *layer.input_shape), layer.weight.dtype))
        for layer in reversed(layers):
            layer.backward(
                values((rows, *layer.output_shape), layer.weight.dtype),
                values((rows, *layer.input_shape), layer.weight.dtype),
            )

    def run(images: Tensor, labels: Tensor, sample_ids: Tensor, n_probes: int) -> Tensor:
        with true_float32(device), torch.no_grad():
            through(clean, batch_size)
            with tensor_float32(precision == "tf32"):
                for part in _split(range(n_probes), most):
                    through(low, batch_size * len(part))
        return torch.full((len(images),), torch.nan)

    return run


class _Convolution:
    """A convolution of the network, forward and back to its input."""

    def __init__(
        self,
        module: nn.Conv2d,
        input_shape: tuple[int, ...],
        output_shape: tuple[int, ...],
        dtype: torch.dtype,
    ):
        self.input_shape, self.output_shape = input_shape, output_shape
        self.weight = dense(module.weight.detach().to(dtype))
        # Stride, padding, dilation, transposed, output padding, groups.
        self._settings = (
            module.stride, module.padding, module.dilation, False, [0, 0], module.groups
        )  # fmt: skip

    def forward(self, values: Tensor) -> None:
        torch.ops.aten.convolution(values, self.weight, None, *self._settings)

    def backward(self, gradient: Tensor, unread: Tensor) -> None:
        torch.ops.aten.convolution_backward(
            gradient, unread, self.weight, None, *self._settings, [True, False, False]
        )


def _convolutions(
    model: nn.Module, device: torch.device
) -> list[tuple[nn.Conv2d, tuple[int, ...], tuple[int, ...]]]:
    """Return each convolution in order of use, with the shapes of its input and output."""
    model = copy.deepcopy(model).to(device).eval()
    found = []

    def record(module: nn.Conv2d, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append((module, tuple(inputs[0].shape[1:]), tuple(output.shape[1:])))

    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(record)
    with torch.no_grad():
        model(torch.zeros(1, *SAMPLE_SHAPE, device=device))
    return found


def digits(seed: int) -> tuple[Tensor, Tensor]:
    """Return the demo's images and labels, some of them wrong, in random order."""
    with tempfile.TemporaryDirectory() as root:
        make_dataset(Path(root))
        dataset = read_cifar(Path(root) / DIRECTORY)
    order = torch.randperm(len(dataset.labels), generator=torch.Generator().manual_seed(seed))
    return dataset.normalise(dataset.images)[order], torch.from_numpy(dataset.labels)[order]


@dataclass(frozen=True)
class Checkpoint:
    """A network on its way, in eval mode on the CPU, and its mean training loss shortly before."""

    name: str
    step: int
    loss: float
    model: nn.Module


def resnet18(seed: int, width: int = 64, norm: str = "batch") -> nn.Module:
    """Return an untrained ResNet-18."""
    return seeded(seed, ModelSpec(width=width, norm=norm).build)


def seeded(seed: int, build: Callable[[], nn.Module]) -> nn.Module:
    """Return the network that `build` returns for a seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build()


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    steps: int,
    device: torch.device,
    seed: int,
    learning_rate: float = LEARNING_RATE,
) -> Iterator[Checkpoint]:
    """Train a network for 3 or more steps and yield it early, half-way and in the end."""
    generator = torch.Generator().manual_seed(seed)
    model = model.to(device).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=learning_rate, momentum=0.9)
    names = {max(1, steps // 12): "early", max(2, steps // 2): "middle", steps: "late"}
    losses: list[float] = []
    for step in range(1, steps + 1):
        rows = torch.randint(len(images), (TRAIN_BATCH,), generator=generator)
        loss = F.cross_entropy(model(images[rows].to(device)), labels[rows].to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if step in names:
            recent = losses[-5:]
            kept = copy.deepcopy(model).cpu().eval()
            yield Checkpoint(names[step], step, sum(recent) / len(recent), kept)
