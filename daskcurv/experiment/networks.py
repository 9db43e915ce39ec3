"""Networks, as what travels to a worker and is recorded in a store: a factory and its arguments.

The ResNet-18 of `daskcurv.experiment.resnet18` is the one built in, and recognised by the shapes in
a checkpoint. Any other is what a function returns (`Factory`): of a library, of a module that can
be imported, or of a file.
"""

from __future__ import annotations

import hashlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from functools import reduce
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor, nn

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
        ``"package.module:function"``, from where every worker imports it, or ``"net.py:function"``
        of a file.
    num_classes : int
        Outputs of the network.
    source_sha256 : str
        Digest of the file that defines the function; another one is refused.
    arguments : mapping
        Keyword arguments of the function, JSON values.
    directory : Path, optional
        Where the file is, on a file system that the workers can read. Not part of a store's
        identity, so the file can be moved.
    """

    factory: str
    num_classes: int
    source_sha256: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    directory: Path | None = field(default=None, compare=False)

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

    @classmethod
    def named(
        cls, name: str, arguments: Mapping[str, Any], image: Tensor
    ) -> tuple[Factory, nn.Module]:
        """Return the network that a name stands for, and the one that was built to count outputs.

        Parameters
        ----------
        name : str
            ``"torchvision:NAME"``, ``"timm:NAME"``, ``"package.module:factory"``, or
            ``"path/net.py:factory"``.
        arguments : mapping
            Keyword arguments of the factory, JSON values.
        image : Tensor of float32, shape (1, ...)
            A normalised image, to try the network on.

        Raises
        ------
        ConfigError
            If there is no such factory, it fails, or what it returns is no classifier of images.
        """
        where, _, function = name.partition(":")
        directory = None
        if not where or not function:
            raise ConfigError(
                f"model is {name!r}; expected resnet18-lop, torchvision:NAME, timm:NAME, "
                "package.module:factory or path/net.py:factory"
            )
        if where == "torchvision":
            where = "torchvision.models"
        elif where == "timm":
            where, function, arguments = (
                "timm",
                "create_model",
                {"model_name": function, **arguments},
            )
        elif where.endswith(".py"):
            directory = Path(where).absolute().parent
            where = Path(where).name
        factory = f"{where}:{function}"
        made_by = _found(factory, directory)
        digest = _source_digest(made_by)
        model = _made(made_by, factory, arguments)
        outputs = outputs_of(model, image, name)
        return cls(factory, outputs, digest, arguments, directory), model

    def build(self) -> nn.Module:
        """Return the network, with whatever weights.

        Raises
        ------
        ConfigError
            If the factory cannot be imported, is not the one recorded, or returns no network.
        """
        function = _found(self.factory, self.directory)
        if _source_digest(function) != self.source_sha256:
            raise ConfigError(
                f"the file that defines {self.factory} is not the one recorded: it has changed, or "
                "is another one on this machine. Restore it, or choose another --store"
            )
        return _made(function, self.factory, self.arguments)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dictionary."""
        known = {**asdict(self), "arguments": dict(self.arguments)}
        del known["directory"]
        return known


def outputs_of(model: nn.Module, image: Tensor, name: str) -> int:
    """Return how many outputs a network has for an image.

    Raises
    ------
    ConfigError
        If it fails, or does not return logits of shape (1, C).
    """
    try:
        with torch.no_grad():
            logits = model.eval()(image)
    except Exception as error:
        raise ConfigError(
            f"the network {name} fails on an image of shape {tuple(image.shape[1:])}: {error}. "
            "Check --model_args, --image_size and the data set's channels"
        ) from error
    if isinstance(logits, Tensor) and logits.ndim == 2 and len(logits) == 1:
        return logits.shape[1]
    given = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    raise ConfigError(
        f"the network {name} returns {given} for one image; expected logits of shape (1, C). Write "
        "a factory that returns a torch.nn.Module whose forward picks them, such as "
        "lambda images: network(images).logits"
    )


def network_of(recorded: Mapping[str, Any], directory: Path | None = None) -> Network:
    """Return the network that a store's identity records under ``model``.

    Parameters
    ----------
    recorded : mapping
    directory : Path, optional
        Where its file is, if it is made by one.
    """
    if "factory" in recorded:
        return Factory(**recorded, directory=directory)
    return ModelSpec(**recorded)


def _made(function: Any, name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """Return the network that a factory makes."""
    try:
        model = function(**arguments)
    except Exception as error:
        # It is the user's own code, or a library's that refuses its arguments.
        raise ConfigError(
            f"the factory {name} fails with the arguments {dict(arguments)}: "
            f"{type(error).__name__}: {error}. Set them with --model_args"
        ) from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{name} returned a {type(model).__name__}; expected a torch.nn.Module")
    return model


def _found(name: str, directory: Path | None) -> Any:
    """Return a factory by its name, from a file of the directory or by importing it."""
    where, _, path = name.partition(":")
    if not where.endswith(".py"):
        return _imported(name)
    if directory is None:
        raise ConfigError(
            f"the network is made by {name}, a file whose place is not on record; name it with "
            f"--model PATH/{name}"
        )
    file = directory / where
    spec = spec_from_file_location(f"_daskcurv_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    try:
        # Where classes are looked up by their module, as dataclasses do.
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return reduce(getattr, path.split("."), module)
    except FileNotFoundError as error:
        raise ConfigError(f"the network's file {file} does not exist; check --model") from error
    except AttributeError as error:
        raise ConfigError(
            f"the network's file {file} has no {path}: {error}{_close(path, module)}"
        ) from error
    except Exception as error:
        raise ConfigError(
            f"the network's file {file} cannot be imported: {type(error).__name__}: {error}. What "
            "it imports has to be installed where workers run; other files beside it are not found"
        ) from error


def _imported(name: str) -> Any:
    where, _, path = name.partition(":")
    file = Path(*where.split(".")).with_suffix(".py")
    hint = "Start Python where it can, on every worker too"
    if file.is_file():
        hint = f"If the file {file} is meant, write {file}:{path}"
    try:
        module = import_module(where)
    except ImportError as error:
        raise ConfigError(
            f"the network's factory {name} cannot be imported: {error}. {hint}"
        ) from error
    try:
        return reduce(getattr, path.split("."), module)
    except AttributeError as error:
        raise ConfigError(
            f"the network's factory {name} cannot be imported: {error}{_close(path, module)}"
        ) from error


def _close(path: str, module: ModuleType) -> str:
    """Return what a name may have been meant to be, as the end of a message; else nothing."""
    names = [name for name, value in vars(module).items() if callable(value)]
    close = get_close_matches(path, names, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def _source_digest(function: Any) -> str:
    try:
        source = Path(inspect.getfile(function)).read_bytes()
    except (TypeError, OSError) as error:
        raise ConfigError(f"the source of the network's factory is not found: {error}") from error
    return hashlib.sha256(source).hexdigest()
