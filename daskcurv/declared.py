"""Settings that are declared once: the fields of a dataclass, with their help.

The options of the command line, the keys of a run file and the documentation of the class follow
from the declaration.
"""

from __future__ import annotations

import dataclasses
import textwrap
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from daskcurv.errors import ConfigError

T = TypeVar("T")

_KINDS: dict[type, str] = {
    int: "a whole number", float: "a number", str: "text", Path: "a path",
    bool: "true or false", tuple: "lines of text, or a list of them",
}  # fmt: skip


def setting(default: Any, text: str, *, choices: Sequence[str] = ()) -> Any:
    """Declare a field of a dataclass as a setting.

    Parameters
    ----------
    default : object
        None if there is none, or another setting decides.
    text : str
        What the setting is, on one line, for a user.
    choices : sequence of str
        The values it can have, if they can be listed.
    """
    return dataclasses.field(default=default, metadata={"text": text, "choices": tuple(choices)})


@dataclass(frozen=True)
class Setting:
    """One setting, as it was declared.

    Attributes
    ----------
    name : str
    kind : {int, float, str, Path, bool, tuple}
        A tuple is one of texts.
    default : object
    text : str
    choices : tuple of str
    """

    name: str
    kind: type
    default: Any
    text: str
    choices: tuple[str, ...]

    @property
    def help(self) -> str:
        """What the setting is, and its default if it has one."""
        shown = self.default is not None and self.kind not in (bool, tuple)
        return f"{self.text} (default: {self.default})" if shown else self.text

    def read(self, value: Any, place: str) -> Any:
        """Return a value that was read from a file, of the kind of the setting.

        Parameters
        ----------
        value : object
        place : str
            What has the value, for the message.

        Raises
        ------
        ConfigError
            Saying what is expected.
        """
        if self.kind is float and not isinstance(value, bool):
            # YAML takes 1e-3 for text.
            try:
                return float(value)
            except (TypeError, ValueError):
                pass
        elif self.kind is Path and isinstance(value, str):
            return Path(value)
        elif self.kind is tuple and isinstance(value, str | list | tuple):
            texts = value.splitlines() if isinstance(value, str) else value
            if all(isinstance(text, str) for text in texts):
                return tuple(texts)
        elif type(value) is self.kind:
            return value
        # YAML takes 12:00:00 for a number, and yes for a truth value.
        hint = '; write it in quotes, such as "12:00:00"' if self.kind is str else ""
        raise ConfigError(f"{place} is {value!r}; expected {_KINDS[self.kind]}{hint}")


def settings_of(*classes: type) -> dict[str, Setting]:
    """Return the settings that dataclasses declare, by name."""
    return {name: one for cls in classes for name, one in _declared(cls).items()}


@cache
def _declared(cls: Any) -> Mapping[str, Setting]:
    # Kept, as the values of a class are checked whenever one is made.
    hints = typing.get_type_hints(cls)
    return {
        field.name: Setting(
            field.name,
            _plain(hints[field.name]),
            field.default,
            field.metadata["text"],
            field.metadata["choices"],
        )
        for field in dataclasses.fields(cls)
        if field.metadata
    }


def documented(cls: type[T]) -> type[T]:
    """Add the settings of a dataclass to its docstring."""
    lines = []
    for one in settings_of(cls).values():
        kind = f"{{{', '.join(one.choices)}}}" if one.choices else one.kind.__name__
        optional = ", optional" if one.default is None else ""
        lines.append(f"{one.name} : {kind}{optional}\n{textwrap.indent(one.help, '    ')}")
    section = "\n".join(["", "Attributes", "----------", *lines, ""])
    cls.__doc__ = f"{(cls.__doc__ or '').rstrip()}\n{textwrap.indent(section, '    ')}"
    return cls


def check_choices(values: Any) -> None:
    """Raise `ConfigError` naming a setting of a dataclass whose value is not one of its choices."""
    for one in settings_of(type(values)).values():
        value = getattr(values, one.name)
        if one.choices and value not in one.choices:
            raise ConfigError(f"{one.name} is {value!r}; expected one of {', '.join(one.choices)}")


def _plain(hint: Any) -> type:
    """Return the type of a field's values, leaving out None and what a tuple holds."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    kind: type = typing.get_origin(hint) or hint
    if kind not in _KINDS:
        raise TypeError(f"{hint} is not a kind of setting")
    return kind
