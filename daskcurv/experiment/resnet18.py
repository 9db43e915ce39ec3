"""The network that the checkpoints belong to.

A ResNet-18 [1]_ for 32 × 32 images: a 3 × 3 stride-1 stem without max-pooling, and a bias on every
convolution. Parameter names are those of the training run's files, which therefore load with
``strict=True``. The same family at other widths, numbers of outputs, or without normalisation is
recognised from the shapes in a checkpoint.

References
----------
.. [1] He, Zhang, Ren & Sun, "Deep residual learning for image recognition", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

STAGES = 4
BLOCKS_PER_STAGE = 2


@dataclass(frozen=True)
class ModelSpec:
    """What has to be known to build the network; part of a store's identity.

    Attributes
    ----------
    num_classes : int
        Outputs.
    width : int
        Channels of the first stage; every later stage doubles them.
    norm : str
        ``"batch"`` for batch normalisation, ``"identity"`` for none.
    name : str
        The architecture; ``"resnet18"`` is the only one.
    """

    num_classes: int = 100
    width: int = 64
    norm: str = "batch"
    name: str = "resnet18"

    @classmethod
    def infer(cls, state_dict: Mapping[str, Tensor]) -> ModelSpec:
        """Return the spec that a checkpoint's shapes suggest.

        Where a shape is missing the default stands: loading then reports what does not fit.
        """
        standard = cls()
        stem, head = state_dict.get("conv1.weight"), state_dict.get("fc.weight")
        return cls(
            num_classes=_rows(head, standard.num_classes),
            width=_rows(stem, standard.width),
            norm="batch" if "bn1.weight" in state_dict or stem is None else "identity",
        )

    def build(self) -> ResNet18:
        """Return the network with freshly initialised weights."""
        return ResNet18(self.num_classes, self.width, self.norm)

    def to_dict(self) -> dict[str, Any]:
        """Return the spec as a JSON-able dictionary."""
        return asdict(self)


class BasicBlock(nn.Module):
    """Two 3 × 3 convolutions around a shortcut."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: str):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.bn1 = _norm(norm, channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn2 = _norm(norm, channels)
        self.relu = nn.ReLU()
        self.downsample = (
            nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride=stride), _norm(norm, channels))
            if stride != 1 or in_channels != channels
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(N, in_channels, H, W)`` to ``(N, channels, H / stride, W / stride)``."""
        shortcut = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu(out + shortcut)
        return result


class ResNet18(nn.Module):
    """ResNet-18 for small images; see the module docstring.

    Parameters
    ----------
    num_classes : int
    width : int
    norm : str
        ``"batch"`` or ``"identity"``.
    """

    def __init__(self, num_classes: int = 100, width: int = 64, norm: str = "batch"):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.bn1 = _norm(norm, width)
        self.relu = nn.ReLU()
        channels = [width] + [width << stage for stage in range(STAGES)]
        for stage in range(STAGES):
            first = BasicBlock(channels[stage], channels[stage + 1], 1 if stage == 0 else 2, norm)
            rest = [
                BasicBlock(channels[stage + 1], channels[stage + 1], 1, norm)
                for _ in range(BLOCKS_PER_STAGE - 1)
            ]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *rest))
        self.output_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(channels[-1], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images ``(N, 3, H, W)`` to logits ``(N, num_classes)``."""
        x = self.relu(self.bn1(self.conv1(images)))
        for stage in range(STAGES):
            x = getattr(self, f"layer{stage + 1}")(x)
        logits: Tensor = self.fc(torch.flatten(self.output_pool(x), 1))
        return logits


def _rows(weight: Tensor | None, default: int) -> int:
    """Return a weight's first dimension, or the default if there is none to speak of."""
    return weight.shape[0] if weight is not None and weight.ndim and weight.numel() else default


def _norm(norm: str, channels: int) -> nn.Module:
    layers: dict[str, type[nn.Module]] = {"batch": nn.BatchNorm2d, "identity": nn.Identity}
    return layers[norm](channels)
