"""The network has the checkpoints' parameter names and shapes, and computes a ResNet-18.

The names, shapes and number of parameters are written out here by hand. What it computes is
compared with torchvision's ResNet-18, which shares no code with it.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

from daskcurv.experiment.resnet18 import ModelSpec
from tests.support.builders import make_model

CONV = ("weight", "bias")
NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
BLOCKS = [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
DOWNSAMPLED = ["layer2.0", "layer3.0", "layer4.0"]


def documented_keys() -> set[str]:
    parts = {"conv1": CONV, "bn1": NORM, "fc": CONV}
    for block in BLOCKS:
        parts |= {f"{block}.conv1": CONV, f"{block}.bn1": NORM}
        parts |= {f"{block}.conv2": CONV, f"{block}.bn2": NORM}
    for block in DOWNSAMPLED:
        parts |= {f"{block}.downsample.0": CONV, f"{block}.downsample.1": NORM}
    return {f"{part}.{name}" for part, names in parts.items() for name in names}


@pytest.fixture(scope="module")
def standard():
    return make_model(ModelSpec())


def test_state_dict_has_exactly_the_documented_names(standard):
    assert set(standard.state_dict()) == documented_keys()


def test_every_convolution_has_a_bias(standard):
    convolutions = [m for m in standard.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == 20
    assert all(m.bias is not None for m in convolutions)


def test_parameters_have_the_documented_shapes(standard):
    expected = {
        "conv1.weight": (64, 3, 3, 3),
        "conv1.bias": (64,),
        "bn1.weight": (64,),
        "layer1.0.conv1.weight": (64, 64, 3, 3),
        "layer2.0.conv1.weight": (128, 64, 3, 3),
        "layer2.0.conv2.weight": (128, 128, 3, 3),
        "layer2.0.downsample.0.weight": (128, 64, 1, 1),
        "layer3.0.downsample.0.weight": (256, 128, 1, 1),
        "layer4.0.downsample.0.weight": (512, 256, 1, 1),
        "layer4.0.downsample.0.bias": (512,),
        "layer4.0.downsample.1.running_var": (512,),
        "layer4.1.conv2.weight": (512, 512, 3, 3),
        "layer4.1.bn2.bias": (512,),
        "fc.weight": (100, 512),
        "fc.bias": (100,),
    }
    state = standard.state_dict()
    assert {name: tuple(state[name].shape) for name in expected} == expected


def test_there_are_11_2_million_parameters(standard):
    def conv(inputs: int, outputs: int, size: int) -> int:
        return inputs * outputs * size * size + outputs + 2 * outputs  # with its batch norm

    expected = conv(3, 64, 3) + 4 * conv(64, 64, 3)
    for inputs, outputs in ((64, 128), (128, 256), (256, 512)):
        expected += conv(inputs, outputs, 3) + 3 * conv(outputs, outputs, 3)
        expected += conv(inputs, outputs, 1)
    expected += 512 * 100 + 100
    assert sum(p.numel() for p in standard.parameters()) == expected
    assert round(expected / 1e6, 1) == 11.2


def test_without_normalisation_only_the_batch_norms_names_are_gone():
    keys = set(ModelSpec(width=4, norm="identity").build().state_dict())
    norms = {key for key in documented_keys() if "bn" in key or "downsample.1" in key}
    assert keys == documented_keys() - norms
    assert {f"{block}.downsample.0.weight" for block in DOWNSAMPLED} <= keys


@pytest.mark.parametrize("norm", ["batch", "identity"])
@pytest.mark.parametrize(("width", "num_classes"), [(1, 2), (4, 10), (6, 100), (16, 1)])
def test_spec_is_recognised_from_a_state_dict(width, num_classes, norm):
    spec = ModelSpec(num_classes=num_classes, width=width, norm=norm)
    state = spec.build().state_dict()
    assert ModelSpec.infer(state) == spec
    ModelSpec.infer(state).build().load_state_dict(state, strict=True)


@pytest.mark.parametrize("stem", [torch.zeros(()), torch.zeros(0, 3, 3, 3)])
@pytest.mark.parametrize("head", [torch.zeros(()), torch.zeros(0, 512)])
def test_shapes_that_no_network_has_leave_the_standard_to_be_compared_with(stem, head):
    state = {"conv1.weight": stem, "fc.weight": head, "bn1.weight": torch.zeros(64)}
    assert ModelSpec.infer(state) == ModelSpec()


def test_standard_spec_is_recognised(standard):
    assert ModelSpec.infer(standard.state_dict()) == ModelSpec()


def test_logits_are_those_of_torchvisions_resnet18(standard):
    state = {name: value.double() for name, value in standard.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name in state:
        if name.endswith((".downsample.0.bias", "conv1.bias", "conv2.bias")):
            state[name] = torch.randn(state[name].shape, generator=generator).double() / 5
    ours = ModelSpec().build().double().eval()
    ours.load_state_dict(state)

    theirs = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=100).double().eval()
    theirs.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
    theirs.maxpool = nn.Identity()
    # torchvision's convolutions have no bias. Each is followed by a batch norm, which subtracts
    # its running mean: taking the bias off the mean adds it to the convolution.
    for name in [name for name in state if "conv" in name or "downsample.0" in name]:
        if name.endswith("bias"):
            norm = name.replace("conv", "bn").replace("downsample.0", "downsample.1")
            mean = norm.replace("bias", "running_mean")
            state[mean] = state[mean] - state.pop(name)
    theirs.load_state_dict(state, strict=True)

    images = torch.randn(2, 3, 32, 32, generator=generator).double()
    with torch.no_grad():
        expected = theirs(images)
        torch.testing.assert_close(ours(images), expected, rtol=1e-9, atol=1e-9)
        single = ours.float()(images.float()).double()
    assert (single - expected).abs().max() <= 1e-5 * expected.abs().max()
