"""Training runs of others by options alone: their files, networks, data and schedules."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn

import daskcurv
from daskcurv.cli import main
from daskcurv.measures import MEASURES
from daskcurv.runs.inputs import experiment_of
from daskcurv.runs.opening import check_checkpoints
from daskcurv.runs.options import launch_options
from daskcurv.storage import ResultsStore
from daskcurv.storage.read import open_results
from tests.support.formats import (
    COLOUR,
    NAMES,
    write_gz_idx,
    write_idx,
    write_npy,
    write_train_folders,
)

CLASSES, SAMPLES, SIZE = 4, 24, 12
MEAN, STD = 0.4, 0.3

NET = """
from torch import nn

def net(width=6):
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(4 * width, 4),
    )
"""


def build(seed: int, channels: int = 1) -> nn.Module:
    """The network of `NET`, written again."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, CLASSES),
    )  # fmt: skip


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (SAMPLES, SIZE, SIZE)).astype(np.uint8)


LABELS = np.arange(SAMPLES) % CLASSES


@pytest.fixture
def directory(tmp_path: Path, images, monkeypatch) -> Path:
    """Weights as DataParallel and a training loop leave them, in a directory for each step."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    np.savez(tmp_path / "set.npz", images=images, labels=LABELS)
    for epoch in (0, 1, 5):
        (tmp_path / f"run/checkpoint-{epoch}").mkdir(parents=True)
        content = {
            "model": nn.DataParallel(build(epoch)).state_dict(),
            "epoch": np.int64(epoch),
            "best": np.float64(0.5),
        }
        torch.save(content, tmp_path / f"run/checkpoint-{epoch}/model.ckpt")
    return tmp_path


COMMON = (
    "--checkpoints", "run/checkpoint-{epoch}/model.ckpt", "--model", "net.py:net",
    "--model_args", '{"width": 6}', "--mean", str(MEAN), "--std", str(STD),
    "--method", "finite-difference", "--n_probes", "2", "--batch_size", "8", "--workers", "1",
)  # fmt: skip


def launch(store: str, *extra: str, data: str = "set.npz") -> int:
    places = ("--data_path", data, "--store", store, "--save_base_dir", "tree")
    return main(["launch", *COMMON, *places, *extra])


def test_every_epoch_of_another_run_is_scored(directory, images, capsys):
    assert launch("c.zarr") == 0
    said = capsys.readouterr().err
    assert "under 'model', names without 'module.'" in said
    assert "all 4 classes are active from the start" in said
    assert "accuracy at epoch 5: " in said
    results = open_results("c.zarr", incomplete="raise").load()
    assert results.epoch.values.tolist() == [0, 1, 5]
    assert (results.split == 0).all()
    assert results.trained.values.tolist() == [[False] * SAMPLES] + [[True] * SAMPLES] * 2
    normalised = ((images / 255 - MEAN) / STD).astype(np.float32)[:, None]
    for epoch in (0, 1, 5):
        expected = daskcurv.score_samples(
            build(epoch), normalised, LABELS, n_probes=2, method="finite-difference"
        )
        row = results.sel(epoch=epoch)
        np.testing.assert_allclose(row.loss, expected.loss, rtol=1e-4)
        np.testing.assert_allclose(row.curvature, expected.curvature, rtol=2e-2)
    assert len(list((directory / "tree").iterdir())) == 3
    # Grey images are shown as such.
    assert main(["report", "c.zarr", "-o", "r.html", "--data_path", "set.npz"]) == 0
    assert Path("r.html").read_text().count("data:image/png") > 10


def test_it_is_verified_continued_and_run_again_from_elsewhere(directory, monkeypatch, capsys):
    assert launch("c.zarr", "--epochs", "0,5", "--no_export") == 0
    origin = ["--checkpoints", COMMON[1], "--recompute", "4", "--data_path", "set.npz"]
    assert main(["verify", "c.zarr", *origin, "--model", "net.py:net"]) == 0
    capsys.readouterr()
    assert main(["verify", "c.zarr", *origin]) == 2
    assert "add --model PATH/net.py:net (the file of the network)" in capsys.readouterr().err
    assert main(["verify", "c.zarr", *origin[:4]]) == 2
    assert "add --data_path (there is no data set at data/cifar-100-python) and --model PATH/n" in (
        capsys.readouterr().err
    )
    assert main(["verify", "c.zarr", *origin, "--model", "other.py:net"]) == 2
    assert "but the network of c.zarr is made by net.py:net" in capsys.readouterr().err
    (directory / "elsewhere").mkdir()
    monkeypatch.chdir(directory / "elsewhere")
    file = str(directory / "c.zarr.run.yaml")
    assert main(["launch", file, "--epochs", "all"]) == 0
    assert open_results(directory / "c.zarr", incomplete="raise").sizes["epoch"] == 3
    (directory / "net.py").write_text(NET.replace("nn.ReLU()", "nn.Tanh()"))
    capsys.readouterr()
    assert main(["launch", file]) == 2
    assert "model.source_sha256: the store has" in capsys.readouterr().err


def test_the_number_in_a_name_can_be_that_of_the_last_epoch(directory):
    schedule = directory / "classes.csv"
    schedule.write_text("epoch,classes\n0,2\n2,4\n")
    arguments = ["--epoch_means", "last", "--class_schedule", str(schedule), "--no_export"]
    assert launch("c.zarr", *arguments) == 0
    results = open_results("c.zarr", incomplete="raise").load()
    # The files of epochs 0, 1 and 5 have been trained for 1, 2 and 6.
    assert results.num_active_classes.values.tolist() == [2, 4, 4]
    late = LABELS >= 2
    assert (results.trained.values[0] == ~late).all()
    assert (results.trained.values[1] == ~late).all()
    assert results.trained.values[2].all()


@pytest.mark.parametrize(
    ("channels", "writers"),
    [
        (1, [write_npy, write_idx, write_gz_idx]),
        (3, [w for w in COLOUR if w is not write_train_folders]),
    ],
    ids=["grey", "colour"],
)
def test_results_do_not_depend_on_how_data_are_stored(directory, capsys, channels, writers):
    pixels = np.random.default_rng(1).integers(0, 256, (SAMPLES, channels, 32, 32), np.uint8)
    labels = np.sort(LABELS % len(NAMES))  # class folders come class by class
    (directory / "net.py").write_text(NET.replace("Conv2d(1,", f"Conv2d({channels},"))
    for epoch in (0, 5):
        torch.save(build(epoch, channels).state_dict(), f"bare-{epoch}.pt")
    said, stores = set(), []
    for write in writers:
        data = write(directory / write.__name__, pixels, labels)
        store = f"{write.__name__}.zarr"
        assert launch(store, "--checkpoints", "bare-{epoch}.pt", "--no_export", data=str(data)) == 0
        accuracy = re.findall(r"accuracy at epoch .*", capsys.readouterr().err)
        assert len(accuracy) == 2
        said.add(tuple(accuracy))
        stores.append(ResultsStore.open(Path(store)))
    assert len(said) == 1, said
    first, *others = stores
    for other in others:
        assert other.identity == first.identity
        for name in (measure.name for measure in MEASURES):
            np.testing.assert_array_equal(first.read(name), other.read(name), err_msg=name)


def test_results_do_not_depend_on_how_weights_are_stored(directory):
    for epoch in (0, 1, 5):
        torch.save(build(epoch).state_dict(), f"bare-{epoch}.pt")
        daskcurv.keep(build(epoch), "kept", epoch)
    stores = {
        "wrapped": (),
        "bare": ("--checkpoints", "bare-{epoch}.pt"),
        "kept": ("--checkpoints", "kept/epoch-{epoch}.safetensors"),
    }
    for name, extra in stores.items():
        assert launch(f"{name}.zarr", "--no_export", *extra) == 0
    first, *others = (open_results(f"{name}.zarr", incomplete="raise").load() for name in stores)
    for other in others:
        for name in (measure.name for measure in MEASURES):
            np.testing.assert_array_equal(first[name].values, other[name].values, err_msg=name)
    assert "payload" not in ResultsStore.open(Path("bare.zarr")).identity
    assert ResultsStore.open(Path("wrapped.zarr")).identity["payload"]["key"] == "model"


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        (["--model_args", "{"], "model_args is no JSON"),
        (["--model_args", "[1]"], 'expected an object such as {"num_classes": 10}'),
        (["--model_args", '{"depth": 3}'], "unexpected keyword argument 'depth'"),
        (["--model_args", '{"width": 7}'], "does not fit the network"),
        (["--mean", "a,b"], "mean is 'a,b'; expected a number for each channel"),
        (["--mean", "0.4,0.4"], "2 values"),
        (["--checkpoints", "run/none-{epoch}.pt"], "none-{epoch}.pt"),
        (["--weights_key", "nets"], "nets"),
        (["--task_sizes", "2,2"], "task_sizes and task_epochs go together"),
        (["--task_sizes", "2,x", "--task_epochs", "3"], "task_sizes is '2,x'; expected whole"),
        (["--class_schedule", "none", "--task_sizes", "4", "--task_epochs", "1"], "use one of"),
        (["--class_schedule", "none.csv"], "class schedule none.csv cannot be read"),
        (["--task_sizes", "1,2", "--task_epochs", "3"], "ends with 3 classes, but the network"),
        (["--model", "resnet18-lop", "--model_args", ""], "those of another network than res"),
        (["--data_path", "run"], "is in none of the formats"),
        (["--checkpoints", "run"], "run is a directory, not a weight file; give the pattern"),
        (["--model", "net:net"], "If the file net.py is meant, write net.py:net"),
        (["--model_args", '{"width": 7}'], "(and 2 other files alike: run"),
    ],
)  # fmt: skip
def test_what_cannot_be_used_ends_in_one_message(directory, capsys, extra, said):
    assert launch("c.zarr", *extra) == 2
    *before, last = capsys.readouterr().err.splitlines()
    assert said in last
    assert not any("classes are active" in line for line in before) or "does not fit" in last
    assert not (directory / "c.zarr").exists()


def test_names_in_place_of_a_pattern_are_told_from_a_run_file(directory, capsys):
    names = sorted(map(str, Path("run").glob("*/model.ckpt")))
    with pytest.raises(SystemExit) as stopped:
        main(["launch", "--checkpoints", *names, "--model", "net.py:net"])
    assert stopped.value.code == 2
    assert "put the pattern in quotes: --checkpoints 'run/*.pt'" in capsys.readouterr().err


def test_the_network_is_built_and_the_weights_read_once_before_they_are_checked(
    directory, monkeypatch
):
    """Of the weights that say where they are in a file, only names and shapes are looked at."""
    place = directory / "built"
    counting = f"""    with open({str(place)!r}, "a") as file:
        file.write("x")
    return"""
    (directory / "net.py").write_text(NET.replace("    return", counting))
    read: list[Path] = []
    whole = Path.read_bytes
    monkeypatch.setattr(
        Path,
        "read_bytes",
        lambda path: read.append(path) or whole(path),  # type: ignore[func-returns-value]
    )
    experiment = experiment_of(
        launch_options(
            {
                "checkpoints": COMMON[1], "model": "net.py:net", "mean": "0.4", "std": "0.3",
                "data_path": Path("set.npz"),
            }
        )
    )  # fmt: skip
    assert place.read_text() == "x"
    assert not [path for path in read if path.suffix == ".ckpt"]
    check_checkpoints(experiment, None)
    assert sorted(path for path in read if path.suffix == ".ckpt") == sorted(
        experiment.checkpoints.values()
    )


def test_arguments_of_a_factory_are_refused_for_the_documented_network(capsys):
    assert main(["launch", "--model_args", "{}"]) == 2
    assert "model_args are for other networks than resnet18-lop" in capsys.readouterr().err


def test_a_file_says_which_samples_were_held_out(directory, capsys):
    held_out = [3, 10, 11]
    np.save("held.npy", np.array(held_out))
    assert launch("c.zarr", "--epochs", "1", "--held_out", "held.npy") == 0
    assert "3 of 24 samples held out" in capsys.readouterr().err
    assert np.flatnonzero(open_results("c.zarr").split == 1).tolist() == held_out
    settings = yaml.safe_load((directory / "c.zarr.run.yaml").read_text())
    assert settings["held_out"] == str(directory / "held.npy")
    assert "validation_per_class" not in settings
    assert main(["launch", "c.zarr.run.yaml"]) == 0
    where = ("--checkpoints", COMMON[1], "--model", "net.py:net", "--data_path", "set.npz")
    assert main(["verify", "c.zarr", *where, "--recompute", "2"]) == 0
    capsys.readouterr()
    np.save("held.npy", np.array([3, 10]))
    assert main(["launch", "c.zarr.run.yaml"]) == 2
    assert "dataset.held_out" in capsys.readouterr().err


def test_the_first_of_each_class_can_be_said_in_two_ways(directory, capsys):
    assert launch("c.zarr", "--epochs", "1", "--held_out", "first:2") == 0
    assert ResultsStore.open(Path("c.zarr")).identity["dataset"]["validation_per_class"] == 2
    assert "held_out" not in ResultsStore.open(Path("c.zarr")).identity["dataset"]
    assert launch("c.zarr", "--epochs", "1", "--validation_per_class", "2", "--dry_run") == 0
