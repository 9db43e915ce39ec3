"""One launcher at a time: a lock file beside the store.

The file is created exclusively and names its owner. An owner on this machine is looked up by
process id and start time; an owner elsewhere (or anywhere, where there is no ``/proc``) cannot be,
so it shows that it lives by touching the file. A lock whose owner is dead is taken over.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from daskcurv.errors import StoreError, StoreWriteError

log = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 20.0
_STALE_SECONDS = 300.0


@contextmanager
def launcher_lock(store: Path) -> Iterator[None]:
    """Hold the lock of a results store.

    Parameters
    ----------
    store : Path
        The lock is ``{store}.lock``.

    Raises
    ------
    StoreError
        If another launcher holds it; the text names the owner.
    """
    path = beside(store, ".lock")
    _acquire(path)
    stop = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(path, stop), daemon=True)
    heartbeat.start()
    try:
        yield
    finally:
        stop.set()
        heartbeat.join()
        if _read(path) == _me():
            path.unlink(missing_ok=True)


def holder(store: Path) -> dict[str, Any] | None:
    """Return who holds the lock of a store (``host``, ``pid``, ``since``), if they are alive.

    Writes nothing. For an owner elsewhere, this machine's clock has to be right within minutes.
    """
    path = beside(store, ".lock")
    owner = _read(path)
    if owner is None:
        return None
    try:
        age = time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return None
    return owner if _alive(owner, lambda: age) else None


def beside(store: Path, suffix: str) -> Path:
    """Return the path of something that belongs to a store and lies next to it."""
    place = store.absolute()
    return place.with_name(place.name + suffix)


def _acquire(path: Path) -> None:
    draft = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Written beside and linked into place, so that a lock that exists names its owner.
            draft.write_text(json.dumps(_me()))
            while not _linked(draft, path):
                _take_over_if_stale(path)
        finally:
            draft.unlink(missing_ok=True)
    except OSError as error:
        raise StoreWriteError(
            f"cannot write beside the results store: {path}: {error.strerror}. Make the directory "
            "writable, or choose another store",
            option="--store",
        ) from error


def _linked(draft: Path, path: Path) -> bool:
    try:
        os.link(draft, path)
    except FileExistsError:
        return False
    return True


def _take_over_if_stale(path: Path) -> None:
    """Remove a dead launcher's lock, or raise `StoreError` if its owner lives."""
    owner = _read(path)
    if owner is not None and _alive(owner, lambda: _age(path)):
        raise StoreError(
            f"another launcher is working on this store: process {owner.get('pid')} on "
            f"{owner.get('host')}, since {owner.get('since')}. Wait for it or stop it; if it is "
            f"certainly gone, remove {path}"
        )
    # Of several launchers that find the lock stale, one wins the rename; the rest try again.
    grave = path.with_name(f"{path.name}.{os.getpid()}.stale")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, grave)
        if _read(grave) != owner:
            # Between reading and renaming, another launcher took over; give it back its lock.
            os.link(grave, path)
            grave.unlink()
            return
        grave.unlink()
        who = f"process {owner.get('pid')} on {owner.get('host')}" if owner else "unreadable"
        log.warning("took over the lock of a launcher that is gone (%s)", who)


def _alive(owner: dict[str, Any], age: Callable[[], float]) -> bool:
    if owner.get("job") and owner["job"] == _JOB and owner.get("start") != _START:
        # SLURM has put that launcher's job back into the queue, and this is its next start.
        return False
    if owner.get("host") == socket.gethostname() and _started(os.getpid()) and owner.get("started"):
        return bool(_started(owner.get("pid")) == owner["started"])
    return age() < _STALE_SECONDS


def _started(pid: Any) -> str | None:
    """Return when a process started, or None if there is no such process alive.

    Counted in clock ticks since booting, with the boot's identity: the time of day can be set back
    while a launcher runs.
    """
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return None if state in "ZX" else f"{boot}/{fields[18]}"


def _age(path: Path) -> float:
    """Return the seconds since `path` was touched, by the file server's own clock."""
    probe = path.with_name(f"{path.name}.{os.getpid()}.clock")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink()


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(path)


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_JOB = os.environ.get("SLURM_JOB_ID")
_START = os.environ.get("SLURM_RESTART_COUNT", "0")
_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")


def _me() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "since": _SINCE,
        "job": _JOB,
        "start": _START,
    }
