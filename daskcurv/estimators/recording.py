"""What every operation of a traced network gives, for two batches of different size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from daskcurv.estimators.tracing import UnsupportedError, first_line


def described(node: fx.Node, modules: dict[str, Any]) -> str:
    """Return what a node does in words, as ``"module layer1.0 (Conv2d)"``."""
    if node.op == "call_module":
        return f"module {node.target} ({type(modules[str(node.target)]).__name__})"
    return f"{node.op.removeprefix('call_')} {getattr(node.target, '__name__', node.target)}"


class Recording:
    """The values of all nodes of a graph.

    Parameters
    ----------
    traced : fx.GraphModule
    example : Tensor, shape (N, *input)
        Two or more samples.

    Attributes
    ----------
    samples : int
        N.
    counts : tuple of int
        The numbers of samples that values are recorded for.
    values : dict
        Value by node.

    Raises
    ------
    UnsupportedError
        If the graph cannot be run with another number of samples, or reads a value again that an
        operation has changed in place: then a name does not stand for one value.
    """

    def __init__(self, traced: fx.GraphModule, example: Tensor):
        self.samples = len(example)
        self.values = _run(traced, example)
        # With one more sample: what mixes samples, or has the number of the first built in, shows.
        self._larger = _run(traced, torch.cat([example, example[:1]]))

        self.counts = self.samples, self.samples + 1

    def both(self, node: fx.Node) -> tuple[Any, Any]:
        """Return the value of a node for each number of samples in `counts`."""
        return self.values[node], self._larger[node]

    def problem(self, node: fx.Node, dtype: torch.dtype) -> str:
        """Return why a node is no tensor with as many rows for each sample; empty if it is."""
        shapes = []
        for value, count in zip(self.both(node), self.counts, strict=True):
            if not isinstance(value, Tensor):
                return f"gives a {type(value).__name__}, not a tensor"
            if value.ndim == 0 or len(value) == 0 or len(value) % count:
                return "mixes samples"
            if value.dtype != dtype:
                return f"gives another dtype, {value.dtype}"
            shapes.append((len(value) // count, *value.shape[1:]))
        return "" if shapes[0] == shapes[1] else "gives a shape that depends on the batch"


class _Interpreter(fx.Interpreter):
    def __init__(self, traced: fx.GraphModule):
        super().__init__(traced, garbage_collect_values=False)
        self._modules: dict[str, Any] = dict(traced.named_modules())
        self._versions: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        for source in n.all_input_nodes:
            # Views share the count of their base's changes.
            if source in self._versions and self.env[source]._version != self._versions[source]:
                raise UnsupportedError(
                    f"{described(n, self._modules)} reads what was changed in place before"
                )
        try:
            value = super().run_node(n)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            what = described(n, self._modules)
            raise UnsupportedError(f"{what} failed: {first_line(error)}") from error
        if isinstance(value, Tensor) and not value.is_inference():
            self._versions[n] = value._version
        return value


def _run(traced: fx.GraphModule, example: Tensor) -> dict[fx.Node, Any]:
    interpreter = _Interpreter(traced)
    with torch.no_grad():
        interpreter.run(example.clone())
    return interpreter.env
