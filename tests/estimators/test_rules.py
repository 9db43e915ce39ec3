"""Products, softmax, normalisation, attention, reshuffling: what the definitions give.

Networks are put together at random from blocks that use every rule, several uses of a value
included, and compared in float64 with direct differences that share nothing with the rules.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import spearmanr
from torch import Tensor, nn
from torchvision.models import ConvNeXt, VisionTransformer
from torchvision.models.convnext import CNBlockConfig
from torchvision.models.densenet import DenseNet
from torchvision.models.shufflenetv2 import ShuffleNetV2

from daskcurv import score_samples
from tests.support.oracles import assert_scores, referee

C, SIZE = 4, 6

Forward = Callable[[nn.Module, Tensor], Tensor]


class Block(nn.Module):
    """A block that keeps (N, C, H, W), or (N, L, C) where it says so."""

    def __init__(self, forward: str):
        super().__init__()
        self.do = forward
        self.mix = nn.Conv2d(C, C, 3, padding=1)
        self.wide = nn.Conv2d(C, 2 * C, 1)
        self.edged = nn.Conv2d(C, C, 3, padding="same", padding_mode="reflect")
        self.project = nn.Linear(C, 3 * C)
        self.attend = nn.MultiheadAttention(C, 2, batch_first=True)
        self.norm = nn.LayerNorm(C)
        self.groups, self.each = nn.GroupNorm(2, C), nn.InstanceNorm2d(C, affine=True)
        self.local = nn.LocalResponseNorm(3)
        self.slopes = nn.PReLU(C)
        self.token = nn.Parameter(torch.empty(1, 1, C))
        self.register_buffer("order", torch.tensor([2, 0, 3, 1]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, self.do)(x)
        return result

    def gate(self, x: Tensor) -> Any:
        left, right = self.wide(x).chunk(2, dim=1)
        return x + left * torch.sigmoid(right)

    def squeeze(self, x: Tensor) -> Any:
        return x * torch.sigmoid(self.mix(x).mean((2, 3), keepdim=True))

    def square(self, x: Tensor) -> Any:
        y = torch.tanh(x)
        return y * y - y / (y * y + 1.5)

    def join(self, x: Tensor) -> Any:
        y = self.mix(x)
        return F.relu(torch.cat([y[:, :1], x[:, 1:3], y[:, self.order][:, 3:]], dim=1))

    def shuffle(self, x: Tensor) -> Any:
        y = x.view(x.size(0), 2, C // 2, SIZE, SIZE).transpose(1, 2).reshape(-1, C, SIZE, SIZE)
        return F.pad(y[..., 1:-1], (1, 1)) + torch.roll(x, 1, 3) + y.flip(2)

    def resize(self, x: Tensor) -> Any:
        small = F.avg_pool2d(self.edged(x), 2)
        return F.interpolate(small, scale_factor=2, mode="bilinear") + torch.relu(x)

    def slope(self, x: Tensor) -> Any:
        return self.slopes(self.mix(x)) + F.leaky_relu(x, 0.2)

    def norms(self, x: Tensor) -> Any:
        y = self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return self.groups(x) + self.each(self.mix(x)) * y + self.local(x)

    def peak(self, x: Tensor) -> Any:
        return x - x.amax((2, 3), keepdim=True) + x.amax(1, keepdim=True)

    def several(self, x: Tensor) -> Any:
        y = torch.relu(self.mix(x))
        return y + y * x - torch.stack([x, y], dim=2).sum(2)

    def windows(self, x: Tensor) -> Any:
        y = x.unflatten(3, (2, -1)).permute(0, 3, 1, 2, 4).reshape(-1, C, SIZE, 2)
        y = F.softmax(y, dim=2) * y
        return y.reshape(x.size(0), -1, C, SIZE, 2).permute(0, 2, 3, 1, 4).flatten(3)

    def heads(self, x: Tensor) -> Any:
        y = x.flatten(2).transpose(1, 2)
        query, key, value = self.project(self.norm(y)).chunk(3, dim=-1)
        weights = torch.softmax(query @ key.transpose(1, 2) / math.sqrt(C), dim=-1)
        return x + (weights @ value).transpose(1, 2).reshape(x.size(0), C, SIZE, SIZE)

    def fused(self, x: Tensor) -> Any:
        y = self.project(x.flatten(2).mT)
        parts = y.reshape(x.size(0), SIZE * SIZE, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
        return x + F.scaled_dot_product_attention(
            parts[0], parts[1], parts[2], is_causal=True
        ).transpose(1, 2).reshape(x.size(0), -1, C).mT.reshape(x.size(0), C, SIZE, SIZE)

    def tokens(self, x: Tensor) -> Any:
        y = x.flatten(2).transpose(1, 2)
        y = torch.cat([self.token.expand(x.size(0), -1, -1), y], dim=1)
        z, _ = self.attend(y, y, y, need_weights=False)
        return (y + z)[:, 1:].transpose(1, 2).reshape(x.size(0), C, SIZE, SIZE)


BLOCKS = [
    "gate", "squeeze", "square", "join", "shuffle", "resize", "slope", "norms", "peak", "several",
    "windows", "heads", "fused", "tokens",
]  # fmt: skip


def drawn(network: nn.Module, seed: int, scale: float = 0.5) -> nn.Module:
    """Return a network whose weights, biases and statistics are all random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for parameter in network.parameters():
            nn.init.normal_(parameter, std=scale)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d) and module.running_var is not None:
                module.running_var.uniform_(0.5, 2)
    return network.eval()


def build(blocks: list[str], seed: int) -> nn.Module:
    body = [Block(name) for name in blocks]
    network = nn.Sequential(
        nn.Conv2d(3, C, 3, padding=1), *body, nn.AdaptiveMaxPool2d(2), nn.Flatten(),
        nn.Linear(4 * C, 5),
    )  # fmt: skip
    return drawn(network, seed).double()


def samples(count: int = 2, size: int = SIZE) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(count, 3, size, size, generator=generator, dtype=torch.float64)
    return images, torch.arange(count) % 5


def assert_as_defined(network: nn.Module, images: Tensor, labels: Tensor, **settings: Any) -> None:
    found = score_samples(network, images, labels, method="difference-propagation", **settings)
    expected = referee(network, images, labels, **settings)
    assert_scores(found, expected, images[0].numel(), h=settings["h"])


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_gives_what_the_definitions_say(block):
    for h in (1e-3, 0.3):
        assert_as_defined(build([block], seed=1), *samples(), h=h, n_probes=2)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    blocks=st.lists(st.sampled_from(BLOCKS), min_size=2, max_size=4),
    seed=st.integers(0, 2**31),
    h=st.sampled_from([1e-4, 1e-3, 1e-2]),
)
def test_random_networks_of_all_blocks_give_what_the_definitions_say(blocks, seed, h):
    assert_as_defined(build(blocks, seed), *samples(), h=h, n_probes=2)


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ViT": lambda: VisionTransformer(32, 8, 2, 2, 16, 32, num_classes=5),
    "ConvNeXt": lambda: ConvNeXt([CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)], 0.1,
                                 num_classes=5),
    "DenseNet": lambda: DenseNet(4, (2, 2), 8, num_classes=5),
    "ShuffleNet": lambda: ShuffleNetV2([1, 1, 1], [8, 8, 16, 16, 16], num_classes=5),
}  # fmt: skip


@pytest.mark.parametrize("name", NETWORKS)
def test_published_architectures_are_covered(name):
    network = drawn(NETWORKS[name](), seed=3, scale=0.1).double()
    assert_as_defined(network, *samples(size=32), h=1e-3, n_probes=1)


@pytest.mark.parametrize("name", ["ViT", "ConvNeXt"])
def test_in_bfloat16_the_error_is_far_below_that_of_sampling(name):
    network = drawn(NETWORKS[name](), seed=3, scale=0.3).double()
    images, labels = samples(10, size=32)
    expected = referee(network, images, labels, n_probes=2)["curvature"]
    found = score_samples(
        network.float(), images.float(), labels, n_probes=2, method="difference-propagation",
        precision="bfloat16",
    ).curvature  # fmt: skip
    errors = np.abs(found / expected - 1)
    assert np.median(errors) < 5e-3, errors
    assert spearmanr(found, expected).statistic > 0.99
