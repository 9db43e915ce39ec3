"""Helpers that add options to a command's parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daskcurv.cli.parser import CommandParser
from daskcurv.runs.options import LaunchOptions

DEFAULTS = LaunchOptions()

_METAVARS: dict[type, str] = {int: "N", float: "X", Path: "PATH", str: "TEXT"}


def verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], text: str
) -> CommandParser:
    """Add a command; its description is `text`."""
    parser: CommandParser = verbs.add_parser(
        name,
        aliases=[name.replace("_", "-")] if "_" in name else [],
        help=text,
        description=text[0].upper() + text[1:] + ".",
        allow_abbrev=False,
    )
    parser.commands = verbs.choices
    parser.set_defaults(run=run, parser=parser)
    return parser


def option(
    parser: Any, name: str, kind: type, text: str, defaults: Any = DEFAULTS, **extra: Any
) -> None:
    """Add an option; if it is not given, it is absent from the parsed arguments.

    Parameters
    ----------
    parser : ArgumentParser or group
    name : str
        Field of `defaults`.
    kind : type
    text : str
        Help, to which the default is added.
    defaults : dataclass instance
    **extra
        Passed on to ``add_argument``.
    """
    if "choices" not in extra:
        extra.setdefault("metavar", _METAVARS[kind])
    default = getattr(defaults, name)
    shown = text if default is None else f"{text} (default: {default})"
    parser.add_argument(f"--{name}", type=kind, default=argparse.SUPPRESS, help=shown, **extra)


def lines(parser: Any, name: str, text: str) -> None:
    """Add an option that can be repeated."""
    parser.add_argument(
        f"--{name}", action="append", default=argparse.SUPPRESS, help=text, metavar="LINE"
    )


def flag(parser: Any, name: str, text: str) -> None:
    """Add an option without a value; if it is not given, it is absent."""
    parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
