"""`score_samples` takes any classifier, and says what is wrong with what is none."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from daskcurv import score_samples
from daskcurv.errors import ConfigError
from daskcurv.estimators.arguments import enable_gradients_of_recurrent_layers
from tests.support.oracles import assert_scores, referee

METHODS = ["auto", "finite-difference", "difference-propagation", "zeroth-order"]


class Classifier(nn.Module):
    """A linear layer, and something made of its logits."""

    def __init__(self, ending: Callable[..., Any] = lambda net, z: z, before: Any = None):
        super().__init__()
        self.layer = nn.Linear(12, 5)
        self.ending, self.before, self.calls = ending, before, 0

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        if self.before is not None:
            x = self.before(x)
        return self.ending(self, self.layer(x.flatten(1)))


def samples(count: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    return torch.randn(count, 3, 2, 2, generator=generator), torch.arange(count) % 5


NO_LOGITS: list[tuple[Callable[..., Any], str]] = [
    (lambda net, z: (z, z), "a tuple of 2 values"),
    (lambda net, z: [z], "a list of 1 values"),
    (lambda net, z: {"logits": z, "loss": 0}, "a dict with keys logits, loss"),
    (lambda net, z: SimpleNamespace(logits=z), "with an attribute logits"),
    (lambda net, z: None, "a NoneType"),
    (lambda net, z: z.flatten(), r"a tensor of shape \(5,\) for 1 samples"),
    (lambda net, z: z[..., None], r"a tensor of shape \(1, 5, 1\)"),
    (lambda net, z: torch.cat([z, z]), r"a tensor of shape \(2, 5\) for 1 samples"),
    (lambda net, z: z.mean(), r"a tensor of shape \(\)"),
    (lambda net, z: z.to(torch.complex64), "complex64"),
    (lambda net, z: z.half(), "float16"),
    (lambda net, z: z.argmax(1, keepdim=True), "int64"),
    (lambda net, z: z[:, :1], "one logit"),
]


@pytest.mark.parametrize(("ending", "said"), NO_LOGITS, ids=[said for _, said in NO_LOGITS])
@pytest.mark.parametrize("method", METHODS)
def test_what_returns_no_logits_is_refused(ending, said, method):
    with pytest.raises(ConfigError, match=said):
        score_samples(Classifier(ending), *samples(), method=method, n_probes=2)


@pytest.mark.parametrize(
    "ending",
    [lambda net, z: z.detach(), lambda net, z: z.round().detach(), lambda net, z: z.data],
    ids=["detach", "round", "data"],
)
def test_logits_without_a_gradient_are_refused(ending):
    with pytest.raises(ConfigError, match="have no gradient with respect to its input"):
        score_samples(Classifier(ending), *samples(), n_probes=2)


@pytest.mark.parametrize(
    "ending",
    [lambda net, z: F.dropout(z), lambda net, z: z + net.calls, lambda net, z: torch.rand_like(z)],
    ids=["dropout", "counts its calls", "random"],
)
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_no_function_is_refused(ending, method):
    with pytest.raises(ConfigError, match="different logits for the same image each time"):
        score_samples(Classifier(ending), *samples(), method=method, n_probes=2)


def test_samples_that_see_each_other_are_warned_of(caplog):
    score_samples(Classifier(lambda net, z: z - z.mean(0)), *samples(), n_probes=1)
    assert "depend on the others in its batch" in caplog.text
    caplog.clear()
    score_samples(Classifier(), *samples(), n_probes=1)
    assert caplog.text == ""


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_images_that_are_not_finite_are_refused_and_the_first_named(value):
    images, labels = samples()
    images[2, 0, 1, 1] = value
    with pytest.raises(ConfigError, match="NaN or infinity: 1 of 4, first in number 2"):
        score_samples(Classifier(), images, labels)


def test_token_ids_are_refused_with_a_word_on_embeddings():
    tokens = torch.randint(0, 9, (4, 12))
    model = nn.Sequential(nn.Embedding(9, 1), nn.Flatten(), nn.Linear(12, 5))
    with pytest.raises(ConfigError, match=r"like token ids.*embeddings"):
        score_samples(model, tokens, samples()[1])
    # As floats they get past the first look, and the model says what it lacks.
    with pytest.raises(ConfigError, match=r"Sequential cannot take images of shape \(1, 12\)"):
        score_samples(model, tokens.float(), samples()[1])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"labels": [0, 1, 2, 5]}, r"labels contain 5, which is not among the model's outputs"),
        ({"labels": [0, 1, 2, -1]}, "labels have dtype"),
        ({"images": torch.zeros(4, 3, 3, 3)}, r"cannot take images of shape \(1, 3, 3, 3\)"),
        ({"model": lambda x: x}, "model is a function; expected a torch.nn.Module"),
        ({"model": nn.Sequential(nn.Flatten(), nn.LazyLinear(5))}, "Sequential cannot be copied"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"device": "cuda:77"}, "device is 'cuda:77'"),
    ],
    ids=lambda value: "" if isinstance(value, str) else next(iter(value)),
)
def test_arguments_that_do_not_fit_are_refused(arguments, said):
    images, labels = samples()
    with pytest.raises(ConfigError, match=said):
        score_samples(**{"model": Classifier(), "images": images, "labels": labels, **arguments})


def test_weights_that_are_not_finite_are_refused_by_name():
    model = Classifier()
    model.layer.bias.data[3] = float("nan")
    with pytest.raises(ConfigError, match=r"parameter layer\.bias holds NaN"):
        score_samples(model, *samples())


def test_results_that_are_not_finite_are_counted(caplog):
    images, labels = samples()
    images[1] = 1e30
    score_samples(Classifier(lambda net, z: z * 1e20), images, labels, n_probes=1)
    assert "the results of 1 of 4 samples are not finite numbers, first those of" in caplog.text


@pytest.mark.parametrize("method", METHODS)
def test_a_model_may_change_its_input_in_place(method):
    images, labels = samples()
    images = images.double()
    kept = images.clone()
    inplace = Classifier(before=lambda x: x.sub_(0.5).mul_(2))
    plain = Classifier(before=lambda x: (x - 0.5) * 2)
    plain.load_state_dict(inplace.state_dict())
    settings: dict[str, Any] = {"method": method, "n_probes": 2}
    found = score_samples(inplace, images, labels, **settings)
    expected = score_samples(plain, images, labels, **settings)
    np.testing.assert_allclose(found.curvature, expected.curvature, rtol=1e-9)
    np.testing.assert_allclose(found.loss, expected.loss, rtol=1e-12)
    assert torch.equal(images, kept)


def test_logits_in_float64_of_float32_images_are_taken():
    images, labels = samples()
    found = score_samples(Classifier(lambda net, z: z.double()), images, labels, n_probes=1)
    assert np.isfinite(found.curvature).all()


def test_any_size_and_shape_of_input_will_do():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    images = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()
    labels = torch.tensor([0, 1, 2, 0, 1])
    for method in ("finite-difference", "difference-propagation"):
        found = score_samples(model, images, labels, method=method, n_probes=3)
        assert_scores(found, referee(model, images, labels, n_probes=3), 7)


def test_recurrent_layers_can_be_put_where_cudnn_has_gradients():
    layer = nn.LSTM(4, 6, num_layers=2, batch_first=True, dropout=0.5).eval()
    inputs = torch.randn(3, 5, 4)
    expected, _ = layer(inputs)
    enable_gradients_of_recurrent_layers(layer)
    assert layer.training
    found, _ = layer(inputs)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
