"""Difference propagation gives what direct finite differences give, for every layer it knows."""

from __future__ import annotations

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
from daskcurv.dataset import DIRECTORY, normalise, read_cifar
from daskcurv.demo import make_dataset
from daskcurv.models import ModelSpec
from tests.builders import TINY, make_model

ACTIVATIONS = [
    nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Softplus, nn.GELU, nn.SiLU, nn.Tanh, nn.Sigmoid, nn.ELU,
]  # fmt: skip


def both(model: nn.Module, images: Tensor, labels: Tensor, **settings) -> list[SampleScores]:
    """Score directly, and by difference propagation."""
    methods = ("finite-difference", "difference-propagation")
    return [score_samples(model, images, labels, method=m, **settings) for m in methods]


def assert_equal(direct: SampleScores, propagated: SampleScores, h: float, size: int) -> None:
    for name in ("curvature", "curvature_sq", "loss", "grad_norm"):
        np.testing.assert_allclose(
            getattr(propagated, name), getattr(direct, name), rtol=1e-9, atol=1e-14, err_msg=name
        )
    # A sum of terms that nearly cancel: measured against its Cauchy-Schwarz bound.
    error = np.abs(propagated.directional_eig - direct.directional_eig)
    assert (error <= 1e-9 * h * np.sqrt(size) * direct.curvature + 1e-16).all()
    np.testing.assert_array_equal(propagated.prediction, direct.prediction)


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


@st.composite
def layers(draw, channels: int):
    """Draw a layer that keeps (C, H, W)."""
    kind = draw(st.sampled_from(["convolution", "norm", "activation", "residual", "drop", "pool"]))
    if kind == "convolution":
        kernel, groups = draw(st.sampled_from([1, 3])), draw(st.sampled_from([1, 2]))
        dilation = draw(st.sampled_from([1, 2]))
        return nn.Conv2d(
            channels, channels, kernel, padding=dilation * (kernel // 2), dilation=dilation,
            groups=groups, bias=draw(st.booleans()),
        )  # fmt: skip
    if kind == "norm":
        return nn.BatchNorm2d(channels, affine=draw(st.booleans()))
    if kind == "activation":
        return draw(st.sampled_from(ACTIVATIONS))()
    if kind == "drop":
        return draw(st.sampled_from([nn.Identity, nn.Dropout]))()
    if kind == "pool":
        return draw(st.sampled_from([nn.AvgPool2d(3, 1, 1), nn.MaxPool2d(3, 1, 1)]))
    branch = nn.Sequential(
        nn.Conv2d(channels, channels, 3, padding=1), nn.BatchNorm2d(channels),
        nn.ReLU(inplace=True), nn.Conv2d(channels, channels, 1),
    )  # fmt: skip
    return Residual(branch, draw(st.sampled_from(["inplace", "difference", "scaled"])))


@st.composite
def networks(draw) -> nn.Module:
    channels = 4
    stride = draw(st.sampled_from([1, 2]))
    pool = draw(st.sampled_from([nn.AdaptiveAvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(2)]))
    body = draw(st.lists(layers(channels), min_size=1, max_size=5))
    seed = draw(st.integers(0, 2**31))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = nn.Sequential(
            nn.Conv2d(3, channels, 3, stride, 1), *body, pool, nn.Flatten(), nn.LazyLinear(5)
        )
        network.double().eval()(torch.zeros(1, 3, 8, 8, dtype=torch.float64))
        for module in network.modules():
            # Random weights: an activation that is exactly at a kink does not occur by chance.
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.normal_(module.weight, std=0.4)
            if isinstance(module, nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return network


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    network=networks(),
    h=st.sampled_from([1e-4, 1e-3, 1e-2, 0.3]),
    temperature=st.sampled_from([1.0, 2.0]),
    classes=st.sampled_from([None, [3, 0, 2]]),
)
def test_in_float64_it_equals_direct_differences_on_random_networks(
    network, h, temperature, classes
):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, 3, 8, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 2, 3])
    settings: dict[str, Any] = {"h": h, "temperature": temperature, "classes": classes}
    # In the direct difference of two gradients, float64's 1e-16 is divided by h.
    direct, propagated = both(network, images, labels, n_probes=3, **settings)
    assert_equal(direct, propagated, h, images[0].numel())


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
    network = Spelled().double().eval()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    for h in (1e-3, 0.1):
        direct, propagated = both(network, images, torch.tensor([0, 1, 2, 3]), h=h)
        assert_equal(direct, propagated, h, images[0].numel())


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    root = tmp_path_factory.mktemp("digits")
    make_dataset(root)
    cifar = read_cifar(root / DIRECTORY)
    return normalise(cifar.images), torch.from_numpy(cifar.labels)


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
    settings: dict[str, Any] = {"batch_size": 16, "n_probes": 10}
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
    for precision, median in (("bfloat16", 4e-3), ("float32", 1e-4)):
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
