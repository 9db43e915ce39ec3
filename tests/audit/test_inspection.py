"""What `daskcurv inspect` says of files, and that the command it ends with is one."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from daskcurv.audit.inspection_names import names_of_files
from daskcurv.cli import build_parser, main
from daskcurv.runs.options import launch_options
from tests.support.builders import make_model, write_checkpoints, write_cifar

FILLED = {
    "CHECKPOINTS": "runs/net-{epoch}.pt", "MODEL": "torchvision:resnet18", "MEAN": "0.5",
    "STD": "0.25", "DATA_PATH": "data", "EXPERIMENT_INDEX": "1", "TASK": "0", "IMAGE_SIZE": "32",
    "WEIGHTS_KEY": "state_dict",
}  # fmt: skip


class Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.marker}",)


def inspected(capsys: pytest.CaptureFixture[str], *paths: Path, code: int = 0) -> str:
    assert main(["inspect", *map(str, paths)]) == code
    return str(capsys.readouterr().out)


def command_in(text: str) -> list[str]:
    (line,) = re.findall(r"^  (daskcurv launch .*)$", text, re.MULTILINE)
    return shlex.split(line)[1:]


def options_of(text: str) -> Any:
    """Return the options of the printed command, once its placeholders are filled."""
    words = command_in(text)
    unknown = [word for word in words if word.isupper()]
    assert all(f"{word}:" in text or f"{word} and" in text or word == "STD" for word in unknown)
    args = build_parser().parse_args([FILLED.get(word, word) for word in words])
    return launch_options(vars(args))


def small(outputs: int = 3, seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, outputs))


def write_parallel(path: Path, epoch: int, outputs: int = 3) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = torch.nn.DataParallel(small(outputs, epoch)).state_dict()
    torch.save({"epoch": epoch, "best_acc": 0.5, "net": state, "args": {"lr": 1}}, path)
    return path


def test_the_documented_run_needs_no_network(tmp_path, capsys):
    write_checkpoints(tmp_path / "models", [0, 2, 4, 6])
    write_cifar(tmp_path / "cifar-100-python")
    text = inspected(capsys, tmp_path / "models", tmp_path / "cifar-100-python")
    assert "the names are those of the documented run" in text
    assert text.count("the documented ResNet-18: 10 outputs, width 4") == 3
    assert "epochs      4: 0 … 6, every 2" in text
    assert "60, 32 × 32 pixels, 3 channels, uint8" in text
    options = options_of(text)
    assert options.documented
    assert options.model_dir == tmp_path / "models"
    assert options.epochs == "all"
    assert not [word for word in command_in(text) if word.isupper()]


def test_an_index_of_several_is_to_be_chosen(tmp_path, capsys):
    for index in (0, 1):
        write_checkpoints(tmp_path, [0, 200], experiment_index=index)
    text = inspected(capsys, tmp_path)
    assert "experiments 0, 1" in text
    assert options_of(text).experiment_index == 1


def test_a_wrapped_network_with_an_epoch_beside(tmp_path, capsys):
    for epoch in (1, 2, 10):
        write_parallel(tmp_path / "my runs" / f"net-{epoch}.pt", epoch)
    text = inspected(capsys, tmp_path / "my runs")
    assert "net-N.pt: 1 … 10, 3 values" in text
    assert "under 'net', names without 'module.'" in text
    assert "2 tensors, 39 parameters, float32" in text
    assert "outputs: 3, as the last matrix suggests (1.weight, 3 × 12)" in text
    assert "beside the weights: epoch 10, best_acc 0.5, args\n" in text
    assert "1 in net-1.pt, 2 in net-2.pt, 10 in net-10.pt" in text
    options = options_of(text)
    assert options.checkpoints == str(tmp_path / "my runs" / "net-{epoch}.pt")
    assert (options.model, options.mean) == (FILLED["MODEL"], FILLED["MEAN"])


def test_the_epoch_is_taken_from_files_whose_names_lack_it(tmp_path, capsys):
    for epoch, name in ((1, "seed-7.pt"), (3, "seed-8.pt")):
        write_parallel(tmp_path / name, epoch)
    text = inspected(capsys, tmp_path)
    assert "a launch takes what each file states under 'epoch': 1 in seed-7.pt, 3 in seed-8" in text
    assert "Epochs begin at 0" not in text
    assert options_of(text).checkpoints == str(tmp_path / "seed-*.pt")
    write_parallel(tmp_path / "seed-8.pt", 1)
    assert options_of(inspected(capsys, tmp_path)).checkpoints == FILLED["CHECKPOINTS"]


def test_files_of_other_shapes_are_told(tmp_path, capsys):
    for epoch, outputs in ((0, 3), (1, 5)):
        write_parallel(tmp_path / f"net-{epoch}.pt", epoch, outputs)
    text = inspected(capsys, tmp_path)
    assert "outputs: 3 in net-0.pt, 5 in net-1.pt" in text
    assert "names or shapes in net-0.pt and net-1.pt: 1.bias, 1.weight; outputs were added" in text
    assert "give the network all of them" in text
    assert options_of(text).head == "active"
    assert "Epochs begin at 0: if those weights are of the end of the first epoch" in text
    state = {"w": torch.ones(3, 4)}
    torch.save({"net": state}, tmp_path / "net-0.pt")
    text = inspected(capsys, tmp_path)
    assert "a launch needs files of one network" in text
    assert options_of(text).head == "all"


def test_the_documented_network_under_other_names(tmp_path, capsys):
    for epoch in (1, 2):
        torch.save({"model": make_model().state_dict()}, tmp_path / f"a_{epoch}.pth")
    text = inspected(capsys, tmp_path)
    assert "--model " not in text
    assert options_of(text).checkpoints == str(tmp_path / "a_{epoch}.pth")


def test_an_npz_and_what_does_not_fit_the_weights(tmp_path, capsys):
    images = np.zeros((7, 5, 6), np.uint8)
    np.savez(tmp_path / "set.npz", images=images, labels=np.array([0, 0, 0, 1, 1, 3, 3]))
    write_parallel(tmp_path / "net-epoch-5.pt", 5)
    text = inspected(capsys, tmp_path)
    assert "7, 5 × 6 pixels, 1 channel, uint8" in text
    assert "3, with 2 … 3 images each" in text
    assert "0 … 3, not all of them occur" in text
    assert "not known; they have to be given" in text
    assert "The weights suggest 3 outputs, and the data have labels up to 3" in text
    options = options_of(text)
    assert options.data_path == tmp_path / "set.npz"
    assert options.checkpoints == str(tmp_path / "net-epoch-{epoch}.pt")


@pytest.mark.parametrize("sizes", [(8, 8), (8, 9)])
def test_class_folders(sizes, tmp_path, capsys):
    for name, size in zip(("ant", "bee"), sizes, strict=True):
        (tmp_path / name).mkdir()
        for number in range(2):
            Image.new("RGB", (size, size)).save(tmp_path / name / f"{number}.png")
    text = inspected(capsys, tmp_path)
    assert "class names ant, bee" in text
    assert "2, with 2 images each" in text
    differ = sizes[0] != sizes[1]
    assert ("of different sizes" in text) == differ
    assert "--mean MEAN" in text
    assert options_of(text).checkpoints == FILLED["CHECKPOINTS"]
    assert options_of(text).image_size == (32 if differ else None)


def test_pictures_beside_weights_are_no_data_set(tmp_path, capsys):
    (tmp_path / "samples").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "samples" / "0.png")
    write_parallel(tmp_path / "net-0.pt", 0)
    text = inspected(capsys, tmp_path)
    assert "are not taken for a data set" in text
    assert "data:" not in text


def test_hostile_and_damaged_files_are_named(tmp_path, capsys):
    write_parallel(tmp_path / "net-0.pt", 0)
    torch.save({"net": Hostile(tmp_path / "ran")}, tmp_path / "net-1.pt")
    whole = write_parallel(tmp_path / "net-2.pt", 2).read_bytes()
    (tmp_path / "net-2.pt").write_bytes(whole[: len(whole) // 2])
    text = inspected(capsys, tmp_path, code=1)
    assert f"cannot be read: checkpoint {tmp_path / 'net-1.pt'}" in text
    assert "it tries to import posix.system" in text
    assert not (tmp_path / "ran").exists()
    assert f"cannot be read: checkpoint {tmp_path / 'net-2.pt'}" in text
    assert options_of(text).checkpoints


def test_a_damaged_data_set_is_named(tmp_path, capsys):
    (tmp_path / "set.npz").write_bytes(b"PK no archive")
    text = inspected(capsys, tmp_path / "set.npz", code=1)
    assert f"cannot be read: {tmp_path / 'set.npz'}" in text


def test_files_with_several_weights_need_a_key(tmp_path, capsys):
    state = small().state_dict()
    torch.save({"model": state, "net": state}, tmp_path / "epoch3.pt")
    text = inspected(capsys, tmp_path)
    assert "has weights under 'model', 'net'" in text
    assert options_of(text).weights_key == "state_dict"


def test_a_wrong_path_is_one_error(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert f"{tmp_path / 'none'} cannot be inspected: it does not exist" in capsys.readouterr().err
    (tmp_path / "notes.txt").write_text("x")
    assert main(["inspect", str(tmp_path)]) == 2
    printed = capsys.readouterr()
    assert "has nothing that is recognised: the directory has notes.txt" in printed.err
    assert printed.out == ""


@pytest.mark.parametrize(
    ("names", "pattern", "how"),
    [
        (["n-1.pt", "n-2.pt"], "n-{epoch}.pt", "the only number that varies"),
        (["n-01-acc0.5.pt", "n-02-acc0.7.pt", "n-03-acc0.5.pt"], "n-{epoch}-acc0.*.pt", "it alone"),
        (["epoch=1-step=10.ckpt", "epoch=2-step=20.ckpt"], "epoch={epoch}-step=*.ckpt", "call it"),
        (["s/step_10/m.pt", "s/step_20/m.pt"], "s/step_{step}/m.pt", "call it step"),
        (["r-1_epoch1.pt", "r-2_epoch1.pt"], "r-{experiment}_epoch{epoch}.pt", "call it"),
        (["seed0-ep1.pt", "seed1-ep2.pt"], "seed{experiment}-ep{epoch}.pt", "call it"),
        (["t_3epochs.pt"], "t_{epoch}epochs.pt", "call it epoch"),
        (["resnet20_200.th"], "", "no number in the name is called epoch"),
        (["a1-1.pt", "a2-2.pt"], "", "nothing tells which is the epoch"),
        (["seed-1.pt", "seed-2.pt"], "", "called something else than epoch"),
        (["a{-1.pt", "a{-2.pt"], "", "rename it"),
    ],
)
def test_the_epoch_among_the_numbers(names, pattern, how, tmp_path):
    paths = [tmp_path.joinpath(name) for name in names]
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (found,) = names_of_files(paths)
    assert found.pattern == (str(tmp_path / pattern) if pattern else "")
    assert how in found.how
    assert set(found.paths) == set(paths)
