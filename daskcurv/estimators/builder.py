"""Taking a network apart: a rule for every operation, or none at all.

The graph is read from its input on. A value *depends on the samples* if anything that it is made of
does, by whatever way: an argument, a keyword, a list or dictionary among the arguments, a number
taken from a shape. Every operation on such a value has to be one that there is a rule for, used as
the rule expects, and give one tensor with a row for each sample. Anything else is unsupported: what
is not understood is never taken to be a constant.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from daskcurv.estimators.kernels import Kernels
from daskcurv.estimators.layers import (
    Affine,
    Layer,
    Linear,
    MaxPool,
    Pointwise,
    Rectifier,
    Shift,
)
from daskcurv.estimators.recording import Recording, described
from daskcurv.estimators.tracing import (
    CONVOLUTIONS,
    UnsupportedError,
    first_line,
    has_fixed_statistics,
    has_own_forward,
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


_IN_PLACE: set[Any] = {operator.iadd, operator.isub, operator.imul, operator.itruediv}
_SIZE_ARITHMETIC: set[Any] = {operator.add, operator.sub, operator.mul, operator.floordiv}
_FIXED_ATTRIBUTES = ("ndim", "dtype", "device")
_FIXED_METHODS = ("dim", "ndimension")


@dataclass(frozen=True)
class Step:
    """A layer, what it was in the network, and the steps whose sum it reads."""

    name: str
    operation: str
    layer: Layer
    terms: tuple[str, ...]


class Builder:
    """Turns a model into steps; parameters as in :class:`~.network.Network`.

    Attributes
    ----------
    steps : list of Step
    """

    def __init__(
        self, model: nn.Module, example: Tensor, h: float, dtype: torch.dtype, kernels: Kernels
    ):
        self.steps: list[Step] = []
        self._h, self._dtype, self._kernels = h, dtype, kernels
        traced = trace(model, example)
        self._clean_dtype = example.dtype
        self._recording = Recording(traced, example)
        self._values = self._recording.values
        self._nodes = list(traced.graph.nodes)
        self._modules: dict[str, Any] = dict(traced.named_modules())
        # The steps whose sum a node is; nodes that are shapes; and numbers that depend on how many
        # samples there are. A node in none of them is the same for all samples.
        self._terms: dict[fx.Node, tuple[str, ...]] = {}
        self._shapes: set[fx.Node] = set()
        self._counts: set[fx.Node] = set()

    def build(self) -> tuple[str, tuple[str, ...]]:
        """Fill `steps`; return the name of the input, and those whose sum is the output."""
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        result = self._nodes[-1].args[0]
        if len(inputs) != 1 or not isinstance(result, fx.Node):
            raise UnsupportedError("the network is not a function from one tensor to one tensor")
        self._terms[inputs[0]] = (inputs[0].name,)
        for node in self._nodes[1:-1]:
            if self._depends(node.all_input_nodes):
                self._take(node)
        if result not in self._terms:
            raise UnsupportedError("the output of the network does not depend on its input")
        return inputs[0].name, self._terms[result]

    def _take(self, node: fx.Node) -> None:
        """Add the steps of a node that depends on the samples."""
        what = described(node, self._modules)
        try:
            if self._shape(node):
                return
            if problem := self._recording.problem(node, self._clean_dtype):
                raise UnsupportedError(f"{what} {problem}")
            rule = self._module if node.op == "call_module" else self._function
            known = rule(node)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(f"the rule for {what} failed: {first_line(error)}") from error
        if not known:
            raise UnsupportedError(f"there is no rule for {what}")

    def _depends(self, values: Any) -> bool:
        """Return whether anything in some arguments, however nested, depends on the samples."""
        found: list[fx.Node] = []
        fx.node.map_arg(values, found.append)
        return any(node in self._terms or node in self._counts for node in found)

    def _emit(self, node: fx.Node, layer: Layer, terms: tuple[str, ...] = ()) -> bool:
        """Add a step that computes `node`, by default from its first argument."""
        name = f"{len(self.steps)} {node.name}"
        operation = described(node, self._modules)
        self.steps.append(Step(name, operation, layer, terms or self._first(node)))
        self._terms[node] = (name,)
        return True

    def _alias(self, node: fx.Node) -> bool:
        self._terms[node] = self._first(node)
        return True

    def _first(self, node: fx.Node) -> tuple[str, ...]:
        first: Any = node.args[0]
        return self._terms[first]

    # A rule returns whether it applies; if it does, the node has its step.

    def _shape(self, node: fx.Node) -> bool:
        """Note shapes, and numbers from them that depend on how many samples there are."""
        first: Any = node.args[0] if node.args else None
        if first in self._terms:
            return not self._depends(node.args[1:]) and self._question(node, first)
        if first in self._shapes and node.target is operator.getitem:
            index: Any = node.args[1]
            axes = range(len(self._values[first]))
            if isinstance(index, int):
                fixed = axes[index] != 0
            else:
                fixed = isinstance(index, slice) and 0 not in axes[index]
        else:
            if node.target not in _SIZE_ARITHMETIC or not isinstance(
                self._values[node], int | tuple
            ):
                return False
            fixed = False
        if not fixed:
            self._counts.add(node)
        return True

    def _question(self, node: fx.Node, value: fx.Node) -> bool:
        """Take up what is asked of a tensor other than its numbers."""
        target, args = node.target, node.args[1:]
        if target is getattr and args[0] in _FIXED_ATTRIBUTES:
            return True
        if node.op == "call_method" and target in _FIXED_METHODS:
            return True
        axis = args[0] if args else node.kwargs.get("dim")
        if (target is getattr and axis == "shape") or (target == "size" and axis is None):
            self._shapes.add(node)
        elif target != "size":
            return False
        elif isinstance(axis, int) and axis % self._values[value].ndim:
            return True
        self._counts.add(node)
        return True

    def _module(self, node: fx.Node) -> bool:
        module = self._modules[str(node.target)]
        if not has_own_forward(module) or len(node.args) != 1 or node.kwargs:
            return False
        kind = type(module)
        if kind in (*CONVOLUTIONS, nn.Linear):
            return self._affine(node, module)
        if has_fixed_statistics(module):
            return self._norm(node, module)
        if kind is nn.ReLU:
            return self._rectifier(node)
        if kind in _POINTWISE:
            return self._pointwise(node, _out_of_place(module))
        if kind is nn.MaxPool2d:
            return self._max_pool(node, _returning_positions(module))
        if kind in _POOLS:
            return self._emit(node, Linear(module))
        if kind is nn.Flatten:
            return self._reshape(node)
        return kind in _NOTHING and not module.training and self._alias(node)

    def _function(self, node: fx.Node) -> bool:
        target: Any = node.target
        if target in _ARITHMETIC:
            return self._arithmetic(node, _ARITHMETIC[target])
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or first not in self._terms:
            return False
        if target in _RESHAPE:
            # The shape may have been computed from the number of samples; the result is known.
            return self._reshape(node)
        others = node.args[1:], node.kwargs
        if self._depends(others) or self._has_tensor(others):
            return False
        if target in _RECTIFY:
            return self._rectifier(node)
        if target in _POINTWISE_FUNCTIONS:
            return self._pointwise(node, self._bound(node, drop="inplace"))
        if target is F.max_pool2d:
            return self._max_pool(node, self._bound(node, return_indices=True))
        if target in _LINEAR:
            return self._emit(node, Linear(self._bound(node)))
        if target in _DROPOUT:
            # A network can ask for dropout in eval mode too.
            return node.kwargs.get("training") is False and self._alias(node)
        return target in _NO_CHANGE and self._alias(node)

    def _has_tensor(self, arguments: Any) -> bool:
        nodes: list[fx.Node] = []
        fx.node.map_arg(arguments, nodes.append)
        return any(isinstance(self._values[node], Tensor) for node in nodes)

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
        return self._emit(node, Shift(lambda x: x + shift), self._terms[node])

    def _arithmetic(self, node: fx.Node, operation: str) -> bool:
        """Add +, − of two values or of a value and a constant, or ×, ÷ by a constant."""
        if len(node.args) != 2 or node.kwargs:
            return False
        sides: Any = node.args
        left, right = (self._terms.get(x) if isinstance(x, fx.Node) else None for x in sides)
        if left and right:
            if operation not in "+-" or not self._have_shape_of(node, *sides):
                return False
            if operation == "-":
                self._emit(node, Linear(torch.neg), right)
                right = self._terms[node]
            self._terms[node] = left + right
            return True
        terms = left or right or ()
        value, constant = sides if left else reversed(sides)
        if not terms or self._depends(constant) or (not left and _changes_in_place(node)):
            return False
        if isinstance(constant, fx.Node):
            constant = self._values[constant]
        if operation in "+-":
            if not self._have_shape_of(node, value):
                return False
            if operation == "-" and left:
                return self._emit(node, Shift(lambda x: x - constant), terms)
            if operation == "-":
                self._emit(node, Linear(torch.neg), terms)
                terms = self._terms[node]
            return self._emit(node, Shift(lambda x: x + constant), terms)
        if operation == "*":
            return self._emit(node, Linear(lambda x: (x * constant).to(x.dtype)), terms)
        # The other way round it is no linear function.
        return bool(left) and self._emit(node, Linear(lambda x: (x / constant).to(x.dtype)), terms)

    def _have_shape_of(self, node: fx.Node, *sides: fx.Node) -> bool:
        """Return whether nothing is broadcast: a difference would not be."""
        shape = self._values[node].shape
        return all(self._values[side].shape == shape for side in sides)


def _changes_in_place(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else ""
    return node.target in _IN_PLACE or str(name).endswith("_")


def _out_of_place(module: Any) -> Any:
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False
    return module


def _returning_positions(pool: nn.MaxPool2d) -> nn.MaxPool2d:
    pool = copy.copy(pool)
    pool.return_indices = True
    return pool
