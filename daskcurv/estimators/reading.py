"""Reading the graph of a network: what depends on the samples, and how.

The graph is read from its input on. A value *depends on the samples* if anything that it is made of
does, by whatever way: an argument, a keyword, a list or dictionary among the arguments, a number
taken from a shape. Every operation on such a value has to be one that there is a rule for, used as
the rule expects, and give one tensor with as many rows for each sample. Anything else is
unsupported: what is not understood is never taken to be a constant.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from daskcurv.estimators import vocabulary as known
from daskcurv.estimators.layers import Layer, Linear
from daskcurv.estimators.recording import Recording, described
from daskcurv.estimators.tracing import UnsupportedError, first_line, trace

Terms = tuple[str, ...]
"""Names of the steps whose sum a value is."""

_TRIED_SAMPLES = 11


@dataclass(frozen=True)
class Step:
    """A layer, what it was in the network, and the values that it reads."""

    name: str
    operation: str
    layer: Layer
    operands: tuple[Terms, ...]


@dataclass(frozen=True)
class Pieces:
    """What an operation with several results gives, each as a function of one value."""

    value: fx.Node
    piece: Callable[[int], Callable[[Tensor], Tensor]]


class GraphReader:
    """What a graph's nodes are, and the steps taken so far; the rules are in a subclass.

    Parameters
    ----------
    model : nn.Module
    example : Tensor, shape (N, *input)
        Two or more samples.

    Attributes
    ----------
    steps : list of Step
    """

    def __init__(self, model: nn.Module, example: Tensor):
        self.steps: list[Step] = []
        traced = trace(model, example)
        self._clean_dtype = example.dtype
        self._recording = Recording(traced, example)
        self._values = self._recording.values
        self._nodes = list(traced.graph.nodes)
        self._modules: dict[str, Any] = dict(traced.named_modules())
        # A node is one of these, or the same for all samples.
        self._terms: dict[fx.Node, Terms] = {}
        self._pieces: dict[fx.Node, Pieces] = {}
        self._first_of: dict[fx.Node, Terms] = {}
        """Of operations with several results of which the rules give the first alone."""
        self._shapes: set[fx.Node] = set()
        self._counts: set[fx.Node] = set()
        """Numbers that depend on how many samples there are."""
        self._repeated: dict[fx.Node, Tensor] = {}
        """The row (1, …) of what is the same for each sample, and has a row for each."""

    def build(self) -> tuple[str, Terms]:
        """Fill `steps`; return the name of the input, and those whose sum is the output."""
        inputs = [node for node in self._nodes if node.op == "placeholder"]
        result = self._nodes[-1].args[0]
        if len(inputs) != 1 or not isinstance(result, fx.Node):
            raise UnsupportedError("the network is not a function from one tensor to one tensor")
        self._terms[inputs[0]] = (inputs[0].name,)
        for node in self._nodes[1:-1]:
            # Weights of attention, say, that are unpacked and not used.
            unused = node.target is operator.getitem and not node.users
            if not unused and self._depends(node.all_input_nodes):
                self._take(node)
        if result not in self._terms:
            raise UnsupportedError("the output of the network does not depend on its input")
        return inputs[0].name, self._terms[result]

    def _module(self, node: fx.Node) -> bool:
        """Add the steps of a module, if there is a rule for it."""
        raise NotImplementedError

    def _function(self, node: fx.Node) -> bool:
        """Add the steps of a function or method, if there is a rule for it."""
        raise NotImplementedError

    def _take(self, node: fx.Node) -> None:
        """Add the steps of a node that depends on the samples."""
        what = described(node, self._modules)
        try:
            if self._shape(node) or self._repeats(node):
                return
            several = self._splits(node)
            if not several and (problem := self._recording.problem(node, self._clean_dtype)):
                raise UnsupportedError(f"{what} {problem}")
            if several or self._take_piece(node):
                return
            rule = self._module if node.op == "call_module" else self._function
            taken = rule(node)
        except (UnsupportedError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise UnsupportedError(f"the rule for {what} failed: {first_line(error)}") from error
        if not taken:
            raise UnsupportedError(f"there is no rule for {what}")

    def _depends(self, values: Any) -> bool:
        """Return whether anything in some arguments, however nested, depends on the samples."""
        found: list[fx.Node] = []
        fx.node.map_arg(values, found.append)
        kinds = (self._terms, self._pieces, self._first_of, self._counts, self._repeated)
        return any(node in kind for node in found for kind in kinds)

    def _emit(self, node: fx.Node, layer: Layer, *operands: Terms) -> bool:
        """Add a step that computes `node`, by default from its first argument."""
        name = f"{len(self.steps)} {node.name}"
        operation = described(node, self._modules)
        self.steps.append(Step(name, operation, layer, operands or (self._first(node),)))
        self._terms[node] = (name,)
        return True

    def _linear(
        self, node: fx.Node, function: Callable[[Tensor], Tensor], source: fx.Node | None = None
    ) -> bool:
        """Add a step for a linear function of one value, if it acts on each sample by itself."""
        value: Any = node.args[0] if source is None else source
        before, after = self._values[value], self._values[node]
        if not self._acts_by_sample(function, before, after):
            raise UnsupportedError(f"{described(node, self._modules)} mixes samples")
        return self._emit(node, Linear(function), self._terms[value])

    def _acts_by_sample(
        self, function: Callable[[Tensor], Tensor], before: Tensor, after: Tensor
    ) -> bool:
        """Return whether changing the order of the samples changes that of the results alone."""
        count, samples = _TRIED_SAMPLES, self._recording.samples
        rows = len(before) // samples
        generator = torch.Generator().manual_seed(0)
        values = torch.randn(count, rows, *before.shape[1:], generator=generator, device="cpu")
        values = values.to(before)
        order = torch.randperm(count, generator=generator)
        results = [function(x.flatten(0, 1)) for x in (values, values[order])]
        if any(len(result) * samples != count * len(after) for result in results):
            return False
        first, second = (result.reshape(count, -1) for result in results)
        return torch.allclose(first[order], second, rtol=1e-3, atol=1e-5)

    def _alias(self, node: fx.Node) -> bool:
        self._terms[node] = self._first(node)
        return True

    def _first(self, node: fx.Node) -> Terms:
        first: Any = node.args[0]
        return self._terms[first]

    # What is not a tensor of the samples: shapes, numbers from them, several results at once.

    def _repeats(self, node: fx.Node) -> bool:
        """Note what has a row for each sample and says the same for all, such as a class token."""
        nodes: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), nodes.append)
        if any(
            other in kind for other in nodes for kind in (self._terms, self._pieces, self._first_of)
        ):
            return False
        values = self._recording.both(node)
        rows = [value[:1] for value in values if isinstance(value, Tensor) and value.ndim]
        if len(rows) != 2 or not torch.equal(*rows):
            return False
        for value, count in zip(values, self._recording.counts, strict=True):
            if len(value) != count or not torch.equal(value, value[:1].expand_as(value)):
                return False
        self._repeated[node] = rows[0].clone()
        return True

    def _splits(self, node: fx.Node) -> bool:
        """Note an operation with several results; the rules take up those that are used."""
        first: Any = node.args[0] if node.args else None
        if isinstance(self._values[node], tuple) and node.op == "call_module":
            if not self._module(node):
                return False
            self._first_of[node] = self._terms.pop(node)
            return True
        target: Any = node.target
        name = getattr(target, "__name__", target)
        if first in self._pieces and name == "unbind" and node.args[1:] in ((), (0,)):
            self._pieces[node] = self._pieces[first]
            return not node.kwargs
        if first not in self._terms:
            return False
        if name == "permute" and self._recording.problem(node, self._clean_dtype):
            # Query, key and value, say, brought to the front to be taken one by one.
            function = self._bound(node)
            self._pieces[node] = Pieces(first, lambda index: lambda x: function(x)[index])
            return True
        if node.target not in known.SPLIT:
            return False
        # All take the dimension last: split(x, size, dim), but unbind(x, dim).
        place = 1 if name == "unbind" else 2
        given = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
        if not isinstance(given, int) or given % self._values[first].ndim == 0:
            return False
        split = self._bound(node)
        self._pieces[node] = Pieces(first, lambda index: lambda x: split(x)[index])
        return True

    def _take_piece(self, node: fx.Node) -> bool:
        """Take up one of several results."""
        if node.target is not operator.getitem:
            return False
        first: Any = node.args[0]
        index = node.args[1]
        if first in self._first_of and index == 0:
            self._terms[node] = self._first_of[first]
            return True
        if first not in self._pieces or not isinstance(index, int):
            return False
        pieces = self._pieces[first]
        return self._linear(node, pieces.piece(index), pieces.value)

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
            if node.target not in known.SIZE_ARITHMETIC or not isinstance(
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
        if target is getattr and args[0] in known.FIXED_ATTRIBUTES:
            return True
        if node.op == "call_method" and target in known.FIXED_METHODS:
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

    def _has_tensor(self, arguments: Any) -> bool:
        nodes: list[fx.Node] = []
        fx.node.map_arg(arguments, nodes.append)
        return any(isinstance(self._values[node], Tensor) for node in nodes)

    def _bound(
        self, node: fx.Node, drop: str = "", dtype: torch.dtype | None = None, **more: Any
    ) -> Callable[[Tensor], Any]:
        """Return a node's function or method as one of its first argument alone.

        Without the keyword `drop`, with those in `more`, and with weights in another dtype if one
        is given.
        """

        def value_of(argument: fx.Node) -> Any:
            value = self._values[argument]
            is_weight = isinstance(value, Tensor) and value.is_floating_point()
            return value.to(dtype) if is_weight and dtype else value

        args = fx.node.map_arg(node.args[1:], value_of)
        kwargs = {**fx.node.map_arg(node.kwargs, value_of), **more}
        kwargs.pop(drop, None)
        target: Any = node.target
        if node.op == "call_method":
            return lambda x: getattr(x, target)(*args, **kwargs)
        return lambda x: target(x, *args, **kwargs)
