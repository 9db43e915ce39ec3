"""The demo's training: interrupted and continued, it gives the weights of one that was not."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from daskcurv import demo, training
from daskcurv.cli import main
from daskcurv.experiment.curriculum import Schedule
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.runs.outcome import Outcome
from daskcurv.training import STATE, TrainingRun, train
from tests.support.builders import write_cifar

RUN = TrainingRun(
    ModelSpec(num_classes=10, width=2), Schedule(4, 4, class_frequency=2), 3, validation_per_class=1
)
WEIGHTS = [f"index-0_epoch-{epoch}.pt" for epoch in range(4)]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    write_cifar(tmp_path / "cifar-100-python", num_samples=40)
    return tmp_path


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """Weights of an uninterrupted training, by file."""
    root = tmp_path_factory.mktemp("uninterrupted")
    write_cifar(root / "cifar-100-python", num_samples=40)
    train(root, RUN)
    return {name: torch.load(root / "model_parameters" / name) for name in WEIGHTS}


def assert_trained(directory: Path, expected: dict[str, dict[str, torch.Tensor]]) -> None:
    assert sorted(p.name for p in (directory / "model_parameters").iterdir()) == WEIGHTS
    assert not (directory / "model_parameters.partial").exists()
    for name in WEIGHTS:
        found = torch.load(directory / "model_parameters" / name)
        assert found.keys() == expected[name].keys()
        assert all(torch.equal(found[key], expected[name][key]) for key in found), name


def interrupt(
    directory: Path, monkeypatch: pytest.MonkeyPatch, after: int, in_the_middle: bool = True
) -> None:
    """Interrupt a training in the epoch that follows `after`, or before that is saved."""
    original = training._Training.epoch
    epochs: list[int] = []

    def epoch(self: Any, *arguments: Any) -> tuple[float, float]:
        epochs.append(len(epochs) + 1)
        if in_the_middle and len(epochs) > after:
            raise KeyboardInterrupt
        result = original(self, *arguments)
        if len(epochs) > after:
            raise KeyboardInterrupt
        return result

    with monkeypatch.context() as patch:
        patch.setattr(training._Training, "epoch", epoch)
        with pytest.raises(KeyboardInterrupt):
            train(directory, RUN)


@pytest.mark.parametrize(("after", "in_the_middle"), [(0, True), (1, False), (2, True)])
def test_an_interrupted_training_goes_on_bit_for_bit(
    directory, expected, monkeypatch, caplog, after, in_the_middle
):
    interrupt(directory, monkeypatch, after, in_the_middle)
    kept = {path: path.stat().st_mtime_ns for path in directory.glob("*.partial/index*")}
    assert len(kept) == after + 1
    caplog.set_level(logging.INFO, "daskcurv")
    train(directory, RUN)
    assert f"continues after epoch {after} of 3" in caplog.text
    assert_trained(directory, expected)
    for path, written in kept.items():
        assert (directory / "model_parameters" / path.name).stat().st_mtime_ns == written


def damage(directory: Path) -> None:
    content = (directory / STATE).read_bytes()
    (directory / STATE).write_bytes(content[: len(content) // 2])


@pytest.mark.parametrize(
    "spoil",
    [
        damage,
        lambda directory: (directory / WEIGHTS[1]).unlink(),
        lambda directory: (directory / STATE).unlink(),
        lambda directory: torch.save({}, directory / STATE),
    ],
    ids=["a cut state", "no weights", "no state", "another file"],
)
def test_a_training_that_cannot_go_on_starts_again(directory, expected, monkeypatch, spoil):
    interrupt(directory, monkeypatch, after=2)
    spoil(directory / "model_parameters.partial")
    train(directory, RUN)
    assert_trained(directory, expected)


def test_each_epoch_tells_its_loss_and_accuracy(directory, caplog):
    caplog.set_level(logging.INFO, "daskcurv")
    train(directory, RUN)
    lines = [r.getMessage() for r in caplog.records if "training epoch" in r.getMessage()]
    assert [line.split(",")[0] for line in lines] == [
        "training epoch 1 of 3: 4 classes",
        "training epoch 2 of 3: 4 classes",
        "training epoch 3 of 3: 8 classes",
    ]
    assert all("loss " in line and line.endswith(" %") for line in lines)


def test_loss_and_accuracy_are_those_of_the_batches(directory):
    # Without a step, all batches are scored with the first weights, normalised by batch.
    torch.manual_seed(0)
    spec = ModelSpec(num_classes=10, width=4, norm="identity")
    images, labels = torch.randn(40, 3, 32, 32), torch.arange(40) % 4
    active = torch.tensor([2, 0, 3, 1])
    run = training._Training(spec)
    logits = run._model(images)[:, active].detach().double()
    right = torch.tensor([active.tolist().index(label) for label in labels.tolist()])
    loss = (torch.logsumexp(logits, 1) - logits[range(40), right]).mean().item()
    accuracy = (logits.argmax(1) == right).double().mean().item()
    found = run.epoch(images, labels, active, torch.arange(40), learning_rate=0.0)
    assert found == pytest.approx((loss, accuracy), rel=1e-5)


@pytest.mark.parametrize("package", ["matplotlib", "sklearn"])
def test_a_demo_without_a_package_ends_before_it_begins(package, tmp_path, monkeypatch, capsys):
    def fail(name: str) -> None:
        if name.startswith(package):
            raise ImportError(f"No module named {package!r}")

    monkeypatch.setattr(demo, "import_module", fail)
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "--demo", "demo"]) == 2
    message = capsys.readouterr().err
    assert f"No module named {package!r}" in message
    assert "pip install 'daskcurv[demo]'" in message
    assert list(tmp_path.iterdir()) == []


def test_what_the_demo_found_is_printed_and_in_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("check_packages", "make_dataset", "train"):
        monkeypatch.setattr(demo, name, lambda directory: None)
    monkeypatch.setattr(demo, "launch", lambda options: Outcome())
    monkeypatch.setattr(
        demo, "print_findings", lambda directory, options: print("72 labels were flipped")
    )
    assert main(["launch", "--demo", "demo"]) == 0
    assert capsys.readouterr().out == "72 labels were flipped\n"
    (log,) = (tmp_path / "demo" / "log").iterdir()
    assert "72 labels were flipped" in log.read_text()
