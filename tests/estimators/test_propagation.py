"""Difference propagation gives what direct finite differences give, for every layer it knows."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn

from daskcurv import SampleScores, score_samples
from daskcurv.demo import make_dataset
from daskcurv.estimators.difference_propagation import _split
from daskcurv.experiment.data.cifar import DIRECTORY, read_cifar
from daskcurv.experiment.resnet18 import ModelSpec
from tests.support.builders import TINY, make_model
from tests.support.oracles import assert_scores, referee

ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Softplus, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU,
]  # fmt: skip


def propagated(model: nn.Module, images: Tensor, labels: Tensor, **settings) -> SampleScores:
    return score_samples(model, images, labels, method="difference-propagation", **settings)


class Residual(nn.Module):
    def __init__(self, branch: nn.Module, how: str):
        super().__init__()
        self.branch, self.how = branch, how

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.branch(x)
        if self.how == "inplace":
            out += x
            return out
        if self.how == "difference":
            return x - out
        return torch.add(out, x) * 0.5


Layers = list[Callable[[], nn.Module]]


@st.composite
def layers(draw, channels: int) -> Callable[[], nn.Module]:
    """Draw a layer that keeps (C, H, W); it is built when its weights are to be drawn."""
    kind = draw(st.sampled_from(["convolution", "norm", "activation", "residual", "drop", "pool"]))
    if kind == "convolution":
        kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
        dilation = draw(st.sampled_from([1, 2]))
        return partial(
            nn.Conv2d, channels, channels, kernel, padding=dilation * (kernel // 2),
            dilation=dilation, groups=groups, bias=draw(st.booleans()),
        )  # fmt: skip
    if kind == "norm":
        return partial(nn.BatchNorm2d, channels, affine=draw(st.booleans()))
    if kind == "activation":
        return draw(st.sampled_from(ACTIVATIONS))  # type: ignore[no-any-return]
    if kind == "drop":
        return draw(st.sampled_from([nn.Identity, nn.Dropout]))  # type: ignore[no-any-return]
    if kind == "pool":
        return partial(draw(st.sampled_from([nn.AvgPool2d, nn.MaxPool2d])), 3, 1, 1)
    how = draw(st.sampled_from(["inplace", "difference", "scaled"]))
    return lambda: Residual(
        nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
            nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1),
        ),
        how,
    )  # fmt: skip


def with_random_weights(build: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Build a network in float64; weights, biases and statistics are all drawn, none is 0 or 1."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build().double().eval()
        for module in network.modules():
            for name, value in module.named_parameters(recurse=False):
                if isinstance(module, nn.BatchNorm2d) and name == "weight":
                    nn.init.uniform_(value, 0.5, 2)
                else:
                    nn.init.normal_(value, std=0.4)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network


@st.composite
def networks(draw) -> nn.Module:
    channels = 4
    stride = draw(st.sampled_from([1, 2]))
    pool = draw(
        st.sampled_from(
            [partial(nn.AdaptiveAvgPool2d, 2), partial(nn.MaxPool2d, 2), partial(nn.AvgPool2d, 2)]
        )
    )
    body: Layers = draw(st.lists(layers(channels), min_size=1, max_size=5))
    features = channels * (4 if isinstance(pool(), nn.AdaptiveAvgPool2d) else (4 // stride) ** 2)

    def build() -> nn.Module:
        return nn.Sequential(
            nn.Conv2d(3, channels, 3, stride, 1), *(layer() for layer in body), pool(),
            nn.Flatten(), nn.Linear(features, 5),
        )  # fmt: skip

    return with_random_weights(build, draw(st.integers(0, 2**31)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    network=networks(),
    h=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    temperature=st.sampled_from([1.0, 2.0]),
    classes=st.sampled_from([None, [3, 0, 2]]),
)
def test_in_float64_random_networks_give_what_the_definitions_say(network, h, temperature, classes):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 3])
    settings: dict[str, Any] = {"h": h, "temperature": temperature, "classes": classes}
    scores = propagated(network, images, labels, n_probes=3, **settings)
    expected = referee(network, images, labels, n_probes=3, **settings)
    assert_scores(scores, expected, images[0].numel(), h=h)


class Spelled(nn.Module):
    """Everything as functions and methods."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)
        self.features = nn.Linear(16, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 5)
        self.scale = nn.Parameter(torch.full((4, 1, 1), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convolution(x), inplace=True)
        x = (1 - x / 2) * self.scale + self.scale
        x = F.max_pool2d(torch.tanh(x), 2)
        x = F.dropout(x, training=self.training)
        x = F.avg_pool2d(F.gelu(x - 0.1), kernel_size=2)
        x = x.view(x.size(0), -1)
        x = self.norm(self.features(x)).relu()
        logits: Tensor = self.head(-torch.neg(x))
        return logits


def test_functions_and_methods_are_known_as_well():
    network = with_random_weights(Spelled, 0)
    images = torch.randn(
        4, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    labels = torch.tensor([0, 1, 2, 3])
    for h in (1e-3, 0.1):
        scores = propagated(network, images, labels, h=h, n_probes=4)
        expected = referee(network, images, labels, h=h, n_probes=4)
        assert_scores(scores, expected, images[0].numel(), h=h)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_dataset(root)
    cifar = read_cifar(root / DIRECTORY)
    return cifar.normalise(cifar.images), torch.from_numpy(cifar.labels)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 3
    for sizes in ([32, 32], [64], [64]):
        for size in sizes:
            layers += [nn.Conv2d(channels, size, 3, padding=1), nn.ReLU()]
            channels = size
        layers.append(nn.MaxPool2d(2))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * 16, 64), nn.ReLU(),
                         nn.Dropout(), nn.Linear(64, 10))  # fmt: skip


def softplus() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1), nn.BatchNorm2d(32), nn.Softplus(), nn.AvgPool2d(2),
        nn.Conv2d(32, 64, 3, 2, 1), nn.BatchNorm2d(64), nn.Softplus(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


def trained(model: nn.Module, digits, steps: int, rate: float) -> nn.Module:
    images, labels = digits
    generator = torch.Generator().manual_seed(0)
    optimiser = torch.optim.SGD(model.train().parameters(), lr=rate, momentum=0.9)
    for _ in range(steps):
        rows = torch.randint(1000, (32,), generator=generator)
        optimiser.zero_grad()
        F.cross_entropy(model(images[rows]), labels[rows]).backward()
        optimiser.step()
    return model.eval()


def errors(scores: SampleScores, exact: SampleScores) -> np.ndarray:
    result: np.ndarray = np.abs(scores.curvature / exact.curvature - 1)
    return result


# Measured with 64 samples at three checkpoints (benchmarks/results/estimators_cpu.json): bfloat16
# at most 1.0e-3 median and 8e-3 worst, rank correlation 0.999 or more.
def test_bfloat16_is_accurate_on_the_full_size_network(digits):
    images, labels = (part[976:1000] for part in digits)
    torch.manual_seed(0)
    model = trained(ModelSpec().build(), digits, 12, 0.02)
    settings: dict[str, Any] = {"batch_size": 12, "n_probes": 4}
    exact = score_samples(model, images.double(), labels, **settings)
    low, single = (
        score_samples(
            model, images, labels, method="difference-propagation", precision=p, **settings
        )
        for p in ("bfloat16", "float32")
    )
    direct = score_samples(model, images, labels, method="finite-difference", **settings)
    assert np.median(errors(low, exact)) <= 2e-3
    assert errors(low, exact).max() <= 5e-2
    assert spearmanr(low.curvature, exact.curvature).statistic >= 0.998
    # Both are at the mercy of which kinks a rounded activation falls short of; on average over
    # the samples neither is better.
    assert errors(single, exact).mean() <= 3 * errors(direct, exact).mean() + 1e-5


@pytest.mark.parametrize(
    ("build", "settings"),
    [
        (TINY.build, {"h": 1e-4}),
        (TINY.build, {"h": 1e-2}),
        (TINY.build, {"temperature": 2.0}),
        (TINY.build, {"classes": [7, 2, 5, 0, 9, 1, 3, 4, 6]}),
        (ModelSpec(num_classes=10, width=8, norm="identity").build, {}),
        (softplus, {}),
        (vgg, {}),
    ],
    ids=["small h", "large h", "temperature", "active head", "identity", "softplus", "vgg"],
)
def test_both_precisions_are_accurate_for_other_settings_and_networks(digits, build, settings):
    torch.manual_seed(0)
    rate = 0.005 if build not in (TINY.build, softplus) else 0.02
    model = trained(build(), digits, 40, rate)
    images, labels = digits
    rows = torch.arange(970, 1100)
    rows = rows[labels[rows] != 8][:48]
    images, labels = images[rows], labels[rows]
    exact = score_samples(model, images.double(), labels, **settings)
    # Where rounding decides no kinks, only the rounding of smooth functions is left.
    single = 1e-6 if build is softplus else 1e-4
    for precision, median in (("bfloat16", 4e-3), ("float32", single)):
        scores = score_samples(
            model, images, labels, method="difference-propagation", precision=precision, **settings
        )
        assert np.median(errors(scores, exact)) <= median
        assert spearmanr(scores.curvature, exact.curvature).statistic >= 0.99


@pytest.mark.parametrize("precision", ["bfloat16", "float32"])
def test_a_sample_does_not_depend_on_its_neighbours(digits, precision):
    images, labels = digits
    model = make_model()
    settings: dict[str, Any] = {"method": "difference-propagation", "precision": precision}
    settings["batch_size"] = 4
    ids = torch.arange(7)
    together = score_samples(model, images[:7], labels[:7], sample_ids=ids, **settings)
    turned = score_samples(
        model, images[:7].flip(0), labels[:7].flip(0), sample_ids=ids.flip(0), **settings
    )
    np.testing.assert_array_equal(together.curvature, turned.curvature[::-1])
    larger = score_samples(
        model, images[:7], labels[:7], sample_ids=ids, **{**settings, "batch_size": 7}
    )
    tolerance = 1e-2 if precision == "bfloat16" else 1e-4
    assert np.median(np.abs(larger.curvature / together.curvature - 1)) <= tolerance


@pytest.mark.parametrize("most", [1, 2, 3, 10, 11])
@pytest.mark.parametrize("probes", [range(1), range(3, 10), range(10)])
def test_probes_that_go_together_are_all_probes_once_and_no_more_than_fit(probes, most):
    parts = _split(probes, most)
    assert [k for part in parts for k in part] == list(probes)
    assert max(map(len, parts)) <= most
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


# Every rule at its edge: exact zeros, ties, borders, biases. With a step that is a power of two, a
# step from one side of a kink ends exactly on it.

STEP = 2.0**-10
EDGES = {
    "relu": nn.ReLU(),
    "two relus": nn.Sequential(nn.ReLU(), nn.ReLU()),
    "relu then relu6": nn.Sequential(nn.ReLU(), nn.ReLU6()),
    "relu6 twice": nn.Sequential(nn.ReLU6(), nn.ReLU6(inplace=True)),
    "leaky relu": nn.LeakyReLU(0.3),
    "hardtanh": nn.Hardtanh(),
    "hardswish": nn.Hardswish(),
    "hardsigmoid": nn.Hardsigmoid(),
    "elu": nn.ELU(),
    "celu": nn.CELU(0.5),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(threshold=1),
    "softsign": nn.Softsign(),
    "gelu": nn.GELU(),
    "max-pool": nn.MaxPool2d(2),
    "max-pool of a relu": nn.Sequential(nn.ReLU(), nn.MaxPool2d(3, 2, 1)),
    "max-pool with borders": nn.MaxPool2d(3, 2, padding=1, ceil_mode=True),
    "max-pool with gaps": nn.MaxPool2d(2, 1, dilation=2),
    "relu of a max-pool": nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.ReLU()),
    "mean with borders": nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
    "mean by another number": nn.AvgPool2d(2, divisor_override=3),
    "adaptive mean": nn.AdaptiveAvgPool2d((2, 3)),
    "strided convolution": nn.Conv2d(2, 4, 3, stride=2, bias=True),
    "convolution with borders": nn.Conv2d(2, 4, (3, 2), (2, 3), padding=(2, 1), dilation=(1, 2)),
    "grouped convolution": nn.Conv2d(2, 4, 2, padding=1, groups=2, bias=False),
    "norm alone": nn.BatchNorm2d(2),
    "norm without weights": nn.BatchNorm2d(2, affine=False),
    "convolution and norm": nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU()),
    "norm and convolution": nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(2, 4, 3), nn.ReLU()),
    "linear over the last axis": nn.Sequential(nn.Linear(7, 3), nn.ReLU()),
    "along one axis": nn.Sequential(
        nn.Flatten(2), nn.Conv1d(2, 3, 4, 3, 2), nn.BatchNorm1d(3), nn.ReLU(), nn.AvgPool1d(2)
    ),
    "in three": nn.Sequential(
        nn.Unflatten(1, (1, 2)), nn.Conv3d(1, 2, 2), nn.BatchNorm3d(2), nn.ReLU()
    ),
}


def on_the_edge(kinks: tuple[float, ...] = (0, 0, 0, 1, -1, 3, -3, 6)) -> tuple[Tensor, Tensor]:
    """Images (4, 2, 7, 7) of kinks, one step beside them, flat regions, and repeated rows."""
    generator = torch.Generator().manual_seed(5)
    chosen = torch.randint(len(kinks), (4, 2, 7, 7), generator=generator)
    beside = torch.randint(-1, 2, (4, 2, 7, 7), generator=generator) * STEP
    images = torch.tensor(kinks, dtype=torch.float64)[chosen] + beside
    images[0, :, :4] = 0
    images[1, :, :, :5] = images[1, :, :, :1]
    images[2, 1] = images[2, 0, 0, 0]
    return images, torch.tensor([0, 1, 2, 3])


def in_front_of_a_head(layer: nn.Module, features: int) -> nn.Module:
    network = with_random_weights(
        lambda: nn.Sequential(layer, nn.Flatten(), nn.Linear(features, 5)), 1
    )
    with torch.no_grad():
        network.get_parameter("2.weight").div_(4)  # so that no softmax is sure
    return network


@pytest.mark.parametrize("h", [STEP, 1e-3, 0.3])
@pytest.mark.parametrize("layer", EDGES.values(), ids=EDGES.keys())
def test_every_rule_holds_at_its_edge(layer, h):
    images, labels = on_the_edge()
    features = layer.double().eval()(images).flatten(1).shape[1]
    network = in_front_of_a_head(layer, features)
    expected = referee(network, images, labels, h=h, n_probes=4)
    size = images[0].numel()
    assert_scores(
        score_samples(network, images, labels, method="finite-difference", h=h, n_probes=4),
        expected, size, h=h,
    )  # fmt: skip
    if "Unflatten" not in str(layer):
        assert_scores(propagated(network, images, labels, h=h, n_probes=4), expected, size, h=h)


@pytest.mark.parametrize("name", ["relu", "two relus", "max-pool", "max-pool of a relu"])
def test_a_kink_is_where_it_is_in_low_precision_too(name):
    images, labels = on_the_edge((0, 0, 1, -1))
    layer = EDGES[name].double()
    features = layer(images).flatten(1).shape[1]
    network = in_front_of_a_head(layer, features)
    expected = referee(network, images, labels, h=STEP, n_probes=4)
    for precision, most in (("float32", 1e-5), ("bfloat16", 2e-2)):
        scores = propagated(
            network, images.float(), labels, h=STEP, n_probes=4, precision=precision
        )
        errors = np.abs(scores.curvature / expected["curvature"] - 1)
        assert errors.max() <= most


SMOOTH = [nn.Softplus, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.Mish, nn.LogSigmoid]


@pytest.mark.parametrize("function", SMOOTH)
def test_smooth_functions_cost_float32_no_accuracy(function):
    """No kink is decided by rounding here, so a subtraction in float32 would show: 1e-4."""
    network = with_random_weights(
        lambda: nn.Sequential(
            nn.Conv2d(3, 8, 3), function(), nn.Conv2d(8, 8, 3), function(), nn.Flatten(),
            nn.Linear(128, 5),
        ),
        2,
    )  # fmt: skip
    images = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6) % 5
    expected = referee(network, images, labels, n_probes=3)
    scores = propagated(network, images, labels, n_probes=3, precision="float32")
    assert np.median(np.abs(scores.curvature / expected["curvature"] - 1)) <= 2e-6
