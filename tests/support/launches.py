"""What launches leave behind, and launches caught in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

import daskcurv
from daskcurv.config import EstimatorConfig
from daskcurv.experiment.curriculum import Curriculum, Schedule, class_order_of
from daskcurv.experiment.data import Dataset
from daskcurv.experiment.data.prepared import prepare
from daskcurv.experiment.experiment import Experiment
from daskcurv.runs.block import RunContext
from daskcurv.storage import ResultsStore
from tests.support import slow_network
from tests.support.builders import TINY
from tests.support.crashes import finished_blocks
from tests.support.project import Project

MEASURES = ("curvature", "curvature_sq", "directional_eig", "loss", "grad_norm", "prediction")


def results(store: Path) -> xr.Dataset:
    return daskcurv.open_results(store, incomplete="raise").load()


def assert_same_results(left: xr.Dataset, right: xr.Dataset) -> None:
    for name in (*MEASURES, "status", "epoch", "label", "split", "checkpoint_sha256"):
        np.testing.assert_array_equal(left[name].values, right[name].values, err_msg=name)


def assert_ok(run: subprocess.CompletedProcess[str]) -> None:
    assert run.returncode == 0, run.stdout


def make_store(path: Path, cifar, block_size: int) -> ResultsStore:
    count = len(cifar)
    return ResultsStore.create(
        path,
        identity={"made": "for a test"},
        samples={
            "sample": np.arange(count),
            "label": cifar.labels,
            "split": np.zeros(count),
            "class_position": np.zeros(count),
            "first_epoch_active": np.zeros(count),
        },
        epochs={
            "epoch": [4],
            "task": [2],
            "num_active_classes": [10],
            "checkpoint": ["c.pt"],
            "checkpoint_sha256": [""],
            "checkpoint_size": [0],
            "checkpoint_mtime_ns": [0],
        },
        block_size=block_size,
    )


# Blocks of a few tenths of a second each: long enough to be caught in the middle.
SLOW = (
    "--block_size", "10", "--workers", "2",
    "--method", "finite-difference", "--model", f"{slow_network.__file__}:build",
)  # fmt: skip
BLOCKS = 4 * 6


def wait_for_blocks(project: Project, process: subprocess.Popen[str], count: int) -> None:
    deadline = time.monotonic() + 120
    while len(finished_blocks(project)) < count:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def launch_in_progress(project: Project) -> Iterator[subprocess.Popen[str]]:
    """A launch with some blocks done, most not; in the end it is killed if it still runs."""
    process = project.start("launch", *project.launch_arguments(*SLOW))
    try:
        wait_for_blocks(project, process, 4)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.stdout
        if not process.stdout.closed:
            process.communicate()


def run_context(
    store: Path,
    dataset: Dataset,
    shared: Path,
    estimator: EstimatorConfig | None = None,
    **settings: Any,
) -> RunContext:
    """What the blocks of a run share in which classes arrive 4, 8, 10 at epochs 0, 2, 4."""
    experiment = Experiment(
        dataset=dataset,
        checkpoints={},
        network=TINY,
        curriculum=Curriculum(tuple(class_order_of(0, 10).tolist()), Schedule(4, 4, 2)),
        estimator=estimator or EstimatorConfig(),
    )
    copy = prepare(dataset, shared)
    return RunContext(experiment.travelling(copy), store, shared, **settings)
