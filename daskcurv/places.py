"""Paths that a user names: whether something is there, and whether something can be made there."""

from __future__ import annotations

import os
from pathlib import Path

from daskcurv.errors import ConfigError

_SHOWN = 5


def exists(path: Path, what: str) -> bool:
    """Return whether something is at a path; a link that leads nowhere is nothing.

    Unlike ``Path.exists``, of which some versions say no, and others fail, where a directory on
    the way cannot be entered.

    Parameters
    ----------
    path : Path
    what : str
        What it is to the user, for the message.

    Raises
    ------
    ConfigError
        If that cannot be told.
    """
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise ConfigError(
            f"{what} {path} cannot be looked at: {error.strerror}. Change the permissions of the "
            "directories above it, or name another place"
        ) from error
    return True


def existing(path: Path) -> Path:
    """Return the nearest place that is there: a path, links followed, or something above it."""
    path = path.resolve()
    return next(place for place in (path, *path.parents) if _can_be_reached(place))


def check_can_be_made(path: Path, what: str, option: str) -> None:
    """Check that files can be made in a directory, which need not be there yet.

    Parameters
    ----------
    path : Path
        The directory.
    what : str
        What is to be made, for the message.
    option : str
        The option that names another place.

    Raises
    ------
    ConfigError
    """
    place = existing(path)
    if not place.is_dir():
        problem = f"{place} is not a directory"
    elif not os.access(place, os.W_OK | os.X_OK):
        problem = f"{place} is not writable"
    else:
        return
    raise ConfigError(f"{what} cannot be made: {problem}; choose another {option}")


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
