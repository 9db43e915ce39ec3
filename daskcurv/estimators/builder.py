"""Taking a network apart: a rule for every operation, or none at all."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from daskcurv.estimators import vocabulary as known
from daskcurv.estimators.kernels import Kernels
from daskcurv.estimators.layers import (
    Affine,
    Linear,
    MaxPool,
    Pointwise,
    Rectifier,
    Shift,
    subtraction_dtype,
)
from daskcurv.estimators.products import Concatenate, MatrixProduct, Product, Smooth, Softmax
from daskcurv.estimators.reading import GraphReader, Terms
from daskcurv.estimators.tracing import (
    CONVOLUTIONS,
    has_fixed_statistics,
    has_own_forward,
    scale_and_shift,
)


class Builder(GraphReader):
    """Turns a model into steps; parameters as in :class:`~.network.Network`."""

    def __init__(
        self, model: nn.Module, example: Tensor, h: float, dtype: torch.dtype, kernels: Kernels
    ):
        super().__init__(model, example)
        self._h, self._dtype, self._kernels = h, dtype, kernels

    # A rule returns whether it applies; if it does, the node has its step.

    def _module(self, node: fx.Node) -> bool:
        module = self._modules[str(node.target)]
        if not has_own_forward(module):
            return False
        kind = type(module)
        if kind is nn.MultiheadAttention:
            return self._multihead_attention(node, module)
        if len(node.args) != 1 or node.kwargs:
            return False
        if kind in CONVOLUTIONS:
            return self._convolution(node, module)
        if kind is nn.Linear:
            return self._emit(node, Affine(module.weight, module.bias, self._dtype))
        if has_fixed_statistics(module):
            return self._norm(node, module)
        if kind is nn.ReLU:
            return self._rectifier(node)
        if kind is nn.PReLU:
            return self._prelu(node, module.weight)
        if kind in known.POINTWISE_MODULES:
            return self._pointwise(node, _out_of_place(module))
        if kind is nn.Softmax and module.dim is not None:
            return self._softmax(node, module.dim)
        if kind in known.SMOOTH_MODULES or (
            kind in known.INSTANCE_NORMS and not module.track_running_stats
        ):
            return self._smooth(node)
        if kind in (nn.MaxPool2d, nn.AdaptiveMaxPool2d):
            return self._max_pool(node, _returning_positions(module))
        if kind in known.LINEAR_MODULES:
            return self._linear(node, module)
        if kind in (nn.Flatten, nn.Unflatten):
            return self._reshape(node)
        return kind in known.NOTHING and not module.training and self._alias(node)

    def _function(self, node: fx.Node) -> bool:
        target: Any = node.target
        if target in known.ARITHMETIC:
            return self._arithmetic(node, known.ARITHMETIC[target])
        if target in known.MATRIX_PRODUCT:
            return self._matrix_product(node)
        if target in known.JOIN or target is torch.stack:
            return self._join(node)
        if target is F.scaled_dot_product_attention:
            return self._attention_function(node)
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or first not in self._terms:
            return False
        if target in known.RESHAPE:
            # The shape may have been computed from the number of samples; the result is known.
            return self._reshape(node)
        others = node.args[1:], node.kwargs
        if target in (F.linear, F.prelu, torch.prelu):
            weights = [self._constant(value) for value in (*node.args[1:], *node.kwargs.values())]
            if self._depends(others) or not isinstance(weights[0], Tensor):
                return False
            if target is F.linear:
                bias = weights[1] if len(weights) > 1 else None
                return self._emit(node, Affine(weights[0], bias, self._dtype))
            return self._prelu(node, weights[0])
        if target is operator.getitem:
            return self._select(node)
        if target is getattr:
            return str(node.args[1]) == "mT" and self._linear(node, lambda x: x.mT)
        if target in ("expand", "repeat"):
            return self._expand(node)
        if self._depends(others):
            return False
        if target in known.SMOOTH:
            return self._smooth(node)
        if target in known.LINEAR:
            return self._linear(node, self._bound(node))
        if self._has_tensor(others):
            return False
        if target in known.RECTIFY:
            return self._rectifier(node)
        if target in known.POINTWISE:
            return self._pointwise(node, self._bound(node, drop="inplace"))
        if target in known.SOFTMAX:
            dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
            return isinstance(dim, int) and self._softmax(node, dim)
        if target in (F.max_pool2d, F.adaptive_max_pool2d):
            return self._max_pool(node, self._bound(node, return_indices=True))
        if target in (torch.amax, "amax"):
            return self._maximum(node)
        if target is F.pad:
            return self._pad(node)
        if target in known.DROPOUT or getattr(target, "__name__", "") == "stochastic_depth":
            # A network can ask for dropout in eval mode too.
            return self._is_off(node) and self._alias(node)
        return target in known.NO_CHANGE and self._alias(node)

    def _constant(self, value: Any) -> Any:
        return self._values[value] if isinstance(value, fx.Node) else value

    def _is_off(self, node: fx.Node) -> bool:
        """Return whether a function like dropout is told that this is no training."""
        return node.kwargs.get("training", node.args[-1]) is False

    def _rectifier(self, node: fx.Node) -> bool:
        return self._emit(node, Rectifier(self._h, self._dtype, self._kernels))

    def _pointwise(
        self, node: fx.Node, function: Callable[[Tensor], Tensor], *terms: Terms
    ) -> bool:
        return self._emit(node, Pointwise(function, self._h, self._dtype), *terms)

    def _prelu(self, node: fx.Node, weight: Tensor) -> bool:
        value = self._values[node]
        slope = weight.detach()
        if slope.numel() > 1:
            slope = slope.reshape(-1, *[1] * (value.ndim - 2))
        return self._pointwise(node, lambda x: torch.where(x > 0, x, x * slope.to(x.dtype)))

    def _smooth(self, node: fx.Node) -> bool:
        first: Any = node.args[0]
        dtype = subtraction_dtype(self._dtype)
        if node.op == "call_module":
            function = copy.deepcopy(self._modules[str(node.target)]).to(dtype)
        else:
            function = self._bound(node, dtype=dtype)
        values = self._values[first], self._values[node]
        if not self._acts_by_sample(lambda x: function(x.to(dtype)), *values):
            return False
        return self._emit(node, Smooth(function, self._h, self._dtype))

    def _softmax(self, node: fx.Node, dim: int, *terms: Terms) -> bool:
        ndim = self._values[node].ndim
        if dim % ndim == 0:
            return False
        return self._emit(node, Softmax(dim % ndim - ndim, self._h, self._dtype), *terms)

    def _max_pool(self, node: fx.Node, pool: Callable[[Tensor], Any]) -> bool:
        if self._values[node].ndim != 4:
            return False
        return self._emit(node, MaxPool(pool, self._h, self._dtype))

    def _maximum(self, node: fx.Node) -> bool:
        """Take the maximum over some dimensions: a pool whose window they are."""
        first: Any = node.args[0]
        value, result = self._values[first], self._values[node]
        dims: Any = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
        over = sorted(dim % value.ndim for dim in ([dims] if isinstance(dims, int) else dims))
        if not over or 0 in over:
            return False
        kept = [dim for dim in range(1, value.ndim) if dim not in over]
        order = [0, *kept, *over]
        count = result[0].numel()

        def windows(x: Tensor) -> Tensor:
            return x.permute(order).reshape(len(x), count, -1, 1)

        self._emit(node, Linear(windows))
        pool = MaxPool(lambda x: torch.max(x, dim=2, keepdim=True), self._h, self._dtype)
        self._emit(node, pool, self._terms[node])
        shape = result.shape[1:]
        return self._emit(node, Linear(lambda x: x.reshape(len(x), *shape)), self._terms[node])

    def _reshape(self, node: fx.Node) -> bool:
        first: Any = node.args[0]
        before, after = self._values[first], self._values[node]
        shape = after.shape[1:]
        samples = self._recording.samples
        old, new = len(before) // samples, len(after) // samples
        return self._linear(node, lambda x: x.reshape(len(x) // old * new, *shape))

    def _select(self, node: fx.Node) -> bool:
        """Take up indexing that leaves the samples alone."""
        if self._depends(node.args[1]):
            return False
        index: Any = fx.node.map_arg(node.args[1], self._values.__getitem__)
        first = index[0] if isinstance(index, tuple) and index else index
        whole = isinstance(first, slice) and first == slice(None)
        return (whole or first is Ellipsis) and self._linear(node, lambda x: x[index])

    def _expand(self, node: fx.Node) -> bool:
        """Repeat along dimensions other than that of the samples."""
        first: Any = node.args[0]
        before, after = self._values[first], self._values[node]
        if before.ndim != after.ndim or len(before) != len(after):
            return False
        times = [new // old for old, new in zip(before.shape[1:], after.shape[1:], strict=True)]
        return self._linear(node, lambda x: x.repeat(1, *times))

    def _pad(self, node: fx.Node) -> bool:
        mode = node.args[2] if len(node.args) > 2 else node.kwargs.get("mode", "constant")
        value = node.args[3] if len(node.args) > 3 else node.kwargs.get("value")
        return (mode != "constant" or not value) and self._linear(node, self._bound(node))

    def _convolution(self, node: fx.Node, module: Any) -> bool:
        padding, mode = module.padding, module.padding_mode
        terms = self._first(node)
        if mode != "zeros" or isinstance(padding, str):
            edges = list(module._reversed_padding_repeated_twice)
            how = "constant" if mode == "zeros" else mode
            self._emit(node, Linear(lambda x: F.pad(x, edges, mode=how)))
            terms, padding = self._terms[node], [0] * (module.weight.ndim - 2)
        settings = {
            "stride": module.stride,
            "padding": padding,
            "dilation": module.dilation,
            "groups": module.groups,
        }
        return self._emit(node, Affine(module.weight, module.bias, self._dtype, settings), terms)

    def _norm(self, node: fx.Node, norm: Any) -> bool:
        value = self._values[node]
        shape = (-1, *[1] * (value.ndim - 2))
        scale, shift = (part.reshape(shape).to(value.dtype) for part in scale_and_shift(norm))
        self._emit(node, Linear(lambda x: x * scale.to(x.dtype)))
        return self._emit(node, Shift(lambda x: x + shift), self._terms[node])

    def _arithmetic(self, node: fx.Node, operation: str) -> bool:
        """Add +, −, × and ÷ of two values, or of a value and a constant."""
        if len(node.args) != 2 or node.kwargs:
            return False
        sides: Any = node.args
        left, right = (self._terms.get(x) if isinstance(x, fx.Node) else None for x in sides)
        if left and right:
            return self._of_two_values(node, operation, *sides)
        terms = left or right or ()
        value, constant = sides if left else reversed(sides)
        row = self._repeated.get(constant) if isinstance(constant, fx.Node) else None
        if not terms or (row is None and self._depends(constant)):
            return False
        if not left and _changes_in_place(node):
            return False
        constant = self._constant(constant) if row is None else row
        if operation in "+-":
            if not self._have_shape_of(node, value):
                terms = self._broadcast(node, value)
            if operation == "-" and left:
                return self._emit(node, Shift(lambda x: x - constant), terms)
            if operation == "-":
                self._emit(node, Linear(torch.neg), terms)
                terms = self._terms[node]
            return self._emit(node, Shift(lambda x: x + constant), terms)
        if operation == "/" and not left:
            self._pointwise(node, torch.reciprocal, terms)
            terms = self._terms[node]
        if operation == "*" or not left:
            return self._emit(node, Linear(lambda x: (x * constant).to(x.dtype)), terms)
        return self._emit(node, Linear(lambda x: (x / constant).to(x.dtype)), terms)

    def _of_two_values(self, node: fx.Node, operation: str, left: fx.Node, right: fx.Node) -> bool:
        shapes = [self._values[side].shape for side in (left, right)]
        if len(shapes[0]) != len(shapes[1]) or shapes[0][0] != shapes[1][0]:
            return False
        first, second = self._terms[left], self._terms[right]
        if operation in "*/":
            if operation == "/":
                self._pointwise(node, torch.reciprocal, second)
                second = self._terms[node]
            return self._emit(node, Product(self._h, self._dtype), first, second)
        if not self._have_shape_of(node, left):
            first = self._broadcast(node, left)
        if not self._have_shape_of(node, right):
            second = self._broadcast(node, right)
        if operation == "-":
            self._emit(node, Linear(torch.neg), second)
            second = self._terms[node]
        self._terms[node] = first + second
        return True

    def _broadcast(self, node: fx.Node, value: fx.Node) -> Terms:
        """Return a value in the shape of a result that it was broadcast to."""
        shape = self._values[node].shape[1:]
        added = len(shape) + 1 - self._values[value].ndim
        if added or len(self._values[node]) != len(self._values[value]):
            return ()
        self._emit(node, Linear(lambda x: x.expand(len(x), *shape)), self._terms[value])
        return self._terms[node]

    def _have_shape_of(self, node: fx.Node, *sides: fx.Node) -> bool:
        shape = self._values[node].shape
        return all(self._values[side].shape == shape for side in sides)

    def _join(self, node: fx.Node) -> bool:
        """Concatenate or stack values, and what is the same for all samples."""
        sides: Any = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        ndim = self._values[node].ndim
        if not isinstance(sides, list | tuple) or not isinstance(dim, int) or dim % ndim == 0:
            return False
        operands, constants = [], []
        for side in sides:
            if side not in self._terms and side not in self._repeated:
                return False
            constants.append(self._repeated.get(side))
            if side in self._terms:
                terms = self._terms[side]
                if node.target is torch.stack:
                    self._emit(node, Linear(lambda x: x.unsqueeze(dim)), terms)
                    terms = self._terms[node]
                operands.append(terms)
            elif node.target is torch.stack:
                return False
        return self._emit(node, Concatenate(dim % ndim - ndim, constants), *operands)

    def _matrix_product(self, node: fx.Node) -> bool:
        if len(node.args) != 2 or node.kwargs:
            return False
        sides: Any = node.args
        left, right = (self._terms.get(x) if isinstance(x, fx.Node) else None for x in sides)
        if left and right:
            shapes = [self._values[side].shape for side in sides]
            if len(shapes[0]) < 3 or shapes[0][:-2] != shapes[1][:-2]:
                return False
            return self._emit(node, MatrixProduct(self._h, self._dtype), left, right)
        value, constant = sides if left else reversed(sides)
        if self._depends(constant):
            return False
        matrix = self._constant(constant)
        if left:
            return self._linear(node, lambda x: x @ matrix.to(x.dtype), value)
        return self._linear(node, lambda x: matrix.to(x.dtype) @ x, value)

    def _attention_function(self, node: fx.Node) -> bool:
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value = (given.pop(name, None) for name in names[:3])
        if any(side not in self._terms for side in (query, key, value)):
            return False
        if given.pop("enable_gqa", False) or given.get("dropout_p") or self._depends(given):
            return False
        mask = self._constant(given.get("attn_mask"))
        length, features = self._values[query].shape[-2:]
        if given.get("is_causal"):
            others = self._values[key].shape[-2]
            mask = torch.ones(length, others, dtype=torch.bool).tril()
        query, key, value = (self._terms[side] for side in (query, key, value))
        return self._attention(node, query, key, value, mask, given.get("scale") or features**-0.5)

    def _attention(
        self, node: fx.Node, query: Terms, key: Terms, value: Terms, mask: Any, scale: float
    ) -> bool:
        """Add softmax(scale q kᵀ + mask) v of (N, …, L, D)."""
        self._emit(node, Linear(lambda x: x.mT * scale), key)
        self._emit(node, MatrixProduct(self._h, self._dtype), query, self._terms[node])
        if isinstance(mask, Tensor):
            if mask.dtype == torch.bool:
                mask = torch.zeros(mask.shape).masked_fill(~mask.cpu(), -torch.inf)
            shift = mask.to(self._values[node])
            if shift.ndim > 2 and shift.shape[0] != 1:
                return False
            self._emit(node, Shift(lambda x: x + shift), self._terms[node])
        self._emit(node, Softmax(-1, self._h, self._dtype), self._terms[node])
        return self._emit(node, MatrixProduct(self._h, self._dtype), self._terms[node], value)

    def _multihead_attention(self, node: fx.Node, module: Any) -> bool:
        """Add self-attention, (N, L, E); the weights that it can return are not followed."""
        sides = [*node.args, *(node.kwargs.get(name) for name in ("query", "key", "value"))]
        sources = [side for side in sides if isinstance(side, fx.Node)]
        given = {**dict(zip(("key_padding_mask", "need_weights", "attn_mask"), node.args[3:],
                            strict=False)), **node.kwargs}  # fmt: skip
        plain = module.batch_first and module.in_proj_weight is not None
        if len(sources) != 3 or len(set(sources)) != 1 or not plain or module.bias_k is not None:
            return False
        if (
            module.training
            or module.add_zero_attn
            or any(given.get(name) is not None for name in ("key_padding_mask", "attn_mask"))
        ):
            return False
        width, heads = module.embed_dim, module.num_heads
        length = self._values[sources[0]].shape[1]
        self._emit(
            node,
            Affine(module.in_proj_weight, module.in_proj_bias, self._dtype),
            self._terms[sources[0]],
        )
        projected = self._terms[node]
        parts = []
        for part in range(3):
            self._emit(node, Linear(_head_reader(part, length, heads)), projected)
            parts.append(self._terms[node])
        query, key, value = parts
        self._attention(node, query, key, value, None, (width // heads) ** -0.5)
        self._emit(
            node, Linear(lambda x: x.transpose(1, 2).reshape(len(x), length, width)),
            self._terms[node],
        )  # fmt: skip
        out = module.out_proj
        self._emit(node, Affine(out.weight, out.bias, self._dtype), self._terms[node])
        return True


def _head_reader(part: int, length: int, heads: int) -> Callable[[Tensor], Tensor]:
    """Return the function that takes query, key or value of all heads out of (N, L, 3 E)."""
    return lambda x: x.reshape(len(x), length, 3, heads, -1)[:, :, part].transpose(1, 2)


def _changes_in_place(node: fx.Node) -> bool:
    name = node.target if node.op == "call_method" else ""
    return node.target in known.IN_PLACE or str(name).endswith("_")


def _out_of_place(module: Any) -> Any:
    if getattr(module, "inplace", False):
        module = copy.copy(module)
        module.inplace = False
    return module


def _returning_positions(pool: Any) -> Any:
    pool = copy.copy(pool)
    pool.return_indices = True
    return pool
