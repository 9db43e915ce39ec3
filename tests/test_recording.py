"""Weights that a training loop keeps are found, whole, and those of the network."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import daskcurv
from daskcurv.errors import ConfigError
from daskcurv.experiment.naming import Naming
from daskcurv.experiment.search import find
from daskcurv.experiment.weight_files import read_state_dict


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.ones(2, 2).t()[:, :1])


def same(path: Path, model: nn.Module) -> None:
    weights, _ = read_state_dict(path)
    expected = model.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "wrap",
    [lambda m: m, nn.DataParallel, torch.compile, lambda m: torch.compile(nn.DataParallel(m))],
    ids=["bare", "DataParallel", "compiled", "both"],
)
def test_what_is_kept_are_the_weights_of_the_network_itself(tmp_path, wrap):
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten())
    for epoch in (0, 3, 12):
        path = daskcurv.keep(wrap(model), tmp_path / "run", epoch)
        assert path == tmp_path / f"run/epoch-{epoch}.safetensors"
        same(path, model)
    found = find(*Naming.of(str(tmp_path / "run/epoch-{epoch}.safetensors")))
    assert list(found) == [0, 3, 12]
    assert len(list((tmp_path / "run").iterdir())) == 3


def test_tied_and_strided_weights_can_be_kept(tmp_path):
    model = Tied()
    same(daskcurv.keep(model, tmp_path, 1), model)


def test_a_network_with_a_part_called_module_is_kept_whole(tmp_path):
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    same(daskcurv.keep(model, tmp_path, 1), model)


def test_training_goes_on_as_before(tmp_path):
    model = nn.Linear(2, 2).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    daskcurv.keep(model, tmp_path, 0)
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("epoch", [-1, 1.5, True, "3"])
def test_an_epoch_that_is_no_number_is_refused(tmp_path, epoch):
    with pytest.raises(ConfigError, match="expected a whole number from 0"):
        daskcurv.keep(nn.Linear(1, 1), tmp_path, epoch)
