"""Where the weights are in what a checkpoint file holds.

A training run may save a bare state dict (parameter names to tensors), a dictionary that has it
under a key, or one whose names have something before them because the network was wrapped when it
was saved. A `Payload` says which; `find_payload` finds it out, and refuses what is ambiguous.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from daskcurv.errors import CheckpointError
from daskcurv.places import listed

log = logging.getLogger(__name__)

KEYS = ("state_dict", "model_state_dict", "model", "net", "network", "module")
"""Keys under which training code keeps the weights."""

AVERAGED = ("model_ema", "state_dict_ema", "ema_state_dict", "model_ema_state_dict", "ema")
"""Keys under which it keeps a moving average of them beside."""

COUNTS = ("epoch", "global_step")
"""Keys under which it keeps how far the training is."""

WRAPPERS = ("module", "_orig_mod")
"""What DataParallel and torch.compile put before the names of the network they wrap."""

ATTRIBUTES = ("model", "net", "network")
"""What training code calls the network that is a part of another object, as in Lightning."""


@dataclass(frozen=True)
class Payload:
    """Where the weights are in a file; by default the file is a bare state dict.

    Attributes
    ----------
    key : str
        Key of the dictionary that has the weights, dotted if it is in another one.
    prefix : str
        What all names begin with, and the network's do not.
    inside : tuple of str
        Beginnings of names, after `prefix`, whose last part the network's names do not have:
        ``"features.module."`` where ``features`` was wrapped.
    """

    key: str = ""
    prefix: str = ""
    inside: tuple[str, ...] = ()

    @classmethod
    def of(cls, recorded: Mapping[str, Any]) -> Payload:
        """Return what a store's identity records under ``payload``; see `to_dict`."""
        return cls(**{**recorded, "inside": tuple(recorded.get("inside", ()))})

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a JSON-able dictionary."""
        return {**asdict(self), "inside": list(self.inside)}

    def __str__(self) -> str:
        parts = [f"under {self.key!r}"] if self.key else []
        parts += [f"names without {part!r}" for part in (self.prefix, *self.inside) if part]
        return ", ".join(parts) or "a bare state dict"


BARE = Payload()
"""The file is a bare state dict of the network's own names."""


def find_payload(
    content: Any, path: Path, expected: Collection[str] | None = None, *, key: str = ""
) -> Payload:
    """Find the weights in what a file holds.

    Parameters
    ----------
    content : object
        What the file holds.
    path : Path
        For messages.
    expected : collection of str, optional
        The network's names. With them, names are changed only if more of them fit then; without,
        only what `WRAPPERS` put there is removed.
    key : str
        Where the user says that the weights are, dotted if in a dictionary in another one.

    Raises
    ------
    CheckpointError
        If there are no weights, or several to choose from.
    """
    if not key and not is_state_dict(content):
        key = _only_key(content, path)
    names = list(_at(content, key, path))
    return _fitted(key, names, expected)


def weights_in(content: Any, payload: Payload, path: Path) -> dict[str, Tensor]:
    """Return the weights in what a file holds.

    Parameters
    ----------
    content : object
        What the file holds.
    payload : Payload
        Where they are.
    path : Path
        For messages.

    Raises
    ------
    CheckpointError
        If there is something else there, or the weights are not dense tensors.
    """
    weights = _at(content, payload.key, path)
    if other := [name for name in weights if not name.startswith(payload.prefix)]:
        raise CheckpointError(
            f"checkpoint {path} has weights whose names do not begin with {payload.prefix!r}, as "
            f"those of the first file do: {listed(other)}. Use files that were saved alike"
        )
    unusual = {name: kind for name, value in weights.items() if (kind := _unusual(value))}
    if unusual:
        raise CheckpointError(
            f"checkpoint {path} has weights that are not dense tensors of numbers: "
            f"{listed([f'{name} is {kind}' for name, kind in unusual.items()])}. Save the state "
            "dict of the network on a real device, without sparse or quantized weights"
        )
    renamed = dict(zip(_renamed(weights, payload), weights.values(), strict=True))
    if len(renamed) < len(weights):
        raise CheckpointError(
            f"checkpoint {path} has names that are the same without "
            f"{_quoted(filter(None, (payload.prefix, *payload.inside)))}, which the first file's "
            "names had too much. Use files that were saved alike"
        )
    return renamed


def numbers_in(content: Any) -> dict[str, int]:
    """Return the epoch and the step that a file's contents state, by the key in `COUNTS`."""
    found = {}
    for key in COUNTS:
        number = content.get(key) if isinstance(content, Mapping) else None
        if isinstance(number, Tensor) and number.ndim == 0 and not number.is_meta:
            number = number.item()
        if isinstance(number, (int, np.integer)) and not isinstance(number, bool) and number >= 0:
            found[key] = int(number)
    return found


def is_state_dict(content: Any) -> TypeGuard[Mapping[str, Tensor]]:
    """Return whether something is a mapping of names to tensors."""
    return isinstance(content, Mapping) and all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    )


def _places(content: Any, depth: int = 2) -> Iterator[str]:
    """Yield the keys in a file's contents that have weights, dotted where they are nested."""
    if not isinstance(content, Mapping):
        return
    for key, value in content.items():
        if not isinstance(key, str) or not isinstance(value, Mapping) or not value:
            continue
        if is_state_dict(value):
            yield key
        elif depth > 1:
            yield from (f"{key}.{inner}" for inner in _places(value, depth - 1))


def _only_key(content: Any, path: Path) -> str:
    places = list(_places(content))
    usual = [key for key in places if key in KEYS]
    if len(usual) > 1:
        raise CheckpointError(
            f"checkpoint {path} has weights under {_quoted(usual)}; name the one to use with "
            "--weights_key"
        )
    if not usual:
        nearly = [key for key in KEYS if any(isinstance(v, Tensor) for v in _values(content, key))]
        if not nearly:
            raise CheckpointError(_not_bare(content, path))
        # There is something else among the weights; whoever takes them says what.
        return nearly[0]
    if averaged := [key for key in places if key.split(".")[0] in AVERAGED]:
        log.info(
            "%s also has averaged weights under %s; those under %s are used. To use the averaged "
            "ones, name them with --weights_key",
            path,
            _quoted(averaged),
            usual[0],
        )
    return usual[0]


def _values(content: Any, key: str) -> Iterable[Any]:
    """Return the values of the dictionary under a key, if there is one."""
    found = content.get(key) if isinstance(content, Mapping) else None
    return found.values() if isinstance(found, Mapping) else ()


def _at(content: Any, key: str, path: Path) -> Mapping[str, Tensor]:
    """Return the state dict under a key of a file's contents."""
    found = _under(content, key) if key else [content]
    if not found:
        held = [str(name) for name in content] if isinstance(content, Mapping) else []
        has = f"it has {_quoted(held)}" if held else f"it is {_kind(content)}"
        if is_state_dict(content):
            has = "it is a bare state dict (parameter names to tensors): leave out --weights_key"
        raise CheckpointError(f"checkpoint {path} has nothing under {key!r}; {has}{_hint(content)}")
    weights = found[0]
    if is_state_dict(weights):
        return weights
    if not key:
        raise CheckpointError(_not_bare(content, path))
    if not isinstance(weights, Mapping):
        problem = f"there is {_kind(weights)}"
    else:
        wrong = [f"{k} is {_kind(v)}" for k, v in weights.items() if not isinstance(v, Tensor)]
        numbered = [f"{k!r} is no name" for k in weights if not isinstance(k, str)]
        problem = listed(wrong or numbered)
    raise CheckpointError(
        f"checkpoint {path} has no state dict (parameter names to tensors) under {key!r}: "
        f"{problem}{_hint(content)}"
    )


def _under(content: Any, key: str) -> list[Any]:
    """Return what is under a key, which may be dotted or have dots itself; or nothing."""
    if not isinstance(content, Mapping):
        return []
    if key in content:
        return [content[key]]
    cuts = [place for place, character in enumerate(key) if character == "."]
    for cut in cuts:
        if key[:cut] in content and (found := _under(content[key[:cut]], key[cut + 1 :])):
            return found
    return []


def _not_bare(content: Any, path: Path) -> str:
    return (
        f"checkpoint {path} is not a bare state dict (parameter names to tensors); use the files "
        f"under model_parameters/, not the pickles of experiment_checkpoints/{_hint(content)}"
    )


def _hint(content: Any) -> str:
    """Return where the weights seem to be, as the end of a message; else nothing."""
    places = list(_places(content))
    if not places:
        return ""
    return f". Weights seem to be under {_quoted(places)}: name where with --weights_key"


def _quoted(names: Iterable[str]) -> str:
    return listed([repr(name) for name in names])


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _fitted(key: str, names: list[str], expected: Collection[str] | None) -> Payload:
    """Return the payload under which the fewest changes of names make the most of them fit."""
    prefixes = _prefixes(names, expected)
    insides = [
        _inside([name[len(prefix) :] for name in names], expected or ()) for prefix in prefixes
    ]
    choices = [Payload(key, prefix) for prefix in prefixes]
    choices += [Payload(key, *both) for both in zip(prefixes, insides, strict=True) if both[1]]
    if expected is not None:
        wanted = set(expected)
        fits = [len(wanted.intersection(_renamed(names, choice))) for choice in choices]
        if any(fits):
            return choices[fits.index(max(fits))]
    only_wrappers = [c for c in choices if set(c.prefix.split(".")[:-1]) <= set(WRAPPERS)]
    return max(only_wrappers, key=lambda choice: (len(choice.prefix), len(choice.inside)))


def _prefixes(names: list[str], expected: Collection[str] | None) -> list[str]:
    """Return what can be removed from the beginning of all names, shortest first."""
    if not names:
        return [""]
    split = [name.split(".")[:-1] for name in names]
    shared = [
        parts[0] for parts in takewhile(lambda p: len(set(p)) == 1, zip(*split, strict=False))
    ]
    known = {*WRAPPERS, *ATTRIBUTES}
    usual = len(list(takewhile(known.__contains__, shared)))
    wanted = set(expected or ())
    prefixes = [".".join([*shared[:length], ""]) for length in range(len(shared) + 1)]
    prefixes[0] = ""
    # Names that training code made up are removed only if nothing else is wrong then.
    return prefixes[: usual + 1] + [
        prefix
        for prefix in prefixes[usual + 1 :]
        if wanted == {name.removeprefix(prefix) for name in names}
    ]


def _inside(names: list[str], expected: Collection[str]) -> tuple[str, ...]:
    """Return where wrapped parts of the network are: beginnings of names that end in a wrapper.

    The network itself may have parts of such names, which are among the expected ones.
    """
    following: dict[str, set[str]] = {}
    for name in names:
        parts = name.split(".")
        for place in range(1, len(parts)):
            following.setdefault(".".join(parts[:place]), set()).add(
                parts[place] if place < len(parts) - 1 else ""
            )
    places = [
        f"{parent}.{wrapper}."
        for parent, parts in following.items()
        for wrapper in WRAPPERS
        if parts == {wrapper}
    ]
    return tuple(p for p in places if not any(name.startswith(p) for name in expected))


def _renamed(names: Iterable[str], payload: Payload) -> list[str]:
    """Return the network's names for those in the file, in the same order."""
    renamed = [name[len(payload.prefix) :] for name in names]
    # The longest first, as the shorter ones are their beginnings.
    for place in sorted(payload.inside, key=len, reverse=True):
        shorter = place[: place[:-1].rindex(".") + 1]
        renamed = [
            shorter + name[len(place) :] if name.startswith(place) else name for name in renamed
        ]
    return renamed


def _unusual(tensor: Tensor) -> str:
    """Return in which way a tensor has no values of its own for each entry, or nothing."""
    if tensor.is_meta:
        return "without values (device meta)"
    if tensor.is_quantized:
        return f"quantized ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    return ""
