"""A complete run on real images, offline, in a few minutes.

The handwritten digits that come with scikit-learn are written as a CIFAR-100-format data set in
which 4 % of the labels are wrong. A narrow ResNet-18 is trained on it class-incrementally, the
weights of every epoch are kept, and a normal launch computes the curvature of every sample at every
epoch. Because the wrong labels are known, the results can be checked against them.
"""

from __future__ import annotations

import io
import logging
import pickle
import shutil
from collections.abc import Sequence
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from numpy.typing import NDArray

from daskcurv import analysis, training
from daskcurv.clusters import ClusterOptions
from daskcurv.errors import ConfigError, StoreWriteError
from daskcurv.experiment.curriculum import Schedule
from daskcurv.experiment.data import read_dataset
from daskcurv.experiment.data.cifar import DIRECTORY
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.logs import log_to_file
from daskcurv.runs.launch import launch
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage.read import open_results
from daskcurv.training import TrainingRun

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
FLIPPED = "flipped_samples.npy"
PICTURE = "most_curved.png"
SHOWN = 10


def run_demo(directory: Path, workers: int | None = None) -> int:
    """Create the inputs in `directory` (once), launch, and print the findings.

    Parameters
    ----------
    directory : Path
        Created if it does not exist. A demo that was interrupted is continued.
    workers : int, optional

    Returns
    -------
    int
        Exit code.
    """
    check_packages(directory)
    begin(directory, of_another="mnist.npz")
    make_dataset(directory)
    train(directory)
    return finish(directory, demo_options(directory, workers))


def begin(directory: Path, of_another: str) -> None:
    """Create a demo's directory and its log.

    Parameters
    ----------
    directory : Path
    of_another : str
        Name of the data set of the other demo, which must not be there.
    """
    if (directory / of_another).exists():
        raise ConfigError(
            f"{directory} holds another demo ({of_another}); choose another directory, or another "
            "--demo_run"
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreWriteError(
            f"cannot create {directory} for the demo: {error.strerror}; choose another directory"
        ) from error
    log_to_file(directory / "log")


def finish(directory: Path, options: LaunchOptions) -> int:
    """Launch, and print the findings; return the exit code."""
    if code := launch(options).exit_code:
        return code
    with redirect_stdout(io.StringIO()) as findings:
        print_findings(directory, options)
    print(findings.getvalue(), end="")
    log.debug("%s", findings.getvalue())
    return 0


def check_packages(directory: Path) -> None:
    """Raise `ConfigError` if a package that the demo needs cannot be imported."""
    needed = ["matplotlib.figure"]
    if not (directory / DIRECTORY).exists():
        needed.append("sklearn.datasets")
    require("scikit-learn and matplotlib", needed)


def require(packages: str, modules: Sequence[str]) -> None:
    """Raise `ConfigError` naming a demo's packages if one of their modules cannot be imported."""
    for name in modules:
        try:
            import_module(name)
        except ImportError as error:
            raise ConfigError(
                f"the demo needs {packages}, and {name} cannot be imported "
                f"({error}); install them with pip install 'daskcurv[demo]'"
            ) from error


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
    """Write the digits as a CIFAR-100-format data set with flipped labels, if it does not exist."""
    target = directory / DIRECTORY
    if target.exists():
        return
    from sklearn.datasets import load_digits

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
    """Train on the data set unless this is already done; continue an interrupted training."""
    training.train(directory, TrainingRun(SPEC, SCHEDULE, LAST_EPOCH, VALIDATION_PER_CLASS))


def print_findings(directory: Path, options: LaunchOptions) -> None:
    """Print how well the results find the flipped labels, and the paths of all outputs."""
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
    print(f"{wrong.sum()} of {len(wrong)} labels were flipped. Only epochs whose weights had been")
    print("trained on a sample's class are counted.")
    cohort = dataset.first_epoch_active.values
    if len(np.unique(cohort)) > 1:
        print(
            "AUROC for separating flipped from clean labels of the same cohort, classes that were"
        )
        print("added together (95 % bootstrap interval):")
    else:
        print("AUROC for separating flipped from clean labels (95 % bootstrap interval):")
    for name, score in scores.items():
        area = analysis.auroc(score.values, wrong, cohort)
        low, high = analysis.auroc_interval(score.values, wrong, cohort)
        print(f"  {name:<22} {area:.3f} ({low:.3f} to {high:.3f})")
    top = np.argsort(-curvature.values)[:SHOWN]
    print(f"The {SHOWN} most curved samples (mean, * flipped):")
    for sample in top:
        name = f"sample {sample:>5}{'*' if wrong[sample] else ' '}"
        label, value = dataset.label.values[sample], curvature.values[sample]
        print(f"  {name} label {label}  mean curvature {value:.3g}")
    images = read_dataset(options.data_path, mean=0, std=1).images
    figure = _picture(images[top], curvature, top, wrong)
    figure.savefig(directory / PICTURE, dpi=150)
    print(f"results store  {options.store}")
    print(f"npy tree       {options.save_base_dir}")
    print(f"picture        {directory / PICTURE}")


def _picture(
    images: NDArray[np.uint8],
    curvature: xr.DataArray,
    samples: NDArray[np.int64],
    wrong: NDArray[np.bool_],
) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    figure.suptitle("Digits with the highest mean curvature over their active epochs")
    places = figure.subplots(2, SHOWN // 2).flat
    for axes, image, sample in zip(places, images, samples, strict=True):
        axes.imshow(image.transpose(1, 2, 0), cmap="gray")
        axes.set_axis_off()
        kind = "flipped label" if wrong[sample] else "label"
        axes.set_title(
            f"sample {sample}\n{kind} {curvature.label.values[sample]}\n"
            f"{curvature.values[sample]:.3g}",
            fontsize=9,
        )
    return figure
