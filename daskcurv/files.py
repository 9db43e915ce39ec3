"""Files and directories that are whole or absent."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from daskcurv.errors import StoreWriteError

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
        Missing parents are created.

    Yields
    ------
    Path
        An empty directory, hidden by a leading dot.

    Raises
    ------
    OSError
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(
        tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent)
    )
    previous = building.with_suffix(".previous")
    try:
        yield building
        building.chmod(0o755)
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
    for left in target.absolute().parent.glob(f".{target.name}.*.partial"):
        shutil.rmtree(left)


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """Give a file to write, and put it in place of `target` if that ends well.

    Yields
    ------
    Path
        Of an empty file beside `target`.
    """
    descriptor, name = tempfile.mkstemp(
        prefix=f".{target.name}.", suffix=".partial", dir=target.parent
    )
    os.close(descriptor)
    building = Path(name)
    try:
        yield building
        building.chmod(0o644)
        sync(building)
        os.rename(building, target)
        sync(target.parent)
    finally:
        building.unlink(missing_ok=True)


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
