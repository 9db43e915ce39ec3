"""Paths that a user names: where they lead, what is there, what can be made there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from daskcurv.errors import ConfigError, StoreWriteError

_SHOWN = 5
_MOST_LINKS = 40


def exists(path: Path, what: str) -> bool:
    """Return whether a path exists; a dangling link does not.

    Unlike ``Path.exists``, the result does not depend on the Python version if a directory above
    the path is not accessible.

    Parameters
    ----------
    path : Path
    what : str
        What the path stands for, for the message.

    Raises
    ------
    ConfigError
        If this cannot be determined.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be accessed: {error.strerror}. Change the permissions of the "
            "directories above it, or choose another path"
        ) from error
    return True


def names_of(path: Path) -> list[Path]:
    """Return the absolute names under which a path is reached: as spelled, then link by link.

    Only links that are the last part of a name are followed. Those above it lead to the same
    directory whatever it is called, and an automounted directory can have another name on each
    machine.

    Raises
    ------
    ConfigError
        If links lead in a circle.
    """
    names = [path.absolute()]
    while True:
        last = names[-1]
        try:
            target = Path(os.path.realpath(last)) if last.name == ".." else last.readlink()
        except OSError:  # no link, or nothing there
            return names
        names.append(last.parent / target)
        if len(names) > _MOST_LINKS:
            raise ConfigError(f"{path} is a circular link; choose another path")


def followed(path: Path) -> Path:
    """Return the absolute path of what a path names, which need not exist; see `names_of`."""
    return names_of(path)[-1]


def place_for(path: Path) -> Path:
    """Return where something is to be made: where `path` leads, if it is a link.

    Raises
    ------
    ConfigError
        If it is a link into a directory that does not exist. Such a directory is not created, as it
        would be for a path without links: the file system it is on may not be mounted.
    """
    names = names_of(path)
    # Unlike `is_dir`, also where one may not enter.
    if len(names) > 1 and not os.access(names[-1].parent / ".", os.F_OK):
        raise ConfigError(
            f"{path} is a link to {names[-1]}, but {names[-1].parent} is not an accessible "
            "directory; create it, or correct the link"
        )
    return names[-1]


def existing(path: Path) -> Path:
    """Return the nearest place that is there: a path, links followed, or something above it."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if _can_be_reached(place))


def check_writable(
    target: Path, *, directory: bool = False, parents: bool = False, option: str | None = None
) -> None:
    """Check that something can be written, before hours are spent on what is to be written.

    Parameters
    ----------
    target : Path
        A file, which may exist and would be replaced.
    directory : bool
        `target` is a directory to fill, which may exist.
    parents : bool
        Missing parents of `target` will be created.
    option : str, optional
        Option that names another place, for the message.

    Raises
    ------
    StoreWriteError
        If the place does not exist, or nothing can be written there.
    """
    if problem := _why_not_writable(target, directory, parents):
        raise StoreWriteError(
            f"cannot write {target}: {problem}; choose another path", option=option
        )


def _why_not_writable(target: Path, directory: bool, parents: bool) -> str | None:
    try:
        target = place_for(target)
        if target.exists() and target.is_dir() != directory:
            return "it is not a directory" if directory else "it is a directory"
        place = target if directory and target.exists() else target.parent
        while parents and not place.exists():
            place = place.parent
        if not place.is_dir():
            return f"{place} {'is not a directory' if place.exists() else 'does not exist'}"
        # The permission bits do not tell of read-only or full file systems.
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0")
    except OSError as error:
        return error.strerror or str(error)
    return None


def leads_nowhere(path: Path) -> str:
    """Return where a link to nothing leads, as the end of a message; else nothing."""
    try:
        target = path.readlink()
    except OSError:
        return ""  # no link, or it cannot be looked at
    return "" if _can_be_reached(path) else f"it is a link to {target}, which cannot be reached"


def names_in(directory: Path) -> list[str]:
    """Return the names of what is in a directory, sorted.

    Raises
    ------
    OSError
    """
    return sorted(entry.name for entry in directory.iterdir())


def _can_be_reached(path: Path) -> bool:
    try:
        path.stat()
    except OSError:
        return False
    return True


def listed(items: list[str]) -> str:
    """Return the first few items, and how many more there are."""
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more
