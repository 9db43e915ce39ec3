"""How well curvature and loss find the wrong labels that people gave to real images.

A narrow ResNet-18 is trained on the labels of one annotation of a data set whose true labels are
known, its weights are kept with ``daskcurv.keep``, and ``daskcurv.compute`` scores every sample at
every epoch. Prints the area under the ROC curve of each score and writes JSON::

    python benchmarks/label_noise.py DATA.npz --labels worse_label --out results.json

The file has ``train_images`` (N, 32, 32, 3) and ``train_labels``, ``test_images`` and
``test_labels``, and each annotation as an array of N labels: for example those of CIFAR-10N (Wei et
al., "Learning with noisy labels revisited", ICLR 2022). Nothing was tuned on the figures.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xarray as xr
from _curvature_report import environment
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

import daskcurv
from daskcurv import analysis
from daskcurv.config import EstimatorConfig
from daskcurv.experiment.curriculum import Curriculum
from daskcurv.experiment.data import Arrays
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.experiment.schedules import Steps
from daskcurv.recording import NAME

SEED = 0
BATCH = 64
LEARNING_RATE = 0.05


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="npz file")
    parser.add_argument("--labels", required=True, help="name of the annotation in it")
    parser.add_argument("--width", type=int, default=16, help="channels of the first stage")
    parser.add_argument("--epochs", type=int, default=15, help="length of the schedule")
    parser.add_argument("--stop", type=int, help="stop after so many of the epochs")
    parser.add_argument("--samples", type=int, help="score so many, at random (default: all)")
    parser.add_argument("--every", type=int, default=1, help="score every so many epochs")
    parser.add_argument("--n_probes", type=int, default=4)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument(
        "--directory", type=Path, help="of weights and store, to go on with (default: temporary)"
    )
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        result = measure(args, args.directory or Path(temporary))
    print(f"{args.labels}: {result['noise_rate']:.1%} of {result['samples']} labels are wrong")
    for name, value in result["accuracy"].items():
        print(f"accuracy on {name.replace('_', ' ')}: {value:.1%}")
    for name, row in result["auroc"].items():
        low, high = row["interval"]
        print(f"  {name:<24} {row['auroc']:.3f} ({low:.3f} to {high:.3f})")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def measure(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """Train, score, and compare the scores with the truth."""
    with np.load(args.data) as archive:
        if args.labels not in archive:
            raise SystemExit(f"{args.data} has no {args.labels}; it has {', '.join(archive)}")
        arrays = {name: archive[name] for name in archive}
    given, true = (arrays[name].astype(np.int64) for name in (args.labels, "train_labels"))
    images = arrays["train_images"].transpose(0, 3, 1, 2)
    mean, std = (
        tuple((values / 255).tolist()) for values in (images.mean((0, 2, 3)), images.std((0, 2, 3)))
    )
    dataset = Arrays(images, given, mean, std)
    classes = int(max(given.max(), true.max())) + 1
    spec = ModelSpec(num_classes=classes, width=args.width)
    last = args.stop or args.epochs
    model, checkpoints = train(spec, dataset, args.epochs, last, directory / "weights")
    if args.samples:
        some = np.random.default_rng(SEED).permutation(len(given))[: args.samples]
        given, true = given[some], true[some]
        dataset = Arrays(images[some], given, mean, std)
    results = daskcurv.compute(
        daskcurv.Experiment(
            dataset=dataset,
            checkpoints={n: checkpoints[n] for n in range(last, 0, -args.every)},
            network=spec,
            curriculum=Curriculum(tuple(range(classes)), Steps((0,), (classes,))),
            # As accurate as difference propagation, and faster on a CPU for a network this narrow.
            estimator=EstimatorConfig(
                method="finite-difference", precision="float32", n_probes=args.n_probes
            ),
        ),
        directory / "curvature.zarr",
        device="cpu",
        workers=args.workers,
        block_size=500,
    ).load()
    wrong = given != true
    predicted = results.prediction.isel(epoch=-1).values
    unseen = dataset.normalise(arrays["test_images"].transpose(0, 3, 1, 2))
    return {
        "labels": args.labels,
        "samples": len(given),
        "wrong": int(wrong.sum()),
        "noise_rate": float(wrong.mean()),
        "network": spec.to_dict(),
        "epochs": args.epochs,
        "epochs_trained": last,
        "trained_on": len(images),
        "epochs_scored": results.epoch.values.tolist(),
        "n_probes": args.n_probes,
        "method": results.method.values[-1],
        "accuracy": {
            "the_labels_trained_on": float((predicted == given).mean()),
            "those_that_are_wrong": float((predicted == given)[wrong].mean()),
            "the_true_labels": float((predicted == true).mean()),
            "the_test_set": accuracy(model, unseen, arrays["test_labels"]),
        },
        "auroc": {name: row(score, wrong) for name, score in scores(results).items()},
        "worker_seconds": round(float(results.compute_seconds.sum())),
        "environment": environment(torch.device("cpu")),
    }


def train(
    spec: ModelSpec, dataset: Arrays, epochs: int, last: int, directory: Path
) -> tuple[nn.Module, dict[int, Path]]:
    """Train without augmentation; return the network and the file of each epoch's weights.

    If all files are there already, the last one is loaded.
    """
    torch.manual_seed(SEED)
    model = spec.build()
    checkpoints = {n: directory / NAME.format(epoch=n) for n in range(1, last + 1)}
    if all(path.exists() for path in checkpoints.values()):
        model.load_state_dict(load_file(checkpoints[last]))
        return model.eval(), checkpoints
    optimiser = torch.optim.SGD(
        model.parameters(), LEARNING_RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
    )
    images, labels = dataset.normalise(dataset.images), torch.from_numpy(dataset.labels)
    steps = epochs * math.ceil(len(images) / BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for epoch in tqdm(checkpoints, desc="training", unit=" epochs", disable=None):
        model.train()
        for batch in torch.randperm(len(images)).split(BATCH):
            optimiser.zero_grad()
            F.cross_entropy(model(images[batch]), labels[batch]).backward()
            optimiser.step()
            schedule.step()
        daskcurv.keep(model, directory, epoch)
    return model.eval(), checkpoints


def accuracy(model: nn.Module, images: Tensor, labels: NDArray[np.integer[Any]]) -> float:
    """Return the part of the images that a network in evaluation mode classifies as labelled."""
    with torch.no_grad():
        predicted = torch.cat([model(batch).argmax(dim=1) for batch in images.split(BATCH)])
    return float((predicted.numpy() == labels).mean())


def scores(results: xr.Dataset) -> dict[str, NDArray[np.float64]]:
    """Return what is to be large for samples with a wrong label."""
    return {
        "cumulative curvature": analysis.cumulative(results, "curvature").values,
        "cumulative loss (CSL)": analysis.cumulative(results, "loss").values,
        "final loss": results.loss.isel(epoch=-1).values.astype(np.float64),
    }


def row(score: NDArray[np.float64], wrong: NDArray[np.bool_]) -> dict[str, Any]:
    """Return the area under the ROC curve with its interval, checked by counting all pairs."""
    area = analysis.auroc(score, wrong)
    above, below = score[wrong][:, None], score[~wrong]
    counted = (above > below).mean() + (above == below).mean() / 2
    assert abs(area - counted) < 1e-9, (area, counted)
    return {"auroc": area, "interval": analysis.auroc_interval(score, wrong), "n": len(score)}


if __name__ == "__main__":
    main()
