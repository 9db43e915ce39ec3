"""How a training run names its weight files: patterns of names and paths.

A pattern is a name, or a path below a directory, in which ``{epoch}``, ``{step}``, ``{task}`` and
``{experiment}`` (or ``{run}``) stand for numbers and ``*`` for anything in one part of the path.
``{epoch:03d}`` is the same as ``{epoch}``: numbers are read with whatever zeros before them. Where
a pattern has neither epoch nor step, the contents of the files have to say it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from daskcurv.errors import ConfigError

_PLACEHOLDER = re.compile(r"\{(?P<kind>\w+)(?::[^{}]*)?\}|\*")

_NUMBERS = ("epoch", "step", "task", "experiment")

_VARIANTS = {"order": r"\w+", "percent": r"\d{1,3}(?:\.\d{1,9})?"}
"""What later names of the first training run say besides numbers."""

_SYNONYMS = {"run": "experiment"}

Values = Mapping[str, int | str]
"""What a name says, by placeholder."""


@dataclass(frozen=True)
class Naming:
    """How a training run names its weight files.

    Attributes
    ----------
    patterns : tuple of str
        Names with ``{epoch}``, ``{step}`` where there are no epochs, or neither if the files
        themselves state their epochs, and ``{experiment}`` if several runs share a directory.
    alike : str
        Regular expression that finds experiment and epoch in names that are spelled differently, or
        have something added; by default such names are not looked for.
    later : tuple of str
        Patterns for files that have none of those names.
    """

    patterns: tuple[str, ...]
    alike: str = "(?!)"
    later: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for pattern in (*self.patterns, *self.later):
            _check(pattern)

    @classmethod
    def of(cls, pattern: str) -> tuple[Path, Naming]:
        """Return the directory that a path pattern starts from, and the naming below it.

        Raises
        ------
        ConfigError
            If the pattern cannot be used.
        """
        parts = Path(pattern).parts
        if parts[:1] == ("~",):
            parts = (*Path.home().parts, *parts[1:])
        if not parts:
            raise ConfigError("the name pattern is empty; expected a path such as 'run/{epoch}.pt'")
        placed = (n for n, part in enumerate(parts) if _PLACEHOLDER.search(part))
        fixed = next(placed, len(parts) - 1)
        return Path(*parts[:fixed]), cls(("/".join(parts[fixed:]),))

    def example(self, experiment_index: int | str, epoch: int | str) -> str:
        """Return the name of a file."""
        values = {"experiment": experiment_index, "epoch": epoch}
        return filled(self.patterns[0], values)

    def parse(self, name: str, experiment_index: int) -> tuple[int, int] | None:
        """Return the experiment and the epoch that a name stands for, or None if for none.

        A name that does not say its experiment is of any.
        """
        for pattern in self.patterns:
            if (found := values_in(name, pattern)) is not None:
                return int(found.get("experiment", experiment_index)), number_of(found)
        return None


def number_of(values: Values) -> int:
    """Return the epoch that a name says, or the step if it says none."""
    return int(values["epoch"] if "epoch" in values else values["step"])


def is_numbered(values: Values) -> bool:
    """Return whether a name says an epoch or a step."""
    return "epoch" in values or "step" in values


def is_fixed(component: str) -> bool:
    """Return whether a part of a pattern stands for one name only."""
    return not _PLACEHOLDER.search(component)


def values_in(name: str, component: str) -> Values | None:
    """Return what a name says, read with a pattern without directories; None if it does not fit."""
    if not (match := _expression(component).fullmatch(name)):
        return None
    found = match.groupdict()
    return {kind: int(text) if kind in _NUMBERS else text for kind, text in found.items()}


def filled(pattern: str, values: Values) -> str:
    """Return a pattern with values in place of their placeholders; others stay as they are."""

    def fill(match: re.Match[str]) -> str:
        return str(values.get(_kind(match), match[0]))

    return _PLACEHOLDER.sub(fill, pattern)


def narrowed(pattern: str, values: Values) -> str:
    """Return the pattern of the files that are like one of its files in all but numbers."""
    return filled(pattern, {kind: values[kind] for kind in _VARIANTS if kind in values})


def has_variants(pattern: str) -> bool:
    """Return whether a pattern stands for files that differ in more than numbers."""
    return any(kind in _VARIANTS for kind in _kinds(pattern))


def _kind(match: re.Match[str]) -> str:
    """Return what a placeholder stands for; nothing is anything."""
    kind = match["kind"] or ""
    return _SYNONYMS.get(kind, kind)


def _kinds(pattern: str) -> Iterator[str]:
    return (_kind(match) for match in _PLACEHOLDER.finditer(pattern))


@lru_cache
def _expression(component: str) -> re.Pattern[str]:
    """Return the regular expression for a pattern without directories."""
    written = ""
    end, before = 0, ""
    for match in _PLACEHOLDER.finditer(component):
        written += re.escape(component[end : match.start()])
        kind = _kind(match)
        if not kind:
            # As in a shell, names that begin with a dot are not meant.
            written += "[^/]*" if match.start() else r"(?!\.)[^/]*"
        elif kind in _VARIANTS:
            written += f"(?P<{kind}>{_VARIANTS[kind]})"
        else:
            # A number beside a * is whole: the * has none of its digits.
            start = r"(?<!\d)" if before == "*" and match.start() == end else ""
            stop = r"(?!\d)" if component[match.end() :].startswith("*") else ""
            written += rf"{start}(?P<{kind}>\d{{1,9}}){stop}"
        end, before = match.end(), match[0]
    return re.compile(written + re.escape(component[end:]))


def _check(pattern: str) -> None:
    """Raise `ConfigError` if a pattern cannot be used."""
    kinds = [kind for kind in _kinds(pattern) if kind]
    for kind in kinds:
        if kind not in (*_NUMBERS, *_VARIANTS):
            raise ConfigError(
                f"the name pattern {pattern!r} has {{{kind}}}; expected {{epoch}}, {{step}}, "
                "{task}, {experiment} (or {run}), and * for anything else"
            )
    if len(set(kinds)) < len(kinds):
        raise ConfigError(
            f"the name pattern {pattern!r} can have {{epoch}} (or {{step}}, if its files are named "
            "by steps), {task} and {experiment} only once each; where a number is repeated, write *"
        )
    if "**" in pattern or re.search(r"\}\{", pattern):
        raise ConfigError(
            f"the name pattern {pattern!r} has two placeholders side by side, so that it is not "
            "clear where one ends; expected something between them. * stands for one part of a "
            "path; write */* for two"
        )


INCREMENTAL_CIFAR = Naming(
    ("index-{experiment}_epoch-{epoch}.pt", "checkpoint_index-{experiment}_epoch-{epoch}.pt"),
    alike=r"(?i)index\D{0,3}(\d{1,9})\D{1,3}epoch\D{0,3}(\d{1,9})",
    later=(
        "checkpoint_{order}_task-{task}_epoch-{epoch}.pt",
        "checkpoint_original_index-{experiment}_epoch-{epoch}.pt",
        "checkpoint_{percent}pct_index-{experiment}_epoch-{epoch}.pt",
    ),
)
"""The names of the training run that the documentation describes, of all its versions.

Where a name has a task, epochs count from 0 within it.
"""
