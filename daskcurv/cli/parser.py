"""Parsing of the command line: short help, and suggestions for what was mistyped."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Collection, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn


class CommandParser(argparse.ArgumentParser):
    """A parser whose ``--help`` can be limited to the options that most people need.

    Attributes
    ----------
    common : collection of str
        Names of the options that ``--help`` shows; ``--help_all`` shows all of them. If empty,
        ``--help`` does.
    commands : mapping of str to CommandParser
        The program's commands, for suggestions.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.common: Collection[str] = ()
        self.commands: Mapping[str, CommandParser] = {}

    def limit_help(self, common: Collection[str]) -> None:
        """Show only `common` options in ``--help``, and add ``--help_all``."""
        self.common = common
        self.add_argument(
            "--help_all",
            action=_HelpAll,
            nargs=0,
            default=argparse.SUPPRESS,
            help="show all options and exit",
        )

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Refuse what is no command or option, with a suggestion, before anything else is wrong."""
        for word in args or ():
            if word == "--":
                break
            if self._subparsers and not word.startswith("-"):
                if word not in self.commands:
                    self.error(f"there is no command {word!r}{_suggest(word, self.commands)}")
                break
            name = word.partition("=")[0]
            if word.startswith("--") and " " not in word and not self.has_option(name):
                self.error(f"unknown option {name}{self._hint(name)}")
        return super().parse_known_args(args, namespace)

    def has_option(self, name: str) -> bool:
        """Report whether there is an option of this name, such as ``--store``."""
        return name in self._option_string_actions

    def format_usage(self) -> str:
        """Return the usage, on one line."""
        formatter = self._get_formatter()
        formatter.add_usage(self._usage(), [], [])
        return formatter.format_help()

    def format_help(self, everything: bool = False) -> str:
        """Return the help, with all options if `everything`, else with the common ones."""
        formatter = self._get_formatter()
        formatter.add_usage(self._usage(), [], [])
        formatter.add_text(self.description)
        for group in self._action_groups:
            shown = [
                action for action in group._group_actions if everything or self._is_common(action)
            ]
            if shown:
                formatter.start_section(group.title)
                formatter.add_text(group.description)
                formatter.add_arguments(shown)
                formatter.end_section()
        formatter.add_text(self.epilog)
        hidden = sum(not self._is_common(action) for action in self._actions)
        if hidden and not everything:
            formatter.add_text(
                f"--help_all also shows {hidden} options that are needed less often."
            )
        return formatter.format_help()

    def error(self, message: str) -> NoReturn:
        """Print the usage in one line and the message, and exit with code 2."""
        self.exit(2, f"{self.format_usage()}{self.prog}: error: {message}\n")

    def _usage(self) -> str:
        words = [self.prog.replace("%", "%%"), "[options]"]
        for action in self._actions:
            if action.option_strings and action.required:
                words.append(f"{action.option_strings[0]} {action.metavar or action.dest.upper()}")
            elif not action.option_strings:
                name = str(action.metavar or action.dest)
                words.append(f"[{name}]" if action.nargs == "?" else name)
        return " ".join([*words, "..."] if self._subparsers else words)

    def _is_common(self, action: argparse.Action) -> bool:
        always = not action.option_strings or action.required or action.dest in ("help", "help_all")
        return not self.common or always or action.dest in self.common

    def _hint(self, name: str) -> str:
        if name[2:] in [one.dest for one in self._actions if not one.option_strings]:
            return f"; {name[2:]} is given without an option's name: {self._usage()}"
        others = {parser.prog for parser in self.commands.values() if parser.has_option(name)}
        if others:
            return f"; it is an option of {', '.join(sorted(others))}"
        help_option = "--help_all" if self.common else "--help"
        return (
            _suggest(name, self._option_string_actions)
            or f"; {self.prog} {help_option} lists the options"
        )


class _HelpAll(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> NoReturn:
        assert isinstance(parser, CommandParser)
        parser._print_message(parser.format_help(everything=True), sys.stdout)
        parser.exit()


def _suggest(word: str, known: Collection[str]) -> str:
    """Return a suggestion to add to a message; empty if nothing is close."""
    close = get_close_matches(word, known, n=1, cutoff=0.7)
    return f"; did you mean {close[0]}?" if close else ""
