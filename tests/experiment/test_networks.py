"""Networks by the names that a user gives them."""

from __future__ import annotations

import json
import pickle
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision

from daskcurv.config import EstimatorConfig
from daskcurv.errors import ConfigError
from daskcurv.experiment.curriculum import Curriculum
from daskcurv.experiment.data import Arrays
from daskcurv.experiment.experiment import Experiment
from daskcurv.experiment.networks import Factory, network_of
from daskcurv.experiment.schedules import Steps

IMAGE = torch.zeros(1, 3, 32, 32)

FILE = """
from dataclasses import dataclass
import torch
from torch import nn

@dataclass
class Sizes:
    hidden: int = 8

def net(classes=10, hidden=Sizes().hidden):
    head = nn.Linear(hidden, classes)
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, hidden), nn.ReLU(), head)

class Pair(nn.Module):
    def forward(self, images):
        return images.mean((2, 3)), images

def pixels():
    return nn.Identity()

def wrong():
    return 3
"""


def named(name: str, arguments: dict[str, Any], image: torch.Tensor = IMAGE) -> Factory:
    return Factory.named(name, arguments, image)[0]


@pytest.fixture
def net(tmp_path: Path) -> Path:
    path = tmp_path / "net.py"
    path.write_text(FILE)
    return path


def test_a_network_of_torchvision(tmp_path):
    network = named("torchvision:resnet18", {"num_classes": 7}, IMAGE)
    assert (network.factory, network.num_classes) == ("torchvision.models:resnet18", 7)
    built, expected = network.build(), torchvision.models.resnet18(num_classes=7)
    assert built.state_dict().keys() == expected.state_dict().keys()
    assert network_of(json.loads(json.dumps(network.to_dict()))) == network


def test_a_network_of_an_importable_module():
    name = "tests.experiment.test_seams:vgg"
    network = named(name, {"widths": [4, 8], "channels": 3}, IMAGE)
    assert network.num_classes == 4


def test_a_network_of_a_file_can_be_moved_and_sent(net, tmp_path):
    network = named(f"{net}:net", {"classes": 5}, IMAGE)
    assert (network.factory, network.num_classes) == ("net.py:net", 5)
    assert "directory" not in network.to_dict()
    assert str(tmp_path) not in json.dumps(network.to_dict())
    assert pickle.loads(pickle.dumps(network)).build()[1].out_features == 8
    (tmp_path / "elsewhere").mkdir()
    moved = net.rename(tmp_path / "elsewhere" / "net.py")
    assert named(f"{moved}:net", {"classes": 5}, IMAGE) == network
    recorded = network_of(network.to_dict())
    with pytest.raises(ConfigError, match=r"name it with --model PATH/net.py:net"):
        recorded.build()


def test_a_file_that_has_changed_is_refused(net):
    network = named(f"{net}:net", {}, IMAGE)
    net.write_text(FILE.replace("nn.ReLU()", "nn.Tanh()"))
    with pytest.raises(ConfigError, match="it has changed"):
        network.build()


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("resnet", {}, "model is 'resnet'; expected resnet18-lop, torchvision:NAME"),
        ("torchvision:resnet17", {}, "'resnet17'; did you mean resnet18?"),
        ("nowhere.at_all:net", {}, "nowhere.at_all:net cannot be imported"),
        ("net.py:absent", {}, "net.py has no absent"),
        ("net.py:nets", {}, "'nets'; did you mean net?"),
        ("other.py:net", {}, "other.py does not exist; check --model"),
        ("bad.py:net", {}, "bad.py cannot be imported: ModuleNotFoundError: No module named 'nor"),
        ("net.py:net", {"widths": 3}, "unexpected keyword argument 'widths'. Set them with --mode"),
        ("net.py:wrong", {}, "returned a int; expected a torch.nn.Module"),
        (
            "net.py:Pair",
            {},
            "returns tuple for one image; expected logits of shape (1, C)",
        ),
        ("net.py:pixels", {}, "returns (1, 3, 32, 32) for one image; expected logits"),
    ],
)
def test_what_is_no_network_is_refused_with_what_would_help(net, name, arguments, said):
    (net.parent / "bad.py").write_text("import nor_this")
    place = f"{net.parent}/" if ".py:" in name else ""
    with pytest.raises(ConfigError, match=re.escape(said)):
        named(place + name, arguments, IMAGE)


def test_a_file_that_is_named_as_a_module_is_suggested(net, monkeypatch):
    monkeypatch.chdir(net.parent)
    net.rename("own_network.py")
    with pytest.raises(ConfigError, match=r"is meant, write own_network.py:net$"):
        named("own_network:net", {})


def test_a_network_for_other_images_is_refused(net):
    with pytest.raises(ConfigError, match=r"fails on an image of shape \(3, 28, 28\)"):
        named(f"{net}:net", {}, torch.zeros(1, 3, 28, 28))


def test_the_number_of_outputs_is_compared_with_what_the_network_gives(net):
    network = named(f"{net}:net", {"classes": 5}, IMAGE)
    images = np.zeros((2, 3, 32, 32), np.uint8)
    experiment = Experiment(
        dataset=Arrays(images, np.arange(2), mean=(0.5,) * 3, std=(0.2,) * 3),
        checkpoints={},
        network=replace(network, num_classes=4),
        curriculum=Curriculum((0, 1, 2, 3), Steps((0,), (4,))),
        estimator=EstimatorConfig(),
    )
    with pytest.raises(ConfigError, match="it has 5 outputs for an image, not the 4 that are"):
        experiment.check()
