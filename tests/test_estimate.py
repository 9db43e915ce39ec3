"""What ``daskcurv plan`` says beforehand, against what a run then does."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daskcurv.checkpoints import Checkpoint
from daskcurv.classes import Schedule, class_order_of
from daskcurv.cli import main
from daskcurv.config import EstimatorConfig
from daskcurv.dataset import read_cifar
from daskcurv.demo import demo_options
from daskcurv.models import ModelSpec
from daskcurv.pipeline import estimate as estimating
from daskcurv.pipeline.estimate import Estimate, dry_run, flop_per_gradient, measured_rate
from daskcurv.pipeline.inputs import Inputs, gather
from daskcurv.pipeline.options import LaunchOptions
from daskcurv.storage import ResultsStore
from tests.builders import TINY, make_model, write_checkpoints, write_cifar
from tests.conftest import Project
from tests.crashes import finished_blocks
from tests.test_launch import assert_ok

SCHEDULE = Schedule(initial_classes=4, class_increment=4, class_frequency=2)


def options_of(project: Project, **changes: Any) -> LaunchOptions:
    settings: dict[str, Any] = {
        "epochs": "all",
        "data_path": project.data,
        "model_dir": project.models,
        "schedule": SCHEDULE,
        "store": project.store,
        "save_base_dir": project.tree,
        "block_size": 7,
        "estimator": EstimatorConfig(n_probes=2),
    }
    return LaunchOptions(**settings | changes)


def estimate_of(project: Project, rate: float | None = None, **changes: Any) -> Estimate:
    options = options_of(project, **changes)
    return dry_run(options, gather(options), rate)


def active_counts(project: Project, epochs: Iterable[int]) -> list[int]:
    """How many samples are active, from the schedule's definition."""
    position = np.argsort(class_order_of(0, 10))[read_cifar(project.data).labels]
    return [int((position < min(10, 4 + 4 * (epoch // 2))).sum()) for epoch in epochs]


def test_a_plan_of_4001_epochs_is_what_a_shorter_run_of_them_does(project, monkeypatch):
    (path,) = write_checkpoints(project.models, [0]).values()
    for epoch in range(4001):
        link = project.models / f"index-0_epoch-{epoch}.pt"
        if not link.exists():
            os.link(path, link)

    def unread(inputs: Inputs, _: ResultsStore | None) -> list[Checkpoint]:
        # Reading 4,001 files through, twice, is for another test.
        return [Checkpoint(*item, "", 0, 0) for item in inputs.checkpoints.items()]

    monkeypatch.setattr(estimating, "check_weights", unread)
    estimate = estimate_of(project)
    assert estimate.samples_left == sum(active_counts(project, range(4001)))
    assert estimate.plan.missing.sum() == 4001 * 9

    few = [0, 1, 2, 3, 17, 4000]
    assert_ok(project.launch("--epochs", ",".join(map(str, few)), "--block_size", "7"))
    computed = (ResultsStore.open(project.store).read("status") == 1).sum(axis=1)
    np.testing.assert_array_equal(estimate.plan.samples[few].sum(axis=1), computed)
    again = estimate_of(project, block_size=None)
    assert again.plan.missing.sum() == 4001 * 9 - len(finished_blocks(project))
    assert again.samples_left == estimate.samples_left - computed.sum()


def test_the_rate_is_what_the_workers_took_so_far(project, capsys):
    assert estimate_of(project).rate is None
    assert "rate            not known: state one" in capsys.readouterr().out
    assert_ok(project.launch("--epochs", "0,2"))
    store = ResultsStore.open(project.store)
    samples = int((store.read("status") == 1).sum())
    seconds = store.read("compute_seconds").sum()
    assert measured_rate(store, store.done_blocks()) == pytest.approx(samples / seconds)
    estimate = estimate_of(project)
    assert estimate.rate == pytest.approx(samples / seconds)
    assert estimate.device_seconds == pytest.approx(estimate.samples_left * seconds / samples)
    text = capsys.readouterr().out
    assert "samples/s per worker, as measured so far" in text
    assert re.search(r"^epochs +4 +2 +2$", text, re.MULTILINE)


def test_the_command_takes_a_rate_and_the_options_of_a_launch(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    arguments = project.launch_arguments("--device", "cpu", "--workers", "3")
    before = sorted(project.root.iterdir())
    assert main(["plan", "--rate", "0.5", *arguments]) == 0
    assert sorted(project.root.iterdir()) == before
    text = capsys.readouterr().out
    total = sum(active_counts(project, (0, 1, 2, 4)))
    assert re.search(rf"^active samples +{total} +0 +{total}$", text, re.MULTILINE)
    assert "rate            0.5 samples/s per worker, as stated" in text
    seconds = math.ceil(total / 0.5 / 3)
    left = timedelta(seconds=seconds)
    assert f"{total / 0.5 / 3600:.2f} device-hours: {left} on 3 workers, once they run" in text
    assert f"free: {project.store}" in text
    assert "npy tree" in text
    on_slurm = ("--no_export", "--cluster", "slurm", "--gpus", "16")
    assert main(["plan", *project.launch_arguments(*on_slurm)]) == 0
    assert "npy tree" not in capsys.readouterr().out


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none_is_refused(project, capsys, rate):
    assert main(["plan", f"--rate={rate}", *project.launch_arguments()]) == 2
    assert "expected samples per second, more than 0" in capsys.readouterr().err


@pytest.mark.parametrize("spec", [TINY, ModelSpec()])
def test_operations_are_those_of_convolutions_and_matrix_products(tmp_path, spec):
    project = Project(tmp_path)
    write_cifar(project.data)
    torch.manual_seed(0)
    project.models.mkdir()
    torch.save(make_model(spec).state_dict(), project.models / "index-0_epoch-0.pt")
    inputs = gather(options_of(project))
    total = 0

    def count(module: torch.nn.Module, _: Any, output: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, torch.nn.Conv2d | torch.nn.Linear)
        per_output = module.weight[0].numel()
        total += 2 * per_output * output.numel()

    model = spec.build().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    model(torch.zeros(1, 3, 32, 32))
    assert flop_per_gradient(inputs) == 2 * total


def test_added_probes_are_all_that_is_counted(project):
    assert_ok(project.launch())
    fewer = estimate_of(project)
    assert (fewer.samples_left, fewer.flop) == (0, 0.0)
    more = estimate_of(project, estimator=EstimatorConfig(n_probes=7), block_size=None)
    inputs = gather(options_of(project))
    assert more.flop == (1 + 5) * flop_per_gradient(inputs) * more.samples_left


def test_files_and_sizes_are_those_of_the_finished_run(demo):
    root, _ = demo
    options = demo_options(Path(root) / "demo")
    estimate = dry_run(options, gather(options))
    for path, size, count in (
        (options.store, estimate.store_bytes, estimate.store_files),
        (options.save_base_dir, estimate.export_bytes, estimate.export_files),
    ):
        files = [file for file in path.rglob("*") if file.is_file()]
        assert len(files) == count
        assert sum(file.stat().st_size for file in files) == pytest.approx(size, rel=0.25)
    assert estimate.samples_left == 0
