"""What difference propagation does not understand it does not take for a constant.

Each network here was, or could be, mistaken for another by whoever reads only the operations that
give one tensor from one tensor. By name the method refuses it and names the operation; left to
itself, the program says so and gives what direct differences give.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daskcurv import score_samples
from daskcurv.errors import ConfigError
from daskcurv.estimators import selection
from daskcurv.estimators.layers import Affine, Rectifier
from tests.support.oracles import assert_scores, referee

CLASSES = 5


@pytest.fixture(autouse=True)
def fast_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: True)


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


class Network(nn.Module):
    """A hidden layer of 8, something in the middle, and a head on what comes of it."""

    def __init__(self, middle: Callable[..., Tensor], width: int = 8):
        super().__init__()
        self.first, self.head = nn.Linear(12, 8), nn.Linear(width, CLASSES)
        self.scale = nn.Parameter(torch.full((), 0.5))
        self.register_buffer("state", torch.ones(8))
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.middle(self, self.first(x.flatten(1))))
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cells, self.head = nn.LSTM(4, 6, batch_first=True), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.cells(x.flatten(2))
        logits: Tensor = self.head(hidden[-1])
        return logits


def chunks(net: Any, h: Tensor) -> Tensor:
    u, v = h.chunk(2, 1)
    return torch.relu(h) + torch.cat([u * torch.sigmoid(v), v], 1)


def chunk_beside(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) + F.linear(h.chunk(2, 1)[0], net.first.weight[:8, :4])


def split(net: Any, h: Tensor) -> Tensor:
    three, five = torch.split(h, [3, 5], dim=1)
    return torch.cat([torch.relu(five), three], 1)


def dictionary(net: Any, h: Tensor) -> Tensor:
    parts: dict[str, Any] = {"h": torch.relu(h), "pair": [h, (h, {"deep": h.unbind(1)[0]})]}
    result: Tensor = parts["h"] + parts["pair"][1][1]["deep"].reshape(-1, 1)
    return result


def keyword(net: Any, h: Tensor) -> Tensor:
    return torch.addcmul(torch.relu(h), h, h, value=0.1)


def maximum(net: Any, h: Tensor) -> Tensor:
    return h - h.max(dim=1, keepdim=True).values


def count(net: Any, h: Tensor) -> Tensor:
    return h * (h.size(0) * 0.25)


def count_of_shape(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) / h.shape[0]


def whole_mean(net: Any, h: Tensor) -> Tensor:
    return h - h.mean()


def batch_mean(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) - h.mean(0, keepdim=True)


def two_samples(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h.view(2, -1)).view(-1, 8)


def changed_in_place(net: Any, h: Tensor) -> Tensor:
    return F.relu(h, inplace=True) + h


def changed_through_a_view(net: Any, h: Tensor) -> Tensor:
    h.view(-1, 2, 4).mul_(0.5)
    return torch.relu(h)


def changed_behind_an_alias(net: Any, h: Tensor) -> Tensor:
    kept = F.dropout(h, training=False)
    kept += 1
    return torch.relu(h)


def detached(net: Any, h: Tensor) -> Tensor:
    return h * h.detach()


def data(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) + h.data


def broadcast(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h.mean(1, keepdim=True) + net.state)


def index(net: Any, h: Tensor) -> Tensor:
    return h.flip(1) + h[:, :1]


def slope_of_the_input(net: Any, h: Tensor) -> Tensor:
    return F.prelu(h, h.mean().reshape(1))


def into_a_buffer(net: Any, h: Tensor) -> Tensor:
    net.state = h.mean(0)
    result: Tensor = torch.relu(h) * net.state
    return result


def chunk_of_samples(net: Any, h: Tensor) -> Tensor:
    first: Tensor = h.split(32)[0]
    return torch.relu(h) * first


def some_samples(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) * h[:32]


def flipped_samples(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) + h.flip(0)


def rolled_samples(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h) + torch.roll(h, 1, 0)


def samples_joined(net: Any, h: Tensor) -> Tensor:
    return torch.relu(torch.cat([h, h + 1])).reshape(2, -1, 8).mean(0)


def samples_and_features(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h).reshape(4, -1, 2).transpose(0, 1).reshape(-1, 8)


def softmax_of_samples(net: Any, h: Tensor) -> Tensor:
    return torch.softmax(h, 0)


MIDDLES = [
    (chunk_of_samples, "method split"),
    (some_samples, "function getitem"),
    (flipped_samples, "method flip mixes samples"),
    (rolled_samples, "function roll mixes samples"),
    (samples_joined, "function cat"),
    (samples_and_features, "mixes samples|depends on the batch"),
    (softmax_of_samples, "function softmax"),
    (keyword, "function addcmul"),
    (maximum, "method max"),
    (count, "function mul"),
    (count_of_shape, "function truediv"),
    (whole_mean, "method mean mixes samples"),
    (batch_mean, "method mean mixes samples"),
    (two_samples, "view"),
    (changed_in_place, "reads what was changed in place"),
    (changed_through_a_view, "reads what was changed in place"),
    (changed_behind_an_alias, "its graph has different gradients"),
    (detached, "method detach"),
    (data, "function getattr"),
    (slope_of_the_input, "mixes samples"),
    (into_a_buffer, "method mean"),
]


UNDERSTOOD = [chunks, chunk_beside, split, dictionary, broadcast, index]


def build(middle: Callable[..., Tensor]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        return Network(middle)


def samples(count: int = 6) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(count, 3, 2, 2, generator=generator)
    return images, torch.arange(count) % CLASSES


@pytest.mark.parametrize(("middle", "what"), MIDDLES, ids=lambda v: getattr(v, "__name__", ""))
def test_an_operation_that_is_not_understood_is_named_and_direct_differences_used(
    warnings, middle, what
):
    model, (images, labels) = build(middle), samples()
    settings: dict[str, Any] = {"n_probes": 2, "batch_size": 3}
    with pytest.raises(ConfigError, match=what):
        score_samples(model, images, labels, method="difference-propagation", **settings)
    found = score_samples(model, images, labels, **settings)
    (said,) = [text for text in warnings() if "instead of difference propagation" in text]
    assert re.search(what, said)
    direct = score_samples(model, images, labels, method="finite-difference", **settings)
    np.testing.assert_array_equal(found.curvature, direct.curvature)
    np.testing.assert_array_equal(found.loss, direct.loss)


@pytest.mark.parametrize("middle", UNDERSTOOD)
def test_several_results_and_broadcasting_are_understood(middle, warnings):
    model, (images, labels) = build(middle).double(), samples()
    settings: dict[str, Any] = {"n_probes": 2, "h": 0.3}
    found = score_samples(
        model, images.double(), labels, method="difference-propagation", **settings
    )
    expected = referee(model, images.double(), labels, **settings)
    assert_scores(found, expected, images[0].numel(), h=0.3)
    assert warnings() == []


def test_a_recurrent_classifier_is_scored_as_defined(warnings):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Recurrent()
    images, labels = samples()
    with pytest.raises(ConfigError, match=r"module cells \(LSTM\)"):
        score_samples(model, images, labels, method="difference-propagation")
    found = score_samples(model, images, labels, n_probes=2, batch_size=2)
    assert "module cells (LSTM)" in warnings()[0]
    expected = referee(model, images, labels, n_probes=2)
    np.testing.assert_allclose(found.loss, expected["loss"], rtol=1e-5)
    # Direct differences in float32: rounding over h.
    np.testing.assert_allclose(found.curvature, expected["curvature"], rtol=2e-2)


def by_size(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h).reshape(h.size(0), h.shape[1] // 2, -1).flatten(1)


def by_unpacking(net: Any, h: Tensor) -> Tensor:
    rows, columns = h.shape
    return torch.relu(h.view(rows * 2 // 2, columns) / columns)


def by_part_of_shape(net: Any, h: Tensor) -> Tensor:
    return torch.relu(h.view(h.shape[:1] + (4, 2))).flatten(1)  # noqa: RUF005


@pytest.mark.parametrize("middle", [by_size, by_unpacking, by_part_of_shape])
def test_shapes_that_follow_the_number_of_samples_are_understood(middle):
    model, (images, labels) = build(middle), samples(7)
    images = images.double()
    found = score_samples(
        model, images, labels, method="difference-propagation", n_probes=2, batch_size=3
    )
    assert_scores(found, referee(model, images, labels, n_probes=2), images[0].numel())


def doubled(layer: Any, x: Tensor) -> Any:
    return 2 * type(layer).forward(layer, x)


def with_hook(model: nn.Module) -> None:
    model.get_submodule("2").register_forward_hook(lambda module, inputs, output: output * 2)


def with_replaced_forward(model: nn.Module) -> None:
    layer = model.get_submodule("2")
    # Of its arguments a copy of the network has copies.
    layer.forward = partial(doubled, layer)


def with_backward_hook(model: nn.Module) -> None:
    def double(module: nn.Module, before: Any, after: Any) -> Any:
        return tuple(2 * gradient for gradient in before)

    model.get_submodule("2").register_full_backward_hook(double)


def with_parametrization(model: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(model.get_submodule("2"))


def with_batch_statistics(model: nn.Module) -> None:
    norm = model.get_submodule("3")
    norm.train = lambda mode=True: norm  # type: ignore[method-assign]
    norm.training = True


CHANGES = [with_hook, with_replaced_forward, with_backward_hook, with_parametrization]


def convolutional(change: Callable[[nn.Module], None]) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.Flatten(),
            nn.Linear(16, CLASSES),
        )  # fmt: skip
        norm = model.get_submodule("3")
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        norm.running_mean.normal_()
        nn.init.uniform_(norm.weight, 0.5, 2)
    change(model.eval())
    return model


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("method", ["auto", "finite-difference"])
def test_a_layer_that_computes_more_than_its_kind_is_not_folded_or_replaced(change, method):
    model, (images, labels) = convolutional(change), samples()
    found = score_samples(model, images, labels, method=method, n_probes=2)
    images = images.double()
    if change is not with_backward_hook:
        expected = referee(model, images, labels, n_probes=2)
        np.testing.assert_allclose(found.loss, expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(found.curvature, expected["curvature"], rtol=5e-2)
    with pytest.raises(ConfigError, match=r"module 2|has hooks"):
        score_samples(model, images, labels, method="difference-propagation", n_probes=2)


def test_a_module_that_stays_in_training_mode_is_not_taken_to_be_fixed(warnings):
    model, (images, labels) = convolutional(with_batch_statistics), samples()
    with pytest.raises(ConfigError, match=r"module 3 \(BatchNorm2d\)"):
        score_samples(model, images, labels, method="difference-propagation")
    score_samples(model, images, labels, n_probes=1)
    assert any("depend on the others in its batch" in text for text in warnings())


def test_the_clean_pass_is_compared_with_the_network_before_anything_is_returned(monkeypatch):
    """Whatever a rule gets wrong: here a bias is forgotten, or a gradient doubled."""
    model, (images, labels) = convolutional(lambda model: None), samples()
    clean, back = Affine.clean, Rectifier.clean_gradient
    settings: dict[str, Any] = {"method": "difference-propagation", "n_probes": 1}
    score_samples(model, images, labels, **settings)
    monkeypatch.setattr(Affine, "clean", lambda self, parts: clean(self, parts) + 0.01)
    with pytest.raises(ConfigError, match=r"has different logits .* in a batch of 6"):
        score_samples(model, images, labels, **settings)
    monkeypatch.setattr(Affine, "clean", clean)
    monkeypatch.setattr(Rectifier, "clean_gradient", lambda self, parts: 2 * back(self, parts))
    with pytest.raises(ConfigError, match="has different input gradients"):
        score_samples(model, images, labels, **settings)


@pytest.mark.parametrize("error", [KeyError("b"), IndexError("5"), AttributeError("x"), ValueError])
@pytest.mark.parametrize("spared", [0, 2], ids=["at once", "later"])
def test_whatever_stops_the_fast_method_the_direct_one_goes_on(
    warnings, monkeypatch, error, spared
):
    model, (images, labels) = convolutional(lambda model: None), samples()
    forward, calls = Rectifier.forward, []

    def fail(self: Rectifier, parts: list[Tensor]) -> Tensor:
        calls.append(1)
        if len(calls) > spared:
            raise error
        return forward(self, parts)

    monkeypatch.setattr(Rectifier, "forward", fail)
    found = score_samples(model, images, labels, n_probes=1, batch_size=3)
    (said,) = warnings()
    assert "the rule for module 1 (ReLU) failed (forward)" in said
    direct = score_samples(
        model, images, labels, n_probes=1, batch_size=3, method="finite-difference"
    )
    same = found.curvature == direct.curvature
    assert same[3:].all()
    np.testing.assert_allclose(found.curvature, direct.curvature, rtol=0.1)
