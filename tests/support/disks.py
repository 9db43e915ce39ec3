"""Small file systems, for what happens when a disk is full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def mounted(directory: Path, size: str) -> Iterator[Path]:
    """A file system of a given size, in memory."""
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small disk takes root")
    try:
        yield directory
    finally:
        subprocess.run(["umount", str(directory)], check=True)


def enlarge(directory: Path) -> None:
    """Make more room in a mounted file system."""
    subprocess.run(["mount", "-o", "remount,size=20m", str(directory)], check=True)
