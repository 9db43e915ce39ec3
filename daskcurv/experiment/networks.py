"""Networks, as what travels to a worker and is recorded in a store: a factory and its arguments.

The ResNet-18 of `daskcurv.experiment.resnet18` is the one built in, and recognised by the shapes in
a checkpoint. Any other is a function that returns it (`Factory`).
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import reduce
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from torch import nn

from daskcurv.errors import ConfigError
from daskcurv.experiment.resnet18 import ModelSpec


class Network(Protocol):
    """What has to be known to build a network; a value that can be compared and pickled."""

    @property
    def num_classes(self) -> int:
        """Number of outputs."""
        ...

    def build(self) -> nn.Module:
        """Return the network, with whatever weights."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dictionary from which `network_of` makes it again."""
        ...


@dataclass(frozen=True)
class Factory:
    """A network that a function returns; made by `Factory.of`.

    Attributes
    ----------
    factory : str
        ``"package.module:function"``, from where every worker imports it.
    num_classes : int
        Outputs of the network.
    source_sha256 : str
        Digest of the file that defines the function; another one is refused.
    arguments : mapping
        Keyword arguments of the function, JSON values.
    """

    factory: str
    num_classes: int
    source_sha256: str
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, function: Callable[..., nn.Module], num_classes: int, **arguments: Any) -> Factory:
        """Return the network ``function(**arguments)``.

        Parameters
        ----------
        function : callable
            Defined at the top of a module that workers can import.
        num_classes : int
        **arguments
            JSON values.

        Raises
        ------
        ConfigError
            If the function cannot be found by its name.
        """
        name = f"{function.__module__}:{function.__qualname__}"
        local = function.__module__ == "__main__" or "<" in name
        if local or _imported(name) is not function:
            raise ConfigError(
                f"the factory {name} cannot be imported by workers; define it at the top of a "
                "module that is not the script itself"
            )
        return cls(name, num_classes, _source_digest(function), arguments)

    def build(self) -> nn.Module:
        """Return the network, with whatever weights.

        Raises
        ------
        ConfigError
            If the factory cannot be imported, is not the one recorded, or returns no network.
        """
        function = _imported(self.factory)
        if _source_digest(function) != self.source_sha256:
            raise ConfigError(
                f"the file that defines {self.factory} is not the one recorded: it has changed, or "
                "is another one on this machine. Restore it, or choose another --store"
            )
        model = function(**self.arguments)
        if not isinstance(model, nn.Module):
            raise ConfigError(
                f"{self.factory} returned a {type(model).__name__}; expected a torch.nn.Module"
            )
        return model

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dictionary."""
        return {**asdict(self), "arguments": dict(self.arguments)}


def network_of(recorded: Mapping[str, Any]) -> Network:
    """Return the network that a store's identity records under ``model``."""
    return Factory(**recorded) if "factory" in recorded else ModelSpec(**recorded)


def _imported(name: str) -> Any:
    module, _, path = name.partition(":")
    try:
        return reduce(getattr, path.split("."), import_module(module))
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the network's factory {name} cannot be imported: {error}. Start Python where it can, "
            "on every worker too"
        ) from error


def _source_digest(function: Any) -> str:
    try:
        source = Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError) as error:
        raise ConfigError(f"the source of the network's factory is not found: {error}") from error
    return hashlib.sha256(source).hexdigest()
