"""Which method is used, and what is said when it is not the fast one."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from daskcurv import open_results, score_samples
from daskcurv.config import EstimatorConfig
from daskcurv.errors import ConfigError
from daskcurv.estimators import selection
from daskcurv.estimators.difference_propagation import DifferencePropagation
from daskcurv.estimators.layers import Rectifier
from daskcurv.estimators.network import Network
from daskcurv.estimators.scoring import Scorer
from tests.support.builders import make_model
from tests.support.project import Project


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    # Most of what is tested here is tried only by CPUs that have it.
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: True)


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    # PyTorch says a lot when kernels are compiled, which happens after some time of use.
    monkeypatch.setattr(
        caplog.handler, "filters", [lambda record: record.name.startswith("daskcurv")]
    )
    return caplog


@pytest.fixture
def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(5, 3, 32, 32, generator=generator), torch.arange(5)


class Gate(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Centre(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True)


class _Straight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return values.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 3 * gradient


class OwnGradient(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = _Straight.apply(x)
        return result


def network(odd: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), odd, nn.Flatten(), nn.Linear(900, 10)
        return nn.Sequential(*layers)


class Sums(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cumsum(x, 1)


SUPPORTED = [
    nn.GroupNorm(2, 4),
    nn.Softmax(1),
    nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"),
    Gate(),
]

UNSUPPORTED = [
    (nn.Softmax2d(), r"module 2 \(Softmax2d\)"),
    (nn.RReLU(), r"module 2 \(RReLU\)"),
    (Sums(), r"function cumsum"),
    (Branch(), r"Sequential cannot be traced"),
    (OwnGradient(), r"Sequential cannot be traced"),
]


@pytest.mark.parametrize("middle", SUPPORTED, ids=lambda value: type(value).__name__)
def test_a_network_with_rules_for_all_it_does_is_scored_by_propagation(messages, samples, middle):
    scorer = Scorer(network(middle), EstimatorConfig(n_probes=2), batch_size=5)
    scorer.score(samples[0], samples[1], torch.arange(5))
    assert scorer.method.startswith("difference-propagation, ")
    assert messages.records == []


@pytest.mark.parametrize(("odd", "what"), UNSUPPORTED, ids=lambda value: type(value).__name__)
def test_a_network_without_rules_is_scored_directly_and_the_module_named(
    messages, samples, odd, what
):
    model = network(odd)
    found = score_samples(model, *samples, n_probes=2)
    (record,) = messages.records
    assert record.levelname == "WARNING"
    assert "direct finite differences instead of difference propagation" in record.message
    assert re.search(what, record.message)
    direct = score_samples(model, *samples, n_probes=2, method="finite-difference")
    np.testing.assert_array_equal(found.curvature, direct.curvature)
    with pytest.raises(ConfigError, match=what):
        score_samples(model, *samples, n_probes=2, method="difference-propagation")


def test_gradients_of_a_networks_own_making_are_kept(samples):
    model = network(OwnGradient())
    scores = score_samples(model, *samples, n_probes=1)
    images = samples[0].clone().requires_grad_(True)
    loss = nn.functional.cross_entropy(model(images), samples[1], reduction="sum")
    (gradient,) = torch.autograd.grad(loss, images)
    np.testing.assert_allclose(scores.grad_norm, gradient.flatten(1).norm(dim=1), rtol=1e-5)


def test_the_residual_network_is_scored_by_difference_propagation(messages, samples):
    scorer = Scorer(make_model(), EstimatorConfig(n_probes=2), batch_size=5)
    assert scorer.method == ""
    scorer.score(samples[0], samples[1], torch.arange(5))
    assert scorer.method.startswith("difference-propagation, ")
    assert messages.records == []


def test_a_wrong_rule_fails_the_self_check(messages, monkeypatch, samples):
    right = Rectifier.backward
    monkeypatch.setattr(Rectifier, "backward", lambda self, parts: 1.02 * right(self, parts))
    model = make_model()
    found = score_samples(model, *samples, n_probes=2)
    assert "in the self-check on 5 samples they differ by" in messages.text
    direct = score_samples(model, *samples, n_probes=2, method="finite-difference")
    np.testing.assert_array_equal(found.curvature, direct.curvature)


@pytest.mark.parametrize(("factor", "accepted"), [(1.3, True), (1.7, False), (0.4, False)])
def test_a_rule_that_is_wrong_for_one_sample_of_eight_fails_the_self_check(
    messages, monkeypatch, samples, factor, accepted
):
    """By half: the median of the others would not tell, and single kinks decide a few per cent."""
    images, labels = torch.cat([samples[0], -samples[0]])[:8], torch.arange(8)
    right = Network.backward

    def wrong(self: Network, gamma: Tensor) -> Tensor:
        result = right(self, gamma)
        result.unflatten(0, (-1, 8))[:, 3] *= factor
        return result

    monkeypatch.setattr(Network, "backward", wrong)
    scorer = Scorer(make_model(), EstimatorConfig(n_probes=2, precision="float32"))
    scorer.choose_method(images, labels, torch.arange(8))
    assert scorer.method.startswith("difference-propagation" if accepted else "finite-difference")
    assert ("in the self-check on 8 samples they differ by" in messages.text) is not accepted


def test_the_method_is_chosen_by_the_samples_given(monkeypatch, samples):
    scorer = Scorer(make_model(), EstimatorConfig(n_probes=2), batch_size=5)
    scorer.choose_method(samples[0], samples[1], torch.arange(5))
    assert scorer.method.startswith("difference-propagation")


def test_a_cpu_without_fast_bfloat16_takes_direct_differences(monkeypatch, messages, samples):
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: False)
    monkeypatch.setattr(DifferencePropagation, "__call__", None)
    model = make_model()
    found = score_samples(model, *samples, n_probes=2)
    direct = score_samples(model, *samples, n_probes=2, method="finite-difference")
    np.testing.assert_array_equal(found.curvature, direct.curvature)
    assert messages.records == []


@pytest.mark.parametrize(
    "settings",
    [{"precision": "float32"}, {"method": "difference-propagation"}, {"precision": "bfloat16"}],
)
def test_without_fast_bfloat16_propagation_can_be_asked_for(monkeypatch, samples, settings):
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: False)
    scorer = Scorer(make_model(), EstimatorConfig(n_probes=2, **settings), batch_size=5)
    scorer.choose_method(samples[0], samples[1], torch.arange(5))
    assert scorer.method == f"difference-propagation, {settings.get('precision', 'float32')}"


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_store_begun_with_propagation_goes_on_with_it(
    project: Project, dry_launch, monkeypatch, precision
):
    run = project.launch("--epochs", "0", "--precision", precision, "--no_export")
    assert run.returncode == 0, run.stdout
    results = open_results(project.store)
    assert results.method.sel(epoch=0) == f"difference-propagation, {precision}"
    for fast in (False, True):
        monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device, fast=fast: fast)
        # Another method would be refused.
        assert dry_launch() == 0


def test_float64_is_scored_directly_unless_asked_otherwise(monkeypatch, samples):
    images, labels = samples[0].double(), samples[1]
    model = make_model()
    found = score_samples(model, images, labels, n_probes=2)
    direct = score_samples(model, images, labels, n_probes=2, method="finite-difference")
    np.testing.assert_array_equal(found.curvature, direct.curvature)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"precision": "half"}, "precision is 'half'; expected one of"),
        ({"method": "finite-difference", "precision": "bfloat16"}, "always computed in float32"),
        ({"method": "guess"}, "method is 'guess'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(samples, settings, message):
    with pytest.raises(ConfigError, match=message):
        score_samples(make_model(), *samples, **settings)


def test_the_model_and_the_process_are_left_as_they_were(samples):
    model = make_model().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    knobs = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    states = [knob.fp32_precision for knob in knobs]
    score_samples(model, *samples, n_probes=1, precision="tf32")
    assert [name for name, _ in model.named_modules()] == names
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert [knob.fp32_precision for knob in knobs] == states
