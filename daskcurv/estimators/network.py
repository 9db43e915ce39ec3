"""A network as a list of layers that differences can be propagated through."""

from __future__ import annotations

import copy
import operator
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from daskcurv.estimators.kernels import Kernels, total
from daskcurv.estimators.layers import (
    Affine,
    Layer,
    Linear,
    MaxPool,
    Parts,
    Pointwise,
    Rectifier,
    Shift,
)
from daskcurv.estimators.tracing import (
    CONVOLUTIONS,
    UnsupportedError,
    has_fixed_statistics,
    scale_and_shift,
    trace,
)

_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_POOLS = (
    nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
)  # fmt: skip
_POINTWISE = (
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU,
    nn.LogSigmoid, nn.Mish, nn.ReLU6, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Softsign,
    nn.Tanh,
)  # fmt: skip

_RECTIFY: set[Any] = {F.relu, F.relu_, torch.relu, torch.relu_, "relu", "relu_"}
_NO_CHANGE: set[Any] = {"clone", "contiguous"}
_DROPOUT: set[Any] = {F.alpha_dropout, F.dropout, F.dropout1d, F.dropout2d, F.dropout3d}
_RESHAPE: set[Any] = {
    torch.flatten, torch.reshape, torch.squeeze, torch.unsqueeze,
    "flatten", "reshape", "squeeze", "unsqueeze", "view",
}  # fmt: skip
_LINEAR: set[Any] = {
    torch.mean, torch.sum, torch.neg, operator.neg, torch.permute, torch.transpose,
    F.avg_pool1d, F.avg_pool2d, F.avg_pool3d,
    F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d,
    "mean", "sum", "neg", "permute", "transpose",
}  # fmt: skip
_POINTWISE_FUNCTIONS: set[Any] = {
    F.celu, F.elu, F.gelu, F.hardsigmoid, F.hardswish, F.hardtanh, F.leaky_relu, F.logsigmoid,
    F.mish, F.relu6, F.selu, F.silu, F.softplus, F.softsign, F.tanh, F.sigmoid, torch.tanh,
    torch.sigmoid, torch.exp, torch.sin, torch.cos, torch.erf, "tanh", "sigmoid",
}  # fmt: skip
_ARITHMETIC: dict[Any, str] = {
    **dict.fromkeys((operator.add, operator.iadd, torch.add, "add", "add_"), "+"),
    **dict.fromkeys((operator.sub, operator.isub, torch.sub, "sub", "sub_"), "-"),
    **dict.fromkeys((operator.mul, operator.imul, torch.mul, "mul", "mul_"), "*"),
    **dict.fromkeys((operator.truediv, operator.itruediv, torch.div, "div", "div_"), "/"),
}


@dataclass(frozen=True)
class _Step:
    """A layer, and the steps whose sum it reads."""

    name: str
    layer: Layer
    terms: tuple[str, ...]


class Network:
    """A network in eval mode, taken apart.

    Parameters
    ----------
    model : nn.Module
        In eval mode, in the dtype of the clean pass.
    example : Tensor, shape (N, *input)
        Two or more samples, in the model's dtype and on its device.
    h : float
        Step of the finite difference.
    dtype : torch.dtype
        Of the differences.
    kernels : Kernels

    Raises
    ------
    UnsupportedError
        Naming the module or function that there is no rule for.
    """

    def __init__(
        self, model: nn.Module, example: Tensor, h: float, dtype: torch.dtype, kernels: Kernels
    ):
        builder = _Builder(model, example, h, dtype, kernels)
        self._input, self._output = builder.build()
        self._steps = builder.steps

    def clean(self, images: Tensor) -> Tensor:
        """Return the logits (N, C) of images (N, *input)."""
        return self._through("clean", images)

    def clean_gradient(self, gradient: Tensor) -> Tensor:
        """Return the input gradient (N, *input), given that of the logits (N, C)."""
        return self._back_through("clean_gradient", gradient)

    def forward(self, delta: Tensor) -> Tensor:
        """Return the differences of the logits (P N, C), given those of the input."""
        return self._through("forward", delta)

    def backward(self, gamma: Tensor) -> Tensor:
        """Return the input's gradient differences (P N, *input), given those of the logits."""
        return self._back_through("backward", gamma)

    def _through(self, how: str, values: Tensor) -> Tensor:
        known = {self._input: values}
        for step in self._steps:
            known[step.name] = getattr(step.layer, how)([known[name] for name in step.terms])
        return total([known[name] for name in self._output])

    def _back_through(self, how: str, gradient: Tensor) -> Tensor:
        known: defaultdict[str, Parts] = defaultdict(list)
        for name in self._output:
            known[name].append(gradient)
        for step in reversed(self._steps):
            # A step that does not lead to the output has no gradient.
            if parts := known.pop(step.name, None):
                result = getattr(step.layer, how)(parts)
                for name in step.terms:
                    known[name].append(result)
        return total(known[self._input])


class _Builder:
    """Turns the traced graph of a model into steps."""

    def __init__(
        self, model: nn.Module, example: Tensor, h: float, dtype: torch.dtype, kernels: Kernels
    ):
        self.steps: list[_Step] = []
        self._h, self._dtype, self._kernels = h, dtype, kernels
        traced = trace(model, example)
        # Leaves the values of all nodes: shapes, and what does not depend on the input.
        run = fx.Interpreter(traced, garbage_collect_values=False)
        with torch.no_grad():
            run.run(example)
        self._nodes = list(traced.graph.nodes)
        self._values = run.env
        self._modules: dict[str, Any] = dict(traced.named_modules())
        self._samples = len(example)
        # The steps whose sum a node is. A node without any does not depend on the input.
        self._terms: dict[fx.Node, tuple[str, ...]] = {}

    def build(self) -> tuple[str, tuple[str, ...]]:
        """Fill `steps`; return the name of the input, and those whose sum is the output."""
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        result = self._nodes[-1].args[0]
        if len(inputs) != 1 or not isinstance(result, fx.Node):
            raise UnsupportedError("the network is not a function from one tensor to one tensor")
        self._terms[inputs[0]] = (inputs[0].name,)
        for node in self._nodes[1:-1]:
            value = self._values[node]
            depends = any(source in self._terms for source in node.all_input_nodes)
            if node in self._terms or not depends or not isinstance(value, Tensor):
                continue
            if len(value) != self._samples:
                raise UnsupportedError(f"{self._described(node)} mixes samples")
            rule = self._module if node.op == "call_module" else self._function
            if not rule(node):
                raise UnsupportedError(f"there is no rule for {self._described(node)}")
        return inputs[0].name, self._terms[result]

    def _described(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"module {node.target} ({type(self._modules[str(node.target)]).__name__})"
        return f"{node.op.removeprefix('call_')} {getattr(node.target, '__name__', node.target)}"

    def _emit(self, node: fx.Node, layer: Layer, terms: tuple[str, ...] = ()) -> bool:
        """Add a step that computes `node`, by default from what its first input is."""
        name = f"{len(self.steps)} {node.name}"
        self.steps.append(_Step(name, layer, terms or self._first(node)))
        self._terms[node] = (name,)
        return True

    def _alias(self, node: fx.Node) -> bool:
        self._terms[node] = self._first(node)
        return True

    def _first(self, node: fx.Node) -> tuple[str, ...]:
        return next(self._terms[n] for n in node.all_input_nodes if n in self._terms)

    # A rule returns whether it applies; if it does, the node has its step.

    def _module(self, node: fx.Node) -> bool:
        module = self._modules[str(node.target)]
        if isinstance(module, (*CONVOLUTIONS, nn.Linear)):
            return self._affine(node, module)
        if has_fixed_statistics(module):
            return self._norm(node, module)
        if isinstance(module, nn.ReLU):
            return self._rectifier(node)
        if isinstance(module, _POINTWISE):
            return self._pointwise(node, _out_of_place(module))
        if isinstance(module, nn.MaxPool2d):
            return self._max_pool(node, _returning_positions(module))
        if isinstance(module, _POOLS):
            return self._emit(node, Linear(module))
        if isinstance(module, nn.Flatten):
            return self._reshape(node)
        return isinstance(module, _NOTHING) and self._alias(node)

    def _function(self, node: fx.Node) -> bool:
        target: Any = node.target
        if target in _RECTIFY:
            return self._rectifier(node)
        if target in _POINTWISE_FUNCTIONS:
            return self._pointwise(node, self._bound(node, drop="inplace"))
        if target in _ARITHMETIC:
            return self._arithmetic(node, _ARITHMETIC[target])
        if target is F.max_pool2d:
            return self._max_pool(node, self._bound(node, return_indices=True))
        if target in _LINEAR:
            return self._emit(node, Linear(self._bound(node)))
        if target in _RESHAPE:
            return self._reshape(node)
        if target in _DROPOUT:
            # A network can ask for dropout in eval mode too.
            return node.kwargs.get("training") is False and self._alias(node)
        return target in _NO_CHANGE and self._alias(node)

    def _bound(self, node: fx.Node, drop: str = "", **more: Any) -> Callable[[Tensor], Any]:
        """Return a node's function or method as one of its first argument alone."""
        value_of = self._values.__getitem__
        args = fx.node.map_arg(node.args[1:], value_of)
        kwargs = {**fx.node.map_arg(node.kwargs, value_of), **more}
        kwargs.pop(drop, None)
        target: Any = node.target
        if node.op == "call_method":
            return lambda x: getattr(x, target)(*args, **kwargs)
        return lambda x: target(x, *args, **kwargs)

    def _rectifier(self, node: fx.Node) -> bool:
        return self._emit(node, Rectifier(self._h, self._dtype, self._kernels))

    def _pointwise(self, node: fx.Node, function: Callable[[Tensor], Tensor]) -> bool:
        return self._emit(node, Pointwise(function, self._h, self._dtype))

    def _max_pool(self, node: fx.Node, pool: Callable[[Tensor], Any]) -> bool:
        if self._values[node].ndim != 4:
            return False
        return self._emit(node, MaxPool(pool, self._h, self._dtype))

    def _reshape(self, node: fx.Node) -> bool:
        shape = self._values[node].shape[1:]
        return self._emit(node, Linear(lambda x: x.reshape(len(x), *shape)))

    def _affine(self, node: fx.Node, module: Any) -> bool:
        padding = getattr(module, "padding", 0)
        if getattr(module, "padding_mode", "zeros") != "zeros" or isinstance(padding, str):
            return False
        return self._emit(node, Affine(module, self._dtype))

    def _norm(self, node: fx.Node, norm: Any) -> bool:
        value = self._values[node]
        shape = (-1, *[1] * (value.ndim - 2))
        scale, shift = (part.reshape(shape).to(value.dtype) for part in scale_and_shift(norm))
        self._emit(node, Linear(lambda x: x * scale.to(x.dtype)))
        return self._emit(node, Shift(shift), self._terms[node])

    def _arithmetic(self, node: fx.Node, operation: str) -> bool:
        """Add +, − of two values or of a value and a constant, or ×, ÷ by a constant."""
        if len(node.args) != 2 or node.kwargs:
            return False
        sides: Any = node.args
        left, right = (self._terms.get(x) if isinstance(x, fx.Node) else None for x in sides)
        if left and right:
            if operation == "-":
                self._emit(node, Linear(torch.neg), right)
                right = self._terms[node]
            self._terms[node] = left + right
            return operation in "+-" and self._same_shape(*sides)
        constant = sides[1] if left else sides[0]
        if isinstance(constant, fx.Node):
            constant = self._values[constant]
        if operation == "+":
            return self._emit(node, Shift(constant))
        if operation == "-" and left:
            return self._emit(node, Shift(-constant))
        if operation == "-":
            self._emit(node, Linear(torch.neg))
            return self._emit(node, Shift(constant), self._terms[node])
        if operation == "/" and not left:
            return False
        factor = constant if operation == "*" else 1 / constant
        return self._emit(node, Linear(lambda x: (x * factor).to(x.dtype)))

    def _same_shape(self, *nodes: fx.Node) -> bool:
        return bool(self._values[nodes[0]].shape == self._values[nodes[1]].shape)


def _out_of_place(module: Any) -> Any:
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False
    return module


def _returning_positions(pool: nn.MaxPool2d) -> nn.MaxPool2d:
    pool = copy.copy(pool)
    pool.return_indices = True
    return pool
