"""What ``daskcurv plan`` says beforehand, against what a run then does."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from daskcurv.cli import main
from daskcurv.config import EstimatorConfig
from daskcurv.demo import demo_options
from daskcurv.experiment.checkpoints import Checkpoint
from daskcurv.experiment.curriculum import Schedule, class_order_of
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.experiment.data.prepared import prepare
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.measures import MEASURES
from daskcurv.runs import cost as estimating
from daskcurv.runs.cost import (
    Estimate,
    Size,
    copy_size,
    dry_run,
    flop_per_gradient,
    measured_rate,
    size_text,
    store_size,
    warn_of_full_disk,
)
from daskcurv.runs.inputs import experiment_of
from daskcurv.runs.opening import ready_store
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage import ResultsStore, schema
from tests.support.builders import TINY, make_model, write_checkpoints, write_cifar
from tests.support.crashes import finished_blocks
from tests.support.launches import assert_ok
from tests.support.project import Project
from tests.support.stores import inactive_values

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
    return dry_run(options, experiment_of(options), rate)


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

    def unread(inputs: Experiment, _: ResultsStore | None) -> list[Checkpoint]:
        # Reading 4,001 files through, twice, is for another test.
        return [Checkpoint(*item, "", 0, 0) for item in inputs.checkpoints.items()]

    monkeypatch.setattr(estimating, "check_checkpoints", unread)
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
    assert "rate            unknown: set it" in capsys.readouterr().out
    assert_ok(project.launch("--epochs", "0,2"))
    store = ResultsStore.open(project.store)
    samples = int((store.read("status") == 1).sum())
    seconds = store.read("compute_seconds").sum()
    assert measured_rate(store, store.done_blocks()) == pytest.approx(samples / seconds)
    estimate = estimate_of(project)
    assert estimate.rate == pytest.approx(samples / seconds)
    assert estimate.device_seconds == pytest.approx(estimate.samples_left * seconds / samples)
    text = capsys.readouterr().out
    assert "samples/s per worker, measured so far" in text
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
    assert "rate            0.5 samples/s per worker, as given" in text
    seconds = math.ceil(total / 0.5 / 3)
    left = timedelta(seconds=seconds)
    assert f"{total / 0.5 / 3600:.2f} device-hours: {left} on 3 workers, without waiting" in text
    assert f"free: {project.store}" in text
    assert "npy tree" in text
    on_slurm = ("--no_export", "--cluster", "slurm", "--gpus", "16")
    assert main(["plan", *project.launch_arguments(*on_slurm)]) == 0
    assert "npy tree" not in capsys.readouterr().out


def test_the_printed_figures_are_those_of_what_is_left(project, monkeypatch, capsys):
    store = ready_store(options_of(project), experiment_of(options_of(project)), None)[0]
    for row, blocks in ((0, range(9)), (1, (2, 5))):
        for block in blocks:
            start, stop = store.bounds(block)
            store.write_block(row, block, inactive_values(stop - start))
    monkeypatch.chdir(project.root)
    assert main(["plan", "--rate", "0.5", *project.launch_arguments()]) == 0
    printed = capsys.readouterr()
    position = np.argsort(class_order_of(0, 10))[read_cifar(project.data).labels]
    block_of = np.arange(60) // 7
    active = [position < classes for classes in (4, 4, 8, 10)]
    total = sum(int(row.sum()) for row in active)
    done = int(active[0].sum() + active[1][np.isin(block_of, (2, 5))].sum())
    left = total - done
    for line in (
        "epochs +4 +1 +3", "blocks +36 +11 +25", f"active samples +{total} +{done} +{left}"
    ):  # fmt: skip
        assert re.search(f"^{line}$", printed.out, re.MULTILINE), line
    summary = f"4 epochs, 36 blocks, {total} active samples; to do: 3 epochs, 25 blocks, {left} "
    assert summary + "samples" in printed.err
    # A gradient at the sample, and one for each of the two probes.
    work = 3 * left * flop_per_gradient(experiment_of(options_of(project)))
    assert f"{work / 1e9:.3g} GFLOP to do" in printed.out
    assert f"as given ({work / (left / 0.5) / 1e6:.3g} MFLOP/s)" in printed.out


@pytest.mark.parametrize("rate", ["0", "-1", "nan", "inf"])
def test_a_rate_that_is_none_is_refused(project, capsys, rate):
    assert main(["plan", f"--rate={rate}", *project.launch_arguments()]) == 2
    assert "expected samples per second, greater than 0" in capsys.readouterr().err


@pytest.mark.parametrize("spec", [TINY, ModelSpec()])
def test_operations_are_those_of_convolutions_and_matrix_products(tmp_path, spec):
    project = Project(tmp_path)
    write_cifar(project.data)
    torch.manual_seed(0)
    project.models.mkdir()
    torch.save(make_model(spec).state_dict(), project.models / "index-0_epoch-0.pt")
    inputs = experiment_of(options_of(project))
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
    inputs = experiment_of(options_of(project))
    assert more.flop == (1 + 5) * flop_per_gradient(inputs) * more.samples_left


def on_disk(path: Path) -> tuple[int, int, int]:
    """Bytes in the files, bytes allotted in units of 4 KiB, directories included, and files."""
    files = [file for file in path.rglob("*") if file.is_file()]
    sizes = [file.stat().st_size for file in files]
    directories = 1 + sum(1 for entry in path.rglob("*") if entry.is_dir())
    return sum(sizes), 4096 * (sum(-(-size // 4096) for size in sizes) + directories), len(files)


def assert_size(size: Size, path: Path) -> None:
    found = on_disk(path)
    assert size.files == found[2]
    assert size.bytes == pytest.approx(found[0], rel=0.1)
    assert size.on_disk == pytest.approx(found[1], rel=0.1)


@pytest.mark.parametrize(
    ("num_samples", "epochs", "block_size"),
    [(60, 4, 60), (500, 3, 40), (6000, 2, 5000), (12000, 3, 1500)],
)
def test_sizes_are_those_of_stores_of_any_size(tmp_path, num_samples, epochs, block_size):
    generator = np.random.default_rng(0)
    store = ResultsStore.create(
        tmp_path / "s.zarr",
        identity={"made": "for a test"},
        samples={
            "sample": np.arange(num_samples),
            "label": generator.integers(0, 10, num_samples),
            **{
                name: np.zeros(num_samples)
                for name in ("split", "class_position", "first_epoch_active")
            },
            "sample_key": [generator.bytes(16).hex() for _ in range(num_samples)],
        },
        epochs={
            v.name: ["0" * 64 if v.dtype == "str" else epoch for epoch in range(epochs)]
            for v in schema.EPOCH_VARIABLES
        },
        block_size=block_size,
    )
    samples = np.zeros((epochs, store.num_blocks), np.int64)
    for epoch, block in np.ndindex(*samples.shape):
        start, stop = store.bounds(block)
        active = generator.random(stop - start) < (epoch + 1) / epochs
        samples[epoch, block] = active.sum()
        values = {"status": np.where(active, schema.COMPUTED, schema.INACTIVE)}
        for variable in MEASURES:
            results = generator.lognormal(size=len(active)) * 3
            values[variable.name] = np.where(active, results, variable.fill).astype(variable.dtype)
        store.write_block(epoch, block, values)
    assert_size(store_size(samples, num_samples), store.path)


def test_the_size_of_the_workers_copy_is_that_of_its_directory(project):
    dataset = read_cifar(project.data)
    prepare(dataset, project.root / "inputs")
    assert_size(copy_size(dataset), project.root / "inputs")


def test_files_and_sizes_are_those_of_the_finished_run(demo, capsys):
    root, _ = demo
    options = demo_options(Path(root) / "demo")
    estimate = dry_run(options, experiment_of(options))
    assert_size(estimate.store, options.store)
    assert_size(estimate.export, options.save_base_dir)
    assert estimate.samples_left == 0
    printed = capsys.readouterr().out
    for name, size, path in (
        ("store", estimate.store, options.store),
        ("npy tree", estimate.export, options.save_base_dir),
        ("data copy", estimate.copy, f"{options.store}.inputs"),
    ):
        (line,) = re.findall(rf"^{name} +about (.*): {path}$", printed, re.MULTILINE)
        assert line.startswith(f"{size.bytes / 2**20:.1f} MiB in {size.files} files when complete")
        assert f", {size.on_disk / 2**20:.1f} MiB on disk, of " in line


@pytest.mark.parametrize(
    ("value", "text"),
    [(512, "0.5 KiB"), (2**18, "0.2 MiB"), (10 * 2**20, "10.0 MiB"), (3 * 2**29, "1.50 GiB")],
)
def test_sizes_are_given_in_a_unit_that_shows_them(value, text):
    assert size_text(value) == text


def test_added_probes_are_planned_in_the_blocks_that_the_launch_will_use(project):
    store = ready_store(options_of(project), experiment_of(options_of(project)), None)[0]
    store.write_block(0, 2, inactive_values(7))
    options = options_of(project, estimator=EstimatorConfig(n_probes=7), block_size=None)
    inputs = experiment_of(options)
    estimate = dry_run(options, inputs)
    assert estimate.plan.missing.shape == (4, 9) == store.done_blocks().shape
    assert estimate.plan.missing.all()
    # Seven probes for the blocks that the store lacks, and the five added ones for the other.
    samples = estimate.plan.samples
    gradients = (1 + 7) * samples.sum() - 2 * samples[0, 2]
    assert samples[0, 2] > 0
    assert estimate.flop == gradients * flop_per_gradient(inputs)


def test_a_launch_warns_of_a_disk_on_which_it_will_not_fit(project, monkeypatch, caplog):
    options = options_of(project)
    estimate = estimate_of(project)
    needed = estimate.store.on_disk + estimate.copy.on_disk
    for free, warned in ((needed, False), (needed - 1, True)):
        caplog.clear()
        monkeypatch.setattr("shutil.disk_usage", lambda _, free=free: SimpleNamespace(free=free))
        warn_of_full_disk(options, read_cifar(project.data), estimate.plan)
        assert (f"{project.store} needs about {size_text(needed)} more" in caplog.text) == warned
