"""Files and directories that are whole or absent, under names that can be links.

What is made has the mode that ``mkdir`` and ``open`` would have given it: the process's umask and
the directory above (its setgid bit, its default ACL) decide who shares it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daskcurv.places import followed, place_for

_REMOVAL_SECONDS = 5.0


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


def replace_note(target: Path, text: str) -> None:
    """Replace a small file of which nothing depends; it is not synced, so it costs next to nothing.

    What a process that was killed has left of it is replaced with the next one.
    """
    draft = target.with_name(target.name + ".partial")
    # One that a killed process has left can be another user's.
    draft.unlink(missing_ok=True)
    draft.write_text(text)
    draft.replace(target)


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
