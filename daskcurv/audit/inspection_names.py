"""Which number in the names of weight files is the epoch, and the pattern that fits them."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from daskcurv.errors import CheckpointError, ConfigError
from daskcurv.experiment.naming import INCREMENTAL_CIFAR, Naming, values_in
from daskcurv.experiment.search import discover, find

_WORDS = {
    "epoch": r"epochs?[\W_]*$|(?<![a-z])(?:ep|e)[\W_]*$",
    "step": r"steps?[\W_]*$|(?<![a-z])iter(?:ation)?s?[\W_]*$",
    "task": r"(?<![a-z])tasks?[\W_]*$",
    "experiment": r"(?<![a-z])(?:index|experiment|exp|run|seed|fold|trial|rep)[\W_]*$",
}
"""What stands before a number in a name, by what the number is."""

_LONGEST = 9
"""Digits of a number that a pattern can read."""


@dataclass(frozen=True)
class FileNames:
    """Names of weight files that differ only in numbers, and what the numbers are.

    Attributes
    ----------
    paths : tuple of Path
        In the order of their epochs.
    pattern : str
        As ``--checkpoints`` takes it; empty if it is not known which number is the epoch.
    counted : str
        What the pattern's number is called: epoch or step.
    epochs : tuple of int
        Of all files, sorted, each once.
    others : mapping
        Values of the pattern's other numbers that a launch has to choose from: experiment, task.
    varying : tuple of str
        Each number that varies: where it is in the names, and its range.
    how : str
        How the epoch was told from other numbers, or why it was not.
    directory : Path, optional
        Where files are that have the names of the documented run.
    surplus : int
        Files that the pattern fits besides.
    unnumbered : str
        The pattern with * for each number that varies.
    """

    paths: tuple[Path, ...]
    pattern: str
    counted: str
    epochs: tuple[int, ...]
    others: dict[str, tuple[int, ...]]
    varying: tuple[str, ...]
    how: str
    directory: Path | None = None
    surplus: int = 0
    unnumbered: str = ""


def names_of_files(paths: Iterable[Path]) -> list[FileNames]:
    """Return the files in groups whose names differ only in numbers."""
    alike: dict[tuple[str, ...], list[Path]] = defaultdict(list)
    for path in paths:
        alike[tuple(_split(path)[::2])].append(path)
    return [_names(group) for group in alike.values()]


def _split(path: Path) -> list[str]:
    """Return a path's texts and, at odd places, the numbers between them."""
    return re.split(r"(\d+)", str(path))


def _names(paths: list[Path]) -> FileNames:
    rows = [_split(path) for path in paths]
    numbers = range(1, len(rows[0]), 2)
    values = {place: [int(row[place]) for row in rows] for place in numbers}
    varying = [p for p in numbers if len({row[p] for row in rows}) > 1]
    ranges = tuple(
        f"{_around(rows[0], p)}: {min(values[p])} … {max(values[p])}, {len(set(values[p]))} values"
        for p in varying
    )
    kinds = {place: _called(rows[0], place) for place in numbers}
    readable = [p for p in numbers if all(len(row[p]) <= _LONGEST for row in rows)]
    place, how = _epoch_place(rows, varying, readable, kinds)
    if place is None:
        unnumbered = "".join("*" if p in varying else text for p, text in enumerate(rows[0]))
        return FileNames(
            tuple(sorted(paths)), "", "epoch", (), {}, ranges, how, unnumbered=unnumbered
        )
    roles = _roles(place, values, varying, kinds)
    if any(character in text for text in rows[0][::2] for character in "{}*"):
        how = "the path has { } or *, which stand for something in a pattern; rename it"
        return FileNames(tuple(sorted(paths)), "", "epoch", (), {}, ranges, how)
    pattern = "".join(roles.get(p, text) for p, text in enumerate(rows[0]))
    others = {
        role[1:-1]: tuple(sorted(set(values[p])))
        for p, role in roles.items()
        if role in ("{experiment}", "{task}")
    }
    order = sorted(
        range(len(paths)), key=lambda i: (values[place][i], [values[p][i] for p in varying])
    )
    ordered = tuple(paths[i] for i in order)
    epochs = tuple(sorted(set(values[place])))
    problem, surplus = _tried(pattern, ordered, others)
    if problem:
        return FileNames(ordered, "", "epoch", epochs, others, ranges, problem)
    documented, directory = _documented(ordered)
    counted = "step" if "{step}" in pattern else "epoch"
    return FileNames(
        ordered, pattern, counted, epochs, others if directory is None else documented,
        ranges, how, directory, surplus,
    )  # fmt: skip


def _around(row: list[str], place: int) -> str:
    """Return a number's surroundings in its name, with N in its place."""
    before = re.split(r"[/]", row[place - 1])[-1]
    return f"{before}N{re.split('[/]', row[place + 1])[0]}"


def _called(row: list[str], place: int) -> str:
    """Return what the words around a number say that it is; nothing if they do not."""
    for kind, before in _WORDS.items():
        if re.search(before, row[place - 1], re.IGNORECASE):
            return kind
    after = re.match(r"(epochs?|ep)(?![a-z])", row[place + 1], re.IGNORECASE)
    return "epoch" if after else ""


def _epoch_place(
    rows: list[list[str]], varying: list[int], readable: list[int], kinds: dict[int, str]
) -> tuple[int | None, str]:
    """Return where the epoch is in the names, and how it was told; or why it was not."""
    for kind in ("epoch", "step"):
        # One that varies before one that does not, and a name before the directories above it.
        called = [p for p in readable if kinds[p] == kind]
        if called:
            chosen = [p for p in called if p in varying] or called
            return chosen[-1], f"the names call it {kind}"
    if not varying:
        return None, "no number in the name is called epoch"
    open_to = [p for p in varying if p in readable and not kinds[p]]
    if len(varying) == 1 and open_to:
        return open_to[0], "it is the only number that varies"
    distinct = [p for p in open_to if len({row[p] for row in rows}) == len(rows)]
    if len(distinct) == 1:
        return distinct[0], "of the numbers that vary, it alone is another one in every name"
    if not open_to:
        return None, "the numbers that vary are called something else than epoch"
    return None, "several numbers vary, and nothing tells which is the epoch"


def _roles(
    place: int, values: dict[int, list[int]], varying: list[int], kinds: dict[int, str]
) -> dict[int, str]:
    """Return what stands for each number that a pattern leaves open."""
    roles = {place: "{step}" if kinds[place] == "step" else "{epoch}"}
    repeated = len(set(values[place])) < len(values[place])
    others = [p for p in varying if p != place]
    for other in others:
        kind = kinds[other]
        if kind == "task" and not repeated:
            kind = ""
        elif repeated and not kind and len(others) == 1:
            kind = "experiment"
        taken = f"{{{kind}}}" in roles.values()
        roles[other] = f"{{{kind}}}" if kind in ("experiment", "task") and not taken else "*"
    return roles


def _tried(
    pattern: str, paths: tuple[Path, ...], others: dict[str, tuple[int, ...]]
) -> tuple[str, int]:
    """Return why a launch would not take the files by a pattern, and what it takes besides."""
    fitting: set[Path] = set()
    try:
        root, naming = Naming.of(pattern)
        for experiment in others.get("experiment", (None,)):
            for task in others.get("task", (None,)):
                try:
                    found = find(root, naming, experiment=experiment, task=task)
                except CheckpointError:
                    # Not every experiment has every task.
                    if experiment is None or task is None:
                        raise
                    continue
                fitting |= set(found.values())
    except (CheckpointError, ConfigError) as error:
        return str(error), 0
    if missing := sorted(set(paths) - fitting):
        return f"the pattern {pattern} would not find {missing[0]}", 0
    return "", len(fitting - set(paths))


def _documented(paths: tuple[Path, ...]) -> tuple[dict[str, tuple[int, ...]], Path | None]:
    """Return what to choose from if the names are the documented run's, and their directory."""
    directory = paths[0].parent
    if any(path.parent != directory for path in paths):
        return {}, None
    for pattern in (*INCREMENTAL_CIFAR.patterns, *INCREMENTAL_CIFAR.later):
        read = [values_in(path.name, pattern) for path in paths]
        found = [values for values in read if values is not None]
        if len(found) < len(paths):
            continue
        others = {
            kind: tuple(sorted({int(values[kind]) for values in found}))
            for kind in ("experiment", "task")
            if kind in found[0]
        }
        first = {kind: chosen[0] for kind, chosen in others.items()}
        try:
            there = discover(directory, first.get("experiment", 0), task=first.get("task"))
        except CheckpointError:
            return {}, None
        # A launch takes files of later names only where there are no others.
        taken = set(there.values()) & set(paths)
        return (others, directory) if taken else ({}, None)
    return {}, None
