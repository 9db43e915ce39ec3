"""Networks as graphs, with normalisation folded into convolutions."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.module import _has_any_global_hook

from daskcurv.errors import ConfigError
from daskcurv.estimators.logits import relative_error

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)

_TOLERANCE = 1e-3


class UnsupportedError(ConfigError):
    """A network cannot be taken apart as a method needs; the text names the module."""


def trace(model: nn.Module, example: Tensor) -> fx.GraphModule:
    """Return the graph of a network in eval mode, batch normalisation folded into convolutions.

    The model is left as it is; modules that did not change are shared with it.

    Parameters
    ----------
    model : nn.Module
    example : Tensor, shape (N, *input)
        Some samples, by which the graph is checked against the network.

    Raises
    ------
    UnsupportedError
        If the network does something that depends on the values of its input, or that a graph does
        not record, such as gradients of its own making.
    """
    name = type(model).__name__
    if not has_own_forward(model):
        raise UnsupportedError(f"{name} cannot be traced: it has hooks or a replaced forward")
    try:
        traced = fx.symbolic_trace(_own_objects(model))
        # Before folding: the operations then are the same, and rounding plays no part.
        agrees = _same_function(model, traced, example)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        # The model's own code can fail in any way when handed something else than a tensor.
        raise UnsupportedError(f"{name} cannot be traced: {first_line(error)}") from error
    if not agrees:
        raise UnsupportedError(f"{name} cannot be traced: its graph has different gradients")
    _fold(traced)
    folded, expected = (network(example.clone()).detach() for network in (traced, model))
    if relative_error(folded, expected) > _TOLERANCE:
        raise UnsupportedError(f"{name} has different logits with its normalisation folded")
    return traced


def some(images: Tensor) -> Tensor:
    """Return two samples to trace with; one would hide what mixes samples."""
    return images[:2] if len(images) > 1 else images.repeat(2, *[1] * (images.ndim - 1))


def _same_function(model: nn.Module, traced: nn.Module, example: Tensor) -> bool:
    """Return whether values and gradients agree, but for what a device does not repeat."""
    results = []
    for network in (model, traced):
        point = example.detach().requires_grad_(True)
        with torch.enable_grad():
            output = network(point.clone())  # it may change its input in place
        weights = torch.arange(output.numel(), device=output.device).sin().view_as(output)
        results.append((output.detach(), *torch.autograd.grad(output, point, weights)))
    return all(
        bool((theirs - ours).norm() <= _TOLERANCE * theirs.norm())
        for theirs, ours in zip(*results, strict=True)
    )


def _fold(traced: fx.GraphModule) -> None:
    modules: dict[str, Any] = dict(traced.named_modules())
    for node in traced.graph.nodes:
        users = list(node.users)
        if len(users) != 1 or node.op != "call_module" or users[0].op != "call_module":
            continue
        convolution, norm = modules[node.target], modules[users[0].target]
        if is_plain(convolution, *CONVOLUTIONS) and has_fixed_statistics(norm):
            name = f"folded_{node.name}"
            traced.add_submodule(name, _folded(convolution, norm))
            node.target = name
            users[0].replace_all_uses_with(node)
            traced.graph.erase_node(users[0])
    traced.recompile()


def folded(model: nn.Module, example: Tensor) -> nn.Module:
    """Return the network with batch normalisation folded, or as it is if it cannot be traced."""
    try:
        return trace(model, example)
    except UnsupportedError:
        return model


def has_fixed_statistics(module: Any) -> bool:
    """Return whether this is a batch normalisation that is affine in its present mode."""
    return is_plain(module, *NORMS) and not module.training and module.running_mean is not None


def is_plain(module: nn.Module, *types: type[nn.Module]) -> bool:
    """Return whether a module is exactly of one of some types, and computes what that type does.

    A subclass can compute something else; so can hooks, parametrizations (which are subclasses) and
    a replaced ``forward``.
    """
    return type(module) in types and has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Return whether calling a module runs its class's ``forward``, and that alone."""
    hooks = (
        module._forward_hooks,
        module._forward_pre_hooks,
        module._backward_hooks,
        module._backward_pre_hooks,
    )
    return not (any(hooks) or "forward" in vars(module) or _has_any_global_hook())


def first_line(error: Exception) -> str:
    """Return the first line of an error's text, with its type where that says more."""
    text = (str(error).strip() or repr(error)).splitlines()[0]
    return text if isinstance(error, ConfigError) else f"{type(error).__name__}: {text}"


def _own_objects(model: nn.Module) -> nn.Module:
    """Return a copy with the same tensors.

    A network that keeps something of its input on itself would be left with a tracer's stand-ins.
    """
    tensors = (*model.parameters(), *model.buffers())
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def scale_and_shift(norm: Any) -> tuple[Tensor, Tensor]:
    """Return what an eval-mode batch normalisation multiplies by and adds, in float64, (C,)."""
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    shift = -norm.running_mean.double() * scale
    return scale, shift if norm.bias is None else shift + norm.bias.double()


def _folded(convolution: Any, norm: nn.Module) -> nn.Module:
    # In float64, so that the weights are rounded once.
    scale, shift = scale_and_shift(norm)
    weight = convolution.weight.double() * scale.reshape(-1, *[1] * (convolution.weight.ndim - 1))
    if convolution.bias is not None:
        shift = shift + convolution.bias.double() * scale
    folded: nn.Module = copy.copy(convolution)
    folded._parameters = {
        name: nn.Parameter(value.detach().to(convolution.weight.dtype), requires_grad=False)
        for name, value in (("weight", weight), ("bias", shift))
    }
    return folded
