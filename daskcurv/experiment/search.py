"""The weight files of a training run, found by their names."""

from __future__ import annotations

import difflib
import logging
import os
import re
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from daskcurv.errors import CheckpointError
from daskcurv.experiment.naming import (
    INCREMENTAL_CIFAR,
    Naming,
    Values,
    filled,
    has_variants,
    is_fixed,
    is_numbered,
    narrowed,
    number_of,
    values_in,
)
from daskcurv.experiment.payload import COUNTS, numbers_in
from daskcurv.experiment.weight_files import READERS, look_into
from daskcurv.places import listed, names_in

log = logging.getLogger(__name__)

_OPTIONS = {"experiment": "--experiment_index", "task": "--task"}
"""How a user says which of several is meant."""

_COMPARED = 500
"""Names that are compared with a pattern that fits none, differences in numbers not counted."""


@dataclass(frozen=True)
class _File:
    """A file whose path fits a pattern."""

    path: Path
    pattern: str
    values: Values


@dataclass
class _Search:
    """A walk through the directories that a pattern needs.

    Attributes
    ----------
    wanted : mapping
        Numbers that are asked for, by placeholder.
    files : list
        What was found.
    others : mapping
        Numbers that there are besides, by placeholder.
    stop : tuple, optional
        The deepest directory with nothing that fits the next part of the pattern, its depth, and
        that part.
    """

    wanted: Values
    files: list[_File] = field(default_factory=list)
    others: dict[str, set[int]] = field(default_factory=lambda: defaultdict(set))
    stop: tuple[int, Path, str] | None = None

    def walk(self, root: Path, pattern: str) -> None:
        self._walk(root, pattern.split("/"), 0, {}, pattern)

    def _walk(
        self, directory: Path, parts: list[str], depth: int, values: Values, pattern: str
    ) -> None:
        part, last = parts[depth], depth == len(parts) - 1
        fits = False
        for name, is_directory in _entries(directory, part):
            if is_directory == last or (read := values_in(name, part)) is None:
                continue
            fits = True
            if unwanted := [k for k, v in read.items() if self.wanted.get(k, v) != v]:
                self.others[unwanted[0]].add(int(read[unwanted[0]]))
                continue
            path, found = directory / name, {**values, **read}
            if last:
                self.files.append(_File(path, pattern, found))
            else:
                self._walk(path, parts, depth + 1, found, pattern)
        if not fits and (self.stop is None or depth > self.stop[0]):
            self.stop = depth, directory, part


def _entries(directory: Path, part: str) -> list[tuple[str, bool]]:
    """Return what a part of a pattern may stand for in a directory, and which are directories."""
    try:
        if is_fixed(part):
            path = directory / part
            return [(part, path.is_dir())] if os.path.lexists(path) else []
        # Unlike a path, an entry knows its kind without another call for each of many files.
        with os.scandir(directory) as entries:
            return sorted((entry.name, entry.is_dir()) for entry in entries)
    except OSError as error:
        raise CheckpointError(
            f"directory {directory} cannot be read ({error.strerror}); correct the path of the "
            "weights, or the permissions of the directory"
        ) from error


def find(
    root: Path, naming: Naming, *, experiment: int | None = None, task: int | None = None
) -> dict[int, Path]:
    """Find the weight files of a training run.

    Parameters
    ----------
    root : Path
        Directory that the patterns start from.
    naming : Naming
    experiment, task : int, optional
        Which to take, where names say it.

    Returns
    -------
    dict
        File by epoch, in the order of epochs; by step where names say no epoch. Where they say
        neither, by what the files state.

    Raises
    ------
    CheckpointError
        If there is none, several for one epoch, or it is not clear which are meant.
    """
    search = _Search(_wanted(experiment, task))
    for pattern in naming.patterns:
        search.walk(root, pattern)
    if not search.files:
        raise CheckpointError(_nothing(root, naming, search))
    return _by_epoch(search.files, root, task)


def _wanted(experiment: int | None, task: int | None) -> Values:
    given = {"experiment": experiment, "task": task}
    return {kind: value for kind, value in given.items() if value is not None}


def _nothing(root: Path, naming: Naming, search: _Search) -> str:
    """Return why nothing was found: what there is instead."""
    what = " or ".join(filled(pattern, search.wanted) for pattern in naming.patterns)
    if search.others:
        # What lies deepest: files of the wanted run, but of other tasks.
        kind = "task" if "task" in search.others else "experiment"
        values = ", ".join(map(str, sorted(search.others[kind])))
        option = _OPTIONS[kind]
        return f"{root} has no files named {what}; it has {kind} {values}. Name one with {option}"
    assert search.stop is not None
    _, directory, part = search.stop
    if (directory / part).is_dir():
        return (
            f"{directory / part} is a directory, not a weight file; give the pattern of the files "
            f"in it, such as '{directory / part}/net-{{epoch}}.pt', in quotes"
        )
    names = [name + "/" * is_directory for name, is_directory in _entries(directory, "*")]
    if not names:
        return f"{root} has no files named {what}: {directory} is empty"
    # Names that differ in numbers are alike.
    shapes = {re.sub(r"\d+", "0", name): name for name in reversed(names)}
    wanted = re.sub(r"\{[^{}]*\}|\d+", "0", part)
    close = difflib.get_close_matches(wanted, list(shapes)[:_COMPARED], 1, 0.4)
    nearest = f"; nearest to {part} is {shapes[close[0]]}" if close else ""
    return (
        f"{root} has no files named {what}: {directory} has {listed(names)}{nearest}. Correct the "
        "pattern"
    )


def _by_epoch(files: list[_File], root: Path, task: int | None) -> dict[int, Path]:
    """Return files by epoch, if it is clear which are meant."""
    variants = sorted({narrowed(file.pattern, file.values) for file in files})
    if len(variants) > 1 and any(has_variants(file.pattern) for file in files):
        raise CheckpointError(
            f"{root} has files of several kinds: {', '.join(variants)}. Give the pattern of one"
        )
    if task is not None and (without := [f for f in files if "task" not in f.values]):
        raise _no_task(without[0].path)
    for kind, option in _OPTIONS.items():
        values = sorted({int(file.values[kind]) for file in files if kind in file.values})
        if len(values) > 1:
            raise CheckpointError(
                f"{root} has files of {len(values)} {kind}s: {', '.join(map(str, values))}. Name "
                f"one with {option}"
            )
    found: dict[int, _File] = {}
    named = all(is_numbered(file.values) for file in files)
    numbers = [number_of(file.values) for file in files] if named else _stated(files)
    for file, number in zip(files, numbers, strict=True):
        if number in found and found[number].path != file.path:
            counted = "step" if "step" in file.values else "epoch"
            both = (str(one.path.relative_to(root)) for one in (found[number], file))
            raise CheckpointError(
                f"{root} has two files for {counted} {number}: {' and '.join(both)}. Narrow the "
                f"pattern {file.pattern}, so that it fits one of them"
            )
        found[number] = file
    return {number: found[number].path for number in sorted(found)}


def _stated(files: list[_File]) -> list[int]:
    """Return the epochs that files state in their contents; steps, where they state no epochs."""
    with ThreadPoolExecutor(READERS) as pool:
        stated = list(pool.map(lambda file: numbers_in(look_into(file.path)), files))
    for key in COUNTS:
        if all(key in numbers for numbers in stated):
            found = [numbers[key] for numbers in stated]
            log.info(
                "epochs as the files state them under %r: %s",
                key,
                listed([str(number) for number in sorted(found)]),
            )
            return found
    key = next((key for key in COUNTS if any(key in numbers for numbers in stated)), "")
    silent = [str(f.path) for f, numbers in zip(files, stated, strict=True) if key not in numbers]
    raise CheckpointError(
        f"the pattern {files[0].pattern} has no {{epoch}}, and {listed(silent)} "
        f"{'states' if len(silent) == 1 else 'state'} no {key or ' or '.join(COUNTS)}. Write "
        "{epoch} where a name has its number, or narrow the pattern to files that state it"
    )


def _no_task(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} does not say its task in its name; leave out {_OPTIONS['task']}"
    )


def discover(
    model_dir: Path,
    experiment_index: int,
    naming: Naming = INCREMENTAL_CIFAR,
    task: int | None = None,
) -> dict[int, Path]:
    """Find an experiment's checkpoints.

    Parameters
    ----------
    model_dir : Path
    experiment_index : int
    naming : Naming
        Its later patterns are tried if nothing has one of the others.
    task : int, optional
        Which to take, where names say it; epochs count from 0 within it.

    Returns
    -------
    dict
        File by epoch, in the order of epochs.

    Raises
    ------
    CheckpointError
        If the directory cannot be read, two files claim one epoch, or it is not clear which files
        are meant.
    """
    try:
        names = names_in(model_dir)
    except OSError as error:
        raise CheckpointError(
            f"model directory {model_dir} cannot be read ({error.strerror}); point --model_dir at "
            f"the directory that holds {naming.example('…', '…')}"
        ) from error
    found: dict[int, Path] = {}
    others: set[int] = set()
    alike: dict[int, str] = {}
    for name in names:
        parsed = naming.parse(name, experiment_index)
        if parsed is None:
            if (other := re.search(naming.alike, name)) and int(other[1]) == experiment_index:
                alike[int(other[2])] = name
            continue
        index, epoch = parsed
        if index != experiment_index:
            others.add(index)
            continue
        if epoch in found:
            raise CheckpointError(
                f"{model_dir} has two files for epoch {epoch}: {found[epoch].name} and {name}; "
                "remove or move one"
            )
        found[epoch] = model_dir / name
    if not found and naming.later:
        search = _Search(_wanted(experiment_index, task))
        for pattern in naming.later:
            search.walk(model_dir, pattern)
        if search.files:
            return _by_epoch(search.files, model_dir, task)
        if "task" in search.others:
            raise CheckpointError(_nothing(model_dir, Naming(naming.later), search))
        others |= search.others["experiment"]
    if found and task is not None:
        raise _no_task(next(iter(found.values())))
    if unused := sorted(alike.keys() - found.keys()):
        log.warning(
            "%s has files that look like checkpoints of other epochs but are not named "
            "%s; they are not used: %s. Rename those that are checkpoints",
            model_dir,
            naming.example(experiment_index, "…"),
            listed([alike[epoch] for epoch in unused]),
        )
    if not found:
        hint = f"; it has index {', '.join(map(str, sorted(others)))}" if others else ""
        raise CheckpointError(
            f"{model_dir} has no checkpoint of experiment index {experiment_index}{hint}; expected "
            f"files like {naming.example(experiment_index, 0)}"
        )
    return dict(sorted(found.items()))
