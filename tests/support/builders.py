"""Small inputs: data sets in CIFAR-100's format, checkpoints of the training run's kind."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import torch

from daskcurv.experiment.data.cifar import Cifar
from daskcurv.experiment.resnet18 import ModelSpec

TINY = ModelSpec(num_classes=10, width=4)


def normalise(images: np.ndarray) -> torch.Tensor:
    """Normalise CIFAR images (N, 3, 32, 32), as for the network."""
    return Cifar(images, np.zeros(len(images), np.int64)).normalise(images)


def write_cifar(
    directory: Path, num_samples: int = 60, num_classes: int = 10, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Write ``train`` and ``meta``; return images (N, 3, 32, 32) uint8 and labels (N,) int64.

    The images have structure (a different low-frequency pattern for each class, plus noise), so
    that a network can be trained on them.
    """
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, num_classes, num_samples)
    patterns = generator.normal(size=(num_classes, 3, 4, 4)).repeat(8, axis=2).repeat(8, axis=3)
    noise = generator.normal(size=(num_samples, 3, 32, 32))
    images = np.clip(128 + 40 * patterns[labels] + 25 * noise, 0, 255).astype(np.uint8)
    directory.mkdir(parents=True, exist_ok=True)
    content = {
        "data": images.reshape(num_samples, -1),
        "fine_labels": labels.tolist(),
        "coarse_labels": (labels // 5).tolist(),
    }
    names = [f"class {label}" for label in range(num_classes)]
    (directory / "train").write_bytes(pickle.dumps(content))
    (directory / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    return images, labels.astype(np.int64)


def make_model(spec: ModelSpec = TINY, seed: int = 0) -> torch.nn.Module:
    """Return a network in which no weight, bias or statistic is an initial one.

    Initially, and after brief training, all biases of convolutions are 0 and those of norms too.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = spec.build()
        for module in model.modules():
            if isinstance(module, torch.nn.Conv2d):
                assert module.bias is not None
                torch.nn.init.normal_(module.bias, 0, 0.2)
            if isinstance(module, torch.nn.BatchNorm2d):
                assert module.running_mean is not None
                assert module.running_var is not None
                module.running_mean.normal_(0, 0.2)
                module.running_var.uniform_(0.5, 1.5)
                torch.nn.init.uniform_(module.weight, 0.5, 1.5)
                torch.nn.init.normal_(module.bias, 0, 0.2)
    return model.eval()


def write_checkpoints(
    directory: Path, epochs: list[int], spec: ModelSpec = TINY, experiment_index: int = 0
) -> dict[int, Path]:
    """Write a bare state dict for each epoch, as the training run names them."""
    directory.mkdir(parents=True, exist_ok=True)
    paths = {}
    for epoch in epochs:
        paths[epoch] = directory / f"index-{experiment_index}_epoch-{epoch}.pt"
        torch.save(make_model(spec, seed=1000 + epoch).state_dict(), paths[epoch])
    return paths


def write_command(path: Path, body: str) -> None:
    """Write a program for the shell, such as one that poses as one of SLURM's."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
