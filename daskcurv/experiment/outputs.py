"""Which class each output of a network stands for, where that is not the class of its number.

Class-incremental training code numbers classes anew in the order in which they arrive, and often
adds outputs to the network as they do. Here every network has its outputs in the order of the
labels, and as many of them at each epoch; this module makes such a network of one that has not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Reordered(nn.Module):
    """A network whose outputs are taken in another order.

    Parameters
    ----------
    network : nn.Module
        Returns logits of shape (N, C).
    taken : Tensor of int64, shape (C,)
        Which of its outputs each output is.
    """

    taken: Tensor

    def __init__(self, network: nn.Module, taken: Tensor):
        super().__init__()
        self.network = network
        self.register_buffer("taken", taken)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits in the new order, shape (N, C)."""
        logits: Tensor = self.network(images)[:, self.taken]
        return logits


def in_label_order(network: nn.Module, order: Sequence[int], image: Tensor) -> nn.Module:
    """Return a network with its outputs in the order of the labels.

    If its last layer is linear, the rows of that layer are put in order, so that sums over the
    outputs are taken in the order of the labels too: every bit of the results is that of a network
    which was trained so. Otherwise the outputs are.

    Parameters
    ----------
    network : nn.Module
        Output j is the class ``order[j]``. Changed, and put in eval mode.
    order : sequence of int
        All classes.
    image : Tensor of float32, shape (1, ...)
        A normalised image, to find the last layer with.
    """
    taken = torch.tensor(order).argsort()
    name = _last_layer(network.eval(), image)
    if not name:
        return Reordered(network, taken)
    last = network.get_submodule(name)
    with torch.no_grad():
        for parameter in last.parameters():
            parameter.copy_(parameter[taken])
    return network


def _last_layer(network: nn.Module, image: Tensor) -> str:
    """Return the name of the linear layer whose result is the network's; empty if there is none."""
    results: dict[str, list[Tensor]] = {}

    def note(name: str) -> torch.utils.hooks.RemovableHandle:
        def hook(module: nn.Module, inputs: object, result: Tensor) -> None:
            results.setdefault(name, []).append(result)

        return network.get_submodule(name).register_forward_hook(hook)

    # What computes its weights anew at each call (weight normalisation) is of another type, or has
    # a hook; a layer or a weight that is used twice is needed as it is elsewhere.
    uses: dict[int, int] = {}
    for module in network.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    plain = [
        name
        for name, module in network.named_modules()
        if name
        and type(module) is nn.Linear
        and not module._forward_pre_hooks
        and not module._forward_hooks
        and all(uses[id(parameter)] == 1 for parameter in module.parameters())
    ]
    handles = [note(name) for name in plain]
    try:
        with torch.no_grad():
            logits = network(image)
    finally:
        for handle in handles:
            handle.remove()
    return next((n for n, found in results.items() if len(found) == 1 and found[0] is logits), "")


def rows_of_head(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_classes: int
) -> int:
    """Return how many outputs weights have, fewer than the network if all else fits.

    Parameters
    ----------
    weights, expected : mapping of Tensor
        What a file has, and what the network has.
    num_classes : int
        Outputs of the network.
    """
    rows = set()
    for key, value in expected.items():
        if key not in weights or weights[key].shape == value.shape:
            continue
        found = weights[key]
        if not found.ndim or found.shape[1:] != value.shape[1:] or len(value) != num_classes:
            return num_classes
        rows.add(len(found))
    if len(rows) == 1 and 0 < (number := rows.pop()) < num_classes:
        return number
    return num_classes


def widened(
    weights: Mapping[str, Tensor], expected: Mapping[str, Tensor], num_classes: int
) -> dict[str, Tensor]:
    """Return weights with as many outputs as the network has.

    Outputs that are not there yet are copies of the last one, whose values are as usual as any, so
    that nothing overflows in what no loss looks at.
    """
    number = rows_of_head(weights, expected, num_classes)
    if number == num_classes:
        return dict(weights)
    rows = torch.arange(num_classes).clamp(max=number - 1)
    return {
        key: value[rows] if key in expected and value.shape != expected[key].shape else value
        for key, value in weights.items()
    }
