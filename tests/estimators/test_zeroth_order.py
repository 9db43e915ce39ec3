"""The estimator that takes second differences of the loss."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from daskcurv import rademacher_probes, score_samples
from daskcurv.errors import ConfigError

N, SHAPE = 5, (3, 2, 2)


@pytest.fixture
def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(12, 16), nn.Softplus(), nn.Linear(16, 4))


@pytest.fixture
def samples() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(N, *SHAPE, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, 4, (N,), generator=generator)


def hessian(network: nn.Module, image: torch.Tensor, label: torch.Tensor) -> np.ndarray:
    def loss(flat: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(network(flat.view(1, *SHAPE)), label[None])

    matrix: torch.Tensor = torch.autograd.functional.hessian(loss, image.flatten())
    return matrix.numpy()


def test_a_pair_of_probes_measures_the_bilinear_form_of_the_hessian(network, samples):
    images, labels = samples
    h, n_probes = 1e-3, 6
    scores = score_samples(network, images, labels, method="zeroth-order", h=h, n_probes=n_probes)
    probes = rademacher_probes(np.arange(N), SHAPE, n_probes).reshape(N, n_probes, -1)
    network.double()
    for sample in range(N):
        matrix = hessian(network, images[sample], labels[sample])
        v, u = probes[sample, ::2].astype(float), probes[sample, 1::2].astype(float)
        forms = h * np.einsum("ki,ij,kj->k", v, matrix, u)
        np.testing.assert_allclose(scores.curvature[sample], np.abs(forms).mean(), rtol=1e-4)
        np.testing.assert_allclose(scores.curvature_sq[sample], (forms**2).mean(), rtol=1e-4)


def test_its_square_estimates_what_that_of_the_gradient_estimators_does(network, samples):
    images, labels = samples
    both = [
        score_samples(network, images, labels, method=method, n_probes=2000)
        for method in ("zeroth-order", "finite-difference")
    ]
    np.testing.assert_allclose(both[0].curvature_sq, both[1].curvature_sq, rtol=0.1)
    ratio = both[0].curvature / both[1].curvature
    np.testing.assert_allclose(ratio, np.sqrt(2 / np.pi), rtol=0.1)


def test_what_needs_gradients_is_not_a_number_and_the_rest_agrees(network, samples):
    images, labels = samples
    zeroth = score_samples(network, images, labels, method="zeroth-order", n_probes=2)
    direct = score_samples(network, images, labels, method="finite-difference", n_probes=2)
    assert np.isnan(zeroth.directional_eig).all()
    assert np.isnan(zeroth.grad_norm).all()
    np.testing.assert_allclose(zeroth.loss, direct.loss, rtol=1e-12)
    np.testing.assert_array_equal(zeroth.prediction, direct.prediction)


def test_an_odd_number_of_probes_is_refused(network, samples):
    with pytest.raises(ConfigError, match="n_probes is 3; zeroth-order takes probes in pairs"):
        score_samples(network, *samples, method="zeroth-order", n_probes=3)


@pytest.mark.parametrize("settings", [{"temperature": 2.5}, {"classes": [2, 0, 3]}, {"seed": 7}])
def test_every_setting_of_the_loss_has_a_part_in_it(network, samples, settings):
    """Against the four losses of its definition, each written out from the logits."""
    images = samples[0]
    labels, h = torch.tensor([0, 2, 3, 0, 2]), 1e-2
    found = score_samples(
        network, images, labels, method="zeroth-order", h=h, n_probes=4, **settings
    )
    network.double()
    classes = settings.get("classes", [0, 1, 2, 3])

    def losses(points: torch.Tensor) -> np.ndarray:
        with torch.no_grad():
            logits = network(points)[:, classes].numpy() / settings.get("temperature", 1.0)
        exponentials = np.exp(logits)
        chosen = [classes.index(label) for label in labels.tolist()]
        return np.asarray(-np.log(exponentials[range(N), chosen] / exponentials.sum(axis=1)))

    probes = rademacher_probes(np.arange(N), SHAPE, 4, settings.get("seed", 0))
    sizes = []
    for k in (0, 2):
        v, u = (h * torch.from_numpy(probes[:, i]).double() for i in (k, k + 1))
        corners = losses(images + v + u) - losses(images + v - u)
        corners += losses(images - v - u) - losses(images - v + u)
        sizes.append(np.abs(corners) / (4 * h))
    np.testing.assert_allclose(found.curvature, np.mean(sizes, axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.curvature_sq, np.mean(np.square(sizes), axis=0), rtol=1e-6)
    np.testing.assert_allclose(found.loss, losses(images), rtol=1e-9)
