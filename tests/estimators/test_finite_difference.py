"""Direct finite differences are what the definitions say, as accurate as float32 is relied on for.

Three oracles, none of which uses the estimator's code: the definitions evaluated in float64 for
each sample alone, with a loss written out from the logits (`referee`); exact Hessian-vector
products, for a smooth network; and a closed form in NumPy, for a linear one. Only the probes are
the package's own (test_probes.py checks those).
"""

from __future__ import annotations

import copy
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from daskcurv import rademacher_probes, score_samples
from daskcurv.experiment.resnet18 import ModelSpec
from tests.support.builders import TINY, make_model, normalise, write_cifar
from tests.support.oracles import MEASURES, referee, relative_errors

score = partial(score_samples, method="finite-difference")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    images, labels = write_cifar(tmp_path_factory.mktemp("cifar"), num_samples=64)
    return normalise(images), torch.from_numpy(labels)


@pytest.fixture(scope="module")
def full_size_errors(pictures):
    """Errors in float32 for 6 samples that a full-size network was trained on and 6 others."""
    images, labels = pictures
    model = make_model(ModelSpec()).train()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)
    for _ in range(10):
        optimiser.zero_grad()
        F.cross_entropy(model(images[:32]), labels[:32]).backward()
        optimiser.step()
    images, labels = images[26:38], labels[26:38]
    settings: dict[str, Any] = {"n_probes": 4}
    scores = score(model, images, labels, batch_size=len(images), **settings)
    expected = referee(model, images, labels, **settings)
    np.testing.assert_array_equal(scores.prediction, expected["prediction"])
    # The comparison is to cover samples that the network is sure of and ones it gets wrong.
    assert expected["loss"].min() < 0.01
    assert expected["loss"].max() > 1
    return relative_errors(scores, expected, 1e-3, images[0].numel())


# Measured, median and worst of the 12 samples: curvature 1.1e-6 and 6.8e-4, curvature_sq 2.0e-6
# and 1.3e-3, directional_eig 4.0e-8 and 3.0e-4, loss 2.8e-7 and 5.9e-6, grad_norm 1.4e-7 and
# 5.6e-5 (1.5e-4 when the network was trained on one thread). Nearly all of it comes from ReLUs
# whose sign is decided by rounding; which samples they hit differs from machine to machine.
@pytest.mark.parametrize(
    ("name", "median", "worst"),
    [
        ("curvature", 1e-4, 2e-2),
        ("curvature_sq", 2e-4, 4e-2),  # a square doubles the relative error
        ("directional_eig", 1e-4, 2e-3),
        # A sample the network is sure of has a loss near exp(-margin): an absolute error of the
        # float32 logits, 1e-5 at a size of 20, is a relative error of the loss and its gradient.
        ("loss", 1e-5, 1e-4),
        # The gradient jumps where a ReLU's sign is decided by rounding.
        ("grad_norm", 1e-5, 1e-3),
    ],
)
def test_float32_agrees_with_float64_on_the_full_size_network(
    full_size_errors, name, median, worst
):
    assert np.median(full_size_errors[name]) <= median
    assert full_size_errors[name].max() <= worst


@pytest.mark.parametrize(
    "spec", [TINY, ModelSpec(num_classes=10, width=4, norm="identity")], ids=["batch", "identity"]
)
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 2.0},
        {"h": 1e-4},
        {"h": 1e-2},
        {"seed": 2**64 - 1},
        {"n_probes": 1},
        {"classes": [7, 2, 5, 0, 9]},
        {"classes": [9, 0, 5, 2, 7], "temperature": 0.5, "h": 3e-3, "seed": 11},
    ],
    ids=lambda settings: " ".join(settings) or "defaults",
)
def test_float64_agrees_with_the_definitions(pictures, spec, settings):
    images, labels = pictures
    allowed = torch.tensor(settings.get("classes", range(10)))
    chosen = torch.isin(labels, allowed).nonzero().flatten()[:5]
    images, labels = images[chosen].double(), labels[chosen]
    model = make_model(spec)
    scores = score(model, images, labels, sample_ids=chosen, **{"n_probes": 3, **settings})
    expected = referee(model, images, labels, ids=chosen.tolist(), **{"n_probes": 3, **settings})
    np.testing.assert_array_equal(scores.prediction, expected["prediction"])
    errors = relative_errors(scores, expected, settings.get("h", 1e-3), images[0].numel())
    for name in MEASURES:
        assert errors[name].max() <= 1e-9, name


def test_with_an_active_head_the_other_outputs_do_not_matter(pictures):
    images, labels = pictures
    classes = [7, 2, 5]
    chosen = torch.isin(labels, torch.tensor(classes))
    images, labels = images[chosen], labels[chosen]
    model = make_model()
    scores = score(model, images, labels, n_probes=2, classes=classes)
    with torch.no_grad():
        model.get_parameter("fc.bias")[[0, 1, 3, 4, 6, 8, 9]] += 100
    changed = score(model, images, labels, n_probes=2, classes=classes)
    for name in (*MEASURES, "prediction"):
        np.testing.assert_array_equal(getattr(changed, name), getattr(scores, name))
    assert set(scores.prediction) <= set(classes)
    assert not set(score(model, images, labels, n_probes=1).prediction) & set(classes)


def softplus_network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, padding=1),
            nn.Softplus(),
            nn.Conv2d(8, 16, 3, stride=2, padding=1),
            nn.Softplus(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(64, 10),
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_curvature_of_a_smooth_network_is_the_norm_of_exact_hessian_products(pictures, dtype):
    images, labels = pictures[0][:6], pictures[1][:6]
    network, h, n_probes = softplus_network(), 1e-3, 5
    norms, squares, products = [], [], []
    for sample in range(6):
        probes = rademacher_probes([sample], images.shape[1:], n_probes)[0]
        point = images[sample : sample + 1].double().requires_grad_(True)
        loss = F.cross_entropy(copy.deepcopy(network).double()(point), labels[sample : sample + 1])
        (gradient,) = torch.autograd.grad(loss, point, create_graph=True)
        hessian_products = []
        for probe in torch.from_numpy(probes).double():
            along = (gradient[0] * probe).sum()
            (product,) = torch.autograd.grad(along, point, retain_graph=True)
            hessian_products.append(product[0].numpy())
        norms.append(np.mean([np.linalg.norm(p) for p in hessian_products]))
        squares.append(np.mean([np.linalg.norm(p) ** 2 for p in hessian_products]))
        products.append(
            np.mean([np.sum(v * p) for v, p in zip(probes, hessian_products, strict=True)])
        )
    scores = score(network, images.to(dtype), labels, h=h, n_probes=n_probes)
    np.testing.assert_allclose(scores.curvature / h, norms, rtol=1e-2)
    np.testing.assert_allclose(scores.curvature_sq / h**2, squares, rtol=2e-2)
    bound = np.sqrt(images[0].numel()) * np.array(norms)
    assert (np.abs(scores.directional_eig / h**2 - products) <= 1e-3 * bound).all()


def test_finite_differences_approach_the_hessian_as_the_step_shrinks(pictures):
    images, labels = pictures[0][:4].double(), pictures[1][:4]
    ratios = [
        score(softplus_network(), images, labels, h=h, n_probes=2).curvature / h
        for h in (1e-1, 1e-2, 1e-3, 1e-4)
    ]
    steps = [np.abs(b - a).max() for a, b in pairwise(ratios)]
    assert steps[0] > 5 * steps[1] > 25 * steps[2]


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 3e-4)], ids=["float64", "float32"]
)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_a_linear_model_has_the_closed_form_results(pictures, dtype, bound, temperature):
    generator = np.random.default_rng(0)
    weight, bias = generator.normal(size=(10, 3072)) / 50, generator.normal(size=10)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
    model[1].weight.data = torch.tensor(weight)
    model[1].bias.data = torch.tensor(bias)
    images, labels = pictures[0][:8].to(dtype), pictures[1][:8]
    h, n_probes = 1e-2, 4

    onehot = np.eye(10)[labels.numpy()]

    def softmax(points: np.ndarray) -> Any:
        logits = (points @ weight.T + bias) / temperature
        exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
        return exponentials / exponentials.sum(axis=-1, keepdims=True)

    def gradient(points: np.ndarray, targets: np.ndarray) -> Any:
        return (softmax(points) - targets) @ weight / temperature

    points = images.double().numpy().reshape(8, 3072)
    probes = rademacher_probes(np.arange(8), (3072,), n_probes)
    clean = gradient(points, onehot)
    changes = gradient(points[:, None] + h * probes, onehot[:, None]) - clean[:, None]
    expected = {
        "curvature": np.linalg.norm(changes, axis=2).mean(axis=1),
        "curvature_sq": (changes**2).sum(axis=2).mean(axis=1),
        "directional_eig": (h * probes * changes).sum(axis=2).mean(axis=1),
        "loss": -np.log((softmax(points) * onehot).sum(axis=1)),
        "grad_norm": np.linalg.norm(clean, axis=1),
    }
    scores = score(model, images, labels, h=h, n_probes=n_probes, temperature=temperature)
    errors = relative_errors(scores, expected, h, 3072)
    for name in MEASURES:
        assert errors[name].max() <= bound, name
    np.testing.assert_array_equal(scores.prediction, (points @ weight.T + bias).argmax(axis=1))
