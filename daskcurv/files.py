"""Files and directories that are whole or absent, under names that can be links.

What is made has the mode that ``mkdir`` and ``open`` would have given it: the process's umask and
the directory above (its setgid bit, its default ACL) decide who shares it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daskcurv.errors import ConfigError, StoreWriteError

_REMOVAL_SECONDS = 5.0
_MOST_LINKS = 40


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
            raise ConfigError(f"{path} is a link that leads in a circle; name another path")


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
    if len(names) > 1 and not names[-1].parent.is_dir():
        raise ConfigError(
            f"{path} is a link to {names[-1]}, but {names[-1].parent} is not a directory; create "
            "that, or correct the link"
        )
    return names[-1]


@contextmanager
def whole_directory(target: Path) -> Iterator[Path]:
    """Give a directory to fill, and put it in place of `target` if that ends well.

    It is filled beside `target`, synced to disk and renamed, so that neither a killed process nor
    a power cut leaves half of one under that name. A directory that was there before steps aside
    first, since one cannot be renamed over another, and is removed afterwards.

    Parameters
    ----------
    target : Path
        Missing parents are created. If it is a link, what it leads to is replaced.

    Yields
    ------
    Path
        An empty directory, hidden by a leading dot.

    Raises
    ------
    OSError
    """
    target = place_for(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    building = _draft(target)
    building.mkdir()
    previous = building.with_suffix(".previous")
    try:
        yield building
        for directory, _, files in os.walk(building):
            for name in (*files, "."):
                sync(Path(directory, name))
        if target.exists():
            os.rename(target, previous)
        try:
            os.rename(building, target)
        except OSError:
            if previous.exists():
                os.rename(previous, target)
            raise
        sync(target.parent)
    finally:
        _remove(building)
        _remove(previous)


def discard_drafts(target: Path) -> None:
    """Remove what processes that were killed have left of `target`; nobody may be writing it."""
    target = followed(target)
    # Not with a dot in the middle, which would be the draft of `{target.name}.something`.
    draft = re.compile(rf"\.{re.escape(target.name)}\.[^.]+\.partial")
    for left in target.parent.glob(".*.partial"):
        if draft.fullmatch(left.name):
            shutil.rmtree(left)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a file to write, and put it in place of `target` if that ends well.

    A file that is replaced hands on its mode.

    Yields
    ------
    Path
        Of an empty file beside `target`, or beside what that leads to if it is a link.
    """
    target = place_for(target)
    building = _draft(target)
    building.touch(exist_ok=False)
    try:
        mode = None
        with contextlib.suppress(FileNotFoundError):
            mode = stat.S_IMODE(target.stat().st_mode)
            building.chmod(mode | stat.S_IWUSR)
        yield building
        if mode is not None:
            building.chmod(mode)
        sync(building)
        os.rename(building, target)
        sync(target.parent)
    finally:
        building.unlink(missing_ok=True)


def _draft(target: Path) -> Path:
    return target.with_name(f".{target.name}.{uuid.uuid4().hex[:12]}.partial")


def write_whole(target: Path, content: bytes) -> None:
    """Write a file that is whole or as it was before."""
    with whole_file(target) as building:
        building.write_bytes(content)


def check_writable(target: Path, *, directory: bool = False, parents: bool = False) -> None:
    """Check that something can be written, before hours are spent on what is to be written.

    Parameters
    ----------
    target : Path
        A file, which may exist and would be replaced.
    directory : bool
        `target` is a directory to fill, which may exist.
    parents : bool
        Missing parents of `target` will be created.

    Raises
    ------
    StoreWriteError
        If the place does not exist, or nothing can be written there.
    """
    if problem := _why_not_writable(target, directory, parents):
        raise StoreWriteError(f"cannot write {target}: {problem}; name another place")


def _why_not_writable(target: Path, directory: bool, parents: bool) -> str | None:
    try:
        if target.exists() and target.is_dir() != directory:
            return "it is not a directory" if directory else "it is a directory"
        place = target.absolute() if directory and target.exists() else target.absolute().parent
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


def sync(path: Path) -> None:
    """Wait until a file's contents, or a directory's entries, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(directory: Path) -> None:
    # A library that failed to write one file may still be writing others from its threads.
    deadline = time.monotonic() + _REMOVAL_SECONDS
    while directory.exists():
        shutil.rmtree(directory, ignore_errors=True)
        if time.monotonic() > deadline:
            return
        time.sleep(0.05)
