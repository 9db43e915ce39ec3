"""Helpers that add options to a command's parser."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

from daskcurv.cli.parser import CommandParser
from daskcurv.runs.options import SETTINGS

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


def options(parser: Any, *names: str, **texts: str) -> None:
    """Add settings of a launch as options; one that is not given is absent from the arguments.

    Parameters
    ----------
    parser : ArgumentParser or group
    *names : str
    **texts : str
        Help of settings that mean something else to the command than to a launch.
    """
    for name in (*names, *texts):
        one = SETTINGS[name]
        text = texts.get(name, one.help)
        how: dict[str, Any] = {"dest": name, "default": argparse.SUPPRESS, "help": text}
        if one.kind is bool and one.default:
            name = f"no_{name}"
            how |= {"action": "store_false", "help": f"do not {text}"}
        elif one.kind is bool:
            how |= {"action": "store_true"}
        elif one.kind is tuple:
            how |= {"action": "append", "metavar": "LINE"}
        elif one.choices:
            how |= {"type": one.kind, "choices": one.choices}
        else:
            how |= {"type": one.kind, "metavar": _METAVARS[one.kind]}
        parser.add_argument(f"--{name}", **how)


def flag(parser: Any, name: str, text: str) -> None:
    """Add an option without a value; if it is not given, it is absent."""
    parser.add_argument(f"--{name}", action="store_true", default=argparse.SUPPRESS, help=text)
