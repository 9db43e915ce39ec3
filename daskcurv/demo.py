"""The whole job on real images, offline, in minutes.

scikit-learn's bundled handwritten digits become a CIFAR-100-format data set in which a known few
percent of the labels are wrong. A narrow ResNet-18 is trained on it class by class, keeping the
weights of every epoch, and a normal launch computes the curvature of every sample at every epoch.
Whether the wrong labels can be told from the right ones by what a network had to memorize is then
a question with a known answer.
"""

from __future__ import annotations

import logging
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from numpy.typing import NDArray
from tqdm import tqdm

from daskcurv import analysis
from daskcurv.classes import TRAIN, Schedule, class_order_of, held_out_split
from daskcurv.clusters import ClusterOptions
from daskcurv.dataset import DIRECTORY, normalise, read_cifar
from daskcurv.errors import ConfigError, StoreWriteError
from daskcurv.logs import log_to_file
from daskcurv.models import ModelSpec
from daskcurv.pipeline.launch import launch
from daskcurv.pipeline.options import LaunchOptions
from daskcurv.storage import open_results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

log = logging.getLogger(__name__)

SEED = 0
FLIPPED_FRACTION = 0.04
SCHEDULE = Schedule(initial_classes=5, class_increment=5, class_frequency=6)
LAST_EPOCH = 12
VALIDATION_PER_CLASS = 20
BLOCK_SIZE = 300
SPEC = ModelSpec(num_classes=10, width=8)
TRAIN_BATCH = 16
LEARNING_RATE = 0.05
FLIPPED = "flipped_samples.npy"
PICTURE = "most_curved.png"
SHOWN = 10


def run_demo(directory: Path, workers: int | None = None) -> int:
    """Make the inputs in `directory` (once), launch, and say what was found.

    Parameters
    ----------
    directory : Path
        Created if need be; run again on the same directory, the demo goes on where it was.
    workers : int, optional

    Returns
    -------
    int
        Exit code.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreWriteError(
            f"cannot create {directory} for the demo: {error.strerror}; name another directory"
        ) from error
    log_to_file(directory / "log")
    make_dataset(directory)
    train(directory)
    options = demo_options(directory, workers)
    if code := launch(options).exit_code:
        return code
    report(directory, options)
    return 0


def demo_options(directory: Path, workers: int | None = None) -> LaunchOptions:
    """Return the options of the demo's launch."""
    return LaunchOptions(
        epochs="all",
        data_path=directory / DIRECTORY,
        model_dir=directory / "model_parameters",
        schedule=SCHEDULE,
        validation_per_class=VALIDATION_PER_CLASS,
        store=directory / "curvature.zarr",
        save_base_dir=directory / "per_image_curvature_full",
        block_size=BLOCK_SIZE,
        cluster=ClusterOptions(workers=workers),
    )


def make_dataset(directory: Path) -> None:
    """Write the digits as a CIFAR-100-format data set, some labels flipped, unless it is there."""
    target = directory / DIRECTORY
    if target.exists():
        return
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ConfigError(
            "the demo needs scikit-learn and matplotlib; install them with "
            "pip install 'daskcurv[demo]'"
        ) from error
    digits = load_digits()
    small = torch.from_numpy(digits.images / 16).to(torch.float32)[:, None]
    large = F.interpolate(small, size=(32, 32), mode="bilinear", align_corners=False)
    pixels = (large.clamp(0, 1) * 255).round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels, flipped = flip_labels(digits.target.astype(np.int64))

    building = directory / f"{DIRECTORY}.partial"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    train_file = {
        "data": pixels.reshape(len(labels), -1).numpy(),
        "fine_labels": labels.tolist(),
        "coarse_labels": (labels // 5).tolist(),
    }
    names = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for name, content in (("train", train_file), ("meta", {"fine_label_names": names})):
        (building / name).write_bytes(pickle.dumps(content))
    np.save(directory / FLIPPED, flipped)
    building.rename(target)
    log.info("%s: %d digits, %d labels flipped", target, len(labels), len(flipped))


def flip_labels(labels: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Give a random few percent of the samples another label.

    Returns
    -------
    labels : ndarray of int64
    flipped : ndarray of int64
        Indices of the samples whose label is now wrong, ascending.
    """
    generator = np.random.default_rng(SEED)
    count = round(FLIPPED_FRACTION * len(labels))
    flipped = np.sort(generator.choice(len(labels), count, replace=False))
    wrong = labels.copy()
    wrong[flipped] = (labels[flipped] + generator.integers(1, 10, count)) % 10
    return wrong, flipped


def train(directory: Path) -> None:
    """Train class-incrementally, keeping every epoch's weights, unless they are there.

    As in the full-size run: plain SGD with momentum, cross-entropy over the active outputs, a
    learning rate that starts again with every task, and each epoch's file written before the next
    classes are added.
    """
    target = directory / "model_parameters"
    if target.exists():
        return
    dataset = read_cifar(directory / DIRECTORY)
    order = class_order_of(0, SPEC.num_classes)
    (directory / "class_order").mkdir(exist_ok=True)
    np.save(directory / "class_order" / "index-0.npy", order)
    images, labels = normalise(dataset.images), torch.from_numpy(dataset.labels)
    trained_on = torch.from_numpy(held_out_split(dataset.labels, VALIDATION_PER_CLASS) == TRAIN)

    building = directory / "model_parameters.partial"
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        model = SPEC.build()
    torch.save(model.state_dict(), building / "index-0_epoch-0.pt")
    optimiser = torch.optim.SGD(
        model.parameters(), lr=LEARNING_RATE, momentum=0.9, weight_decay=5e-4
    )
    while_training = replace(SCHEDULE, class_partition="trained")
    for epoch in tqdm(range(1, LAST_EPOCH + 1), desc="training", unit=" epochs", disable=None):
        active = torch.from_numpy(order[: while_training.num_active(epoch, SPEC.num_classes)])
        pool = torch.nonzero(trained_on & torch.isin(labels, active))[:, 0]
        position = (epoch - 1) % SCHEDULE.class_frequency
        for group in optimiser.param_groups:
            group["lr"] = LEARNING_RATE * 0.3**position
        _train_epoch(model, optimiser, images, labels, active, pool, generator)
        torch.save(model.state_dict(), building / f"index-0_epoch-{epoch}.pt")
    building.rename(target)
    log.info("%s: weights of %d epochs", target, LAST_EPOCH + 1)


def _train_epoch(
    model: torch.nn.Module,
    optimiser: torch.optim.Optimizer,
    images: torch.Tensor,
    labels: torch.Tensor,
    active: torch.Tensor,
    pool: torch.Tensor,
    generator: torch.Generator,
) -> None:
    model.train()
    shuffled = pool[torch.randperm(len(pool), generator=generator)]
    for batch in shuffled.split(TRAIN_BATCH):
        targets = (labels[batch][:, None] == active).to(torch.int64).argmax(dim=1)
        loss = F.cross_entropy(model(images[batch])[:, active], targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def report(directory: Path, options: LaunchOptions) -> None:
    """Print what the results say about the flipped labels, and where everything is."""
    dataset = open_results(options.store)
    flipped = np.load(directory / FLIPPED)
    wrong = np.isin(dataset.sample.values, flipped)
    curvature = analysis.mean_over_active_epochs(dataset, "curvature")
    scores = {
        "cumulative curvature": analysis.cumulative(dataset, "curvature"),
        "mean curvature": curvature,
        "median curvature": analysis.median_over_active_epochs(dataset, "curvature"),
        "cumulative loss (CSL)": analysis.cumulative(dataset, "loss"),
        "final loss": dataset.loss.isel(epoch=-1),
    }
    print(f"{wrong.sum()} of {len(wrong)} labels were flipped. Over the epochs whose weights had")
    print("been trained on a sample's class, they are told from the others with these AUROCs (and")
    print("their 95 % bootstrap intervals):")
    for name, score in scores.items():
        area = analysis.auroc(score.values, wrong)
        low, high = analysis.auroc_interval(score.values, wrong)
        print(f"  {name:<22} {area:.3f} ({low:.3f} to {high:.3f})")
    top = np.argsort(-curvature.values)[:SHOWN]
    print(f"The {SHOWN} most curved samples (mean, * flipped):")
    for sample in top:
        name = f"sample {sample:>5}{'*' if wrong[sample] else ' '}"
        label, value = dataset.label.values[sample], curvature.values[sample]
        print(f"  {name} label {label}  mean curvature {value:.3g}")
    figure = _picture(directory, curvature, top, wrong)
    figure.savefig(directory / PICTURE, dpi=150)
    print(f"results store  {options.store}")
    print(f"npy tree       {options.save_base_dir}")
    print(f"picture        {directory / PICTURE}")


def _picture(
    directory: Path, curvature: xr.DataArray, samples: NDArray[np.int64], wrong: NDArray[np.bool_]
) -> Figure:
    from matplotlib.figure import Figure

    images = read_cifar(directory / DIRECTORY).images
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    figure.suptitle("Digits with the highest mean curvature over their active epochs")
    for axes, sample in zip(figure.subplots(2, SHOWN // 2).flat, samples, strict=True):
        axes.imshow(images[sample].transpose(1, 2, 0))
        axes.set_axis_off()
        kind = "flipped label" if wrong[sample] else "label"
        axes.set_title(
            f"sample {sample}\n{kind} {curvature.label.values[sample]}\n"
            f"{curvature.values[sample]:.3g}",
            fontsize=9,
        )
    return figure
