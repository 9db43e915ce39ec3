"""Outputs in the order in which classes were added, and heads that grow as they are.

The oracle is the same network with its outputs in the order of the labels, or with all of them from
the start, which a launch has always taken.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from daskcurv.cli import main
from daskcurv.errors import ConfigError, DataError
from daskcurv.experiment.outputs import in_label_order
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.measures import MEASURES
from daskcurv.runs.inputs import experiment_of
from daskcurv.runs.options import launch_options
from daskcurv.storage import ResultsStore
from daskcurv.storage.read import open_results
from daskcurv.storage.schema import COMPUTED

CLASSES, SAMPLES, SIZE = 6, 36, 8
ORDER = (4, 0, 5, 2, 1, 3)
MEASURE_NAMES = [measure.name for measure in MEASURES]
LABELS = np.arange(SAMPLES) % CLASSES
EPOCHS = {2: 2, 4: 4, 6: 6}
"""Active classes by epoch."""

NET = """
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

class Net(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(20, classes)

    def forward(self, images):
        return self.fc(self.body(images).flatten(1))

class Scaled(Net):
    def forward(self, images):
        return 2.0 * super().forward(images)

def net(classes):
    return Net(classes)

def scaled(classes):
    return Scaled(classes)
"""


def weights_of(epoch: int) -> dict[str, Tensor]:
    """Return the weights of an epoch, the outputs in the order of the labels."""
    torch.manual_seed(epoch)
    body = nn.Conv2d(3, 5, 3, padding=1)
    fc = nn.Linear(20, CLASSES)
    nn.init.normal_(fc.weight)
    named = {"body.0": body, "fc": fc}
    return {f"{name}.{k}": v for name, part in named.items() for k, v in part.state_dict().items()}


def permuted(weights: dict[str, Tensor], number: int = CLASSES) -> dict[str, Tensor]:
    """Return the weights with the first outputs in the order of additions."""
    rows = list(ORDER[:number])
    return {k: v[rows].clone() if k.startswith("fc") else v for k, v in weights.items()}


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "net.py").write_text(NET)
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 200, (SAMPLES, 1, 1, 3))
    images = (colours + generator.integers(0, 56, (SAMPLES, SIZE, SIZE, 3))).astype(np.uint8)
    np.savez("set.npz", images=images, labels=LABELS)
    np.save("order.npy", np.array(ORDER))
    for name in ("labels", "order", "grown"):
        Path(name).mkdir()
    for epoch, number in EPOCHS.items():
        weights = weights_of(epoch)
        torch.save(weights, f"labels/{epoch}.pt")
        torch.save(permuted(weights), f"order/{epoch}.pt")
        torch.save(permuted(weights, number), f"grown/{epoch}.pt")
    return tmp_path


def given(weights: str, **changed: Any) -> dict[str, Any]:
    """Return the options of a run."""
    return {
        "checkpoints": f"{weights}/{{epoch}}.pt", "model": "net.py:net",
        "model_args": f'{{"classes": {CLASSES}}}', "data_path": Path("set.npz"),
        "mean": "0.5,0.5,0.5", "std": "0.2,0.2,0.2", "class_order": Path("order.npy"),
        "task_sizes": "2,2,2", "task_epochs": 2, "class_partition": "trained", "n_probes": 2,
        "batch_size": 8, "workers": 1, "device": "cpu", "precision": "float32",
        "method": "finite-difference", **changed,
    }  # fmt: skip


def command(verb: str, weights: str, **changed: Any) -> int:
    words = [word for k, v in given(weights, **changed).items() for word in (f"--{k}", str(v))]
    return main([verb, *words, "--no_export"])


def scores(weights: str, epoch: int, **changed: Any) -> dict[str, np.ndarray]:
    """Return the results of the samples of active classes, computed in this process."""
    experiment = experiment_of(launch_options(given(weights, **changed)))
    ids = np.flatnonzero(experiment.active(epoch))
    assert len(ids) == SAMPLES * EPOCHS[epoch] // CLASSES
    found = experiment.scorer(epoch, batch_size=8).score(*experiment.dataset.inputs(ids))
    return {name: found[name] for name in MEASURE_NAMES}


def assert_same(found: Any, expected: Any, names: Any) -> None:
    for name in names:
        np.testing.assert_array_equal(found[name], expected[name], err_msg=name)


def test_a_run_with_outputs_in_the_order_of_additions_has_the_same_bits(directory, capsys):
    assert command("launch", "order", store="order.zarr", outputs="class_order") == 0
    order = open_results("order.zarr", incomplete="raise").load()
    for epoch in EPOCHS:
        row = order.sel(epoch=epoch).isel(sample=order.status.sel(epoch=epoch).values == COMPUTED)
        names = [name for name in row.data_vars if name in MEASURE_NAMES]
        assert {"curvature", "prediction"} < set(names)
        expected = scores("labels", epoch)
        for name in names:
            wanted = expected[name].astype(row[name].dtype)
            np.testing.assert_array_equal(row[name].values, wanted, err_msg=name)
    identity = experiment_of(launch_options(given("labels"))).identity()
    assert "outputs" not in identity
    stored = ResultsStore.open(Path("order.zarr")).identity
    assert stored == {**identity, "outputs": "class_order"}
    capsys.readouterr()
    assert command("launch", "order", store="order.zarr") == 2
    assert 'outputs: the store has "class_order", this run has nothing' in capsys.readouterr().err


@pytest.mark.parametrize("head", ["all", "active"])
@pytest.mark.parametrize("method", ["finite-difference", "difference-propagation", "zeroth-order"])
@pytest.mark.parametrize("epoch", [2, 6])
def test_every_method_gives_the_same_bits(directory, head, method, epoch):
    expected = scores("labels", epoch, head=head, method=method)
    found = scores("order", epoch, head=head, method=method, outputs="class_order")
    assert_same(found, expected, expected)
    assert len(set(expected["prediction"])) > 1


def test_outputs_that_no_linear_layer_gives_are_reordered_too(directory):
    chosen = {"model": "net.py:scaled", "method": "difference-propagation"}
    expected = scores("labels", 6, **chosen)
    found = scores("order", 6, **chosen, outputs="class_order")
    np.testing.assert_array_equal(found["prediction"], expected["prediction"])
    for name in ("loss", "grad_norm", "curvature"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("method", ["finite-difference", "difference-propagation"])
@pytest.mark.parametrize("epoch", EPOCHS)
def test_a_head_that_grows_gives_the_bits_of_a_whole_one_of_which_a_part_is_active(
    directory, method, epoch
):
    chosen = {"head": "active", "method": method}
    expected = scores("labels", epoch, **chosen)
    assert_same(scores("grown", epoch, **chosen, outputs="class_order"), expected, expected)


def test_a_run_whose_head_grows_is_computed_and_verified(directory):
    assert command(
        "launch", "grown", store="grown.zarr", head="active", outputs="class_order"
    ) == 0  # fmt: skip
    origin = ("--checkpoints", "grown/{epoch}.pt", "--recompute", "6", "--data_path", "set.npz")
    assert main(["verify", "grown.zarr", *origin, "--model", "net.py:net"]) == 0


def test_the_documented_network_may_grow(directory, capsys):
    """As many outputs as the data set has classes."""
    for epoch, number in EPOCHS.items():
        weights = ModelSpec(CLASSES, width=2).build().state_dict()
        torch.save(weights, f"labels/{epoch}.pt")
        torch.save(permuted(weights, number), f"grown/{epoch}.pt")
    chosen = {"model": "resnet18-lop", "model_args": None, "head": "active"}
    expected = scores("labels", 4, **chosen)
    assert_same(scores("grown", 4, **chosen, outputs="class_order"), expected, expected)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "has 2 of the network's 6 outputs; if outputs were added during training, add --head"),
        ({"head": "active"}, "cannot be those of the active classes 0, 4 if output j is class j"),
        (
            {"head": "active", "class_partition": "entering"},
            "has 2 of the network's 6 outputs, but 4 classes are active at epoch 2",
        ),
        ({"model_args": '{"classes": 4}'}, "one entry for each output of the network"),
    ],
)
def test_a_head_that_does_not_fit_the_schedule_is_refused(directory, capsys, changed, said):
    assert command("launch", "grown", store="c.zarr", **changed) == 2
    assert said in capsys.readouterr().err
    assert not Path("c.zarr").exists()


def test_what_is_missing_is_named(directory):
    chosen = {"class_order": None, "task_sizes": None, "task_epochs": None}
    with pytest.raises(ConfigError, match=r"name its file with --class_order FILE.npy"):
        experiment_of(launch_options(given("order", **chosen, outputs="class_order")))
    with pytest.raises(DataError, match="give the network all of them"):
        experiment_of(launch_options(given("grown", **chosen, model_args='{"classes": 4}')))


class Tied(nn.Module):
    """A network that uses its last layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.fc(self.fc(images.flatten(1)).relu())
        return logits


@pytest.mark.parametrize(
    "network",
    [
        Tied(),
        nn.Sequential(nn.Flatten(), nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.LogSoftmax(1)),
        nn.Sequential(nn.Flatten(), nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4)),
    ],
)
def test_logits_are_in_the_order_of_the_labels_whatever_the_last_layer(network):
    image, order = torch.arange(4.0).view(1, 1, 2, 2), (2, 0, 3, 1)
    before = network.eval()(image)[0]
    after = in_label_order(network, order, image)(image)[0]
    for place, label in enumerate(order):
        torch.testing.assert_close(after[label], before[place])
