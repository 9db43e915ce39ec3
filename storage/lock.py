"""One launcher at a time: lock files that go by what a store is, not by how it is spelled.

A lock is a file beside the store, links followed, so that it covers a store that does not exist
yet; and for a store that exists a second file inside it, which is there by whatever other name the
directory is reached, such as a bind mount in a container. Each is created exclusively and names
its owner.

Whether the owner lives is asked of the process table only where the owner's number means something
here: in the same PID namespace of the same boot. Everywhere else (another machine, another
container, no ``/proc``) the owner shows that it lives by touching its files. A lock whose owner is
dead is taken over, and an owner that was wrongly taken for dead notices that before it writes.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from daskcurv.errors import StoreError, StoreWriteError
from daskcurv.places import followed, names_of, place_for

log = logging.getLogger(__name__)

INSIDE = ".launcher.lock"
"""Name of the lock file inside a store."""

_HEARTBEAT_SECONDS = 20.0
_STALE_SECONDS = 300.0
_RESTORED_SECONDS = 1.0
"""For so long a lock can be absent that a launcher took by mistake and gives back."""


class LauncherLock:
    """A lock that this process holds; `launcher_lock` makes one."""

    def __init__(self, store: Path):
        self.token = uuid.uuid4().hex
        """What no other lock has, not even another of this process."""
        self._store = store
        self._names = (beside(store, ".lock"), followed(store) / INSIDE)
        self._files: list[Path] = []
        self._removed: set[str] = set()

    def cover(self, store: Path) -> None:
        """Hold a store that exists by the file inside it, too.

        Parameters
        ----------
        store : Path
            The locked store, or one that belongs to it.

        Raises
        ------
        StoreError
            If another launcher holds it; the text names the owner.
        """
        path = followed(store) / INSIDE
        if path not in self._files:
            self._take(path)

    def uncover(self, store: Path) -> None:
        """Take the file inside a store away again, before the store gets another name."""
        path = followed(store) / INSIDE
        if path in self._files:
            self._files.remove(path)
            self._unlink(path)

    def check(self) -> None:
        """Make sure that the lock is still held; to be called before anything is changed.

        Raises
        ------
        StoreWriteError
            If another launcher took it over, or the files are gone.
        """
        for path in self._files:
            if self._owns(path):
                continue
            time.sleep(_RESTORED_SECONDS)
            if not self._owns(path):
                owner = _read(path)
                what = f"{_who(owner)} took it over" if owner else f"{path} is gone"
                raise StoreWriteError(
                    f"this launcher no longer holds the lock of {self._store}: {what}. It stops, "
                    "so that two do not write at once; what was finished is kept. Launch again "
                    "when no other launcher works on this store"
                )

    @property
    def held(self) -> bool:
        """Whether the files of the lock are there and name this launcher."""
        return all(self._owns(path) for path in self._files)

    def _owns(self, path: Path) -> bool:
        return (_read(path) or {}).get("token") == self.token

    def _take(self, path: Path) -> None:
        draft = path.with_name(f"{path.name}.{self.token}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                # Written beside and linked into place, so that a lock that exists names its owner.
                draft.write_text(json.dumps(_me(self.token, path.parent)))
                while not self._linked(draft, path):
                    self._remove_stale(path)
            finally:
                draft.unlink(missing_ok=True)
        except OSError as error:
            raise StoreWriteError(
                f"cannot write beside the results store: {path}: {error.strerror}. Make the "
                "directory writable, or choose another store",
                option="--store",
            ) from error
        self._files.append(path)

    def _linked(self, draft: Path, path: Path) -> bool:
        try:
            os.link(draft, path)
        except FileExistsError:
            # A file server can have done it and lost the answer, so that it was asked again.
            return self._owns(path)
        return True

    def _remove_stale(self, path: Path) -> None:
        """Remove a dead launcher's lock, or raise `StoreError` if its owner lives."""
        owner = _read(path)
        _refuse_if_alive(path, owner, partial(_age, path), self._names)
        # Of several launchers that find the lock stale, one wins the rename; the rest try again.
        stale = path.with_name(f"{path.name}.{self.token}.stale")
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, stale)
            if _read(stale) != owner:
                # Between reading and renaming, another launcher took over; give it back its lock,
                # unless a third has one by now: the other will notice.
                with contextlib.suppress(FileExistsError):
                    os.link(stale, path)
                stale.unlink()
                return
            stale.unlink()
            who = _who(owner) if owner else "unreadable"
            if who not in self._removed:
                self._removed.add(who)
                log.warning("took over the lock of a launcher that is gone (%s)", who)

    def _touch(self) -> None:
        for path in self._files:
            with contextlib.suppress(OSError):
                # Not a lock that another launcher has by now.
                if self._owns(path):
                    os.utime(path)

    def _release(self) -> None:
        for path in self._files:
            self._unlink(path)

    def _unlink(self, path: Path) -> None:
        with contextlib.suppress(OSError):
            if self._owns(path):
                path.unlink(missing_ok=True)


@contextmanager
def launcher_lock(store: Path) -> Iterator[LauncherLock]:
    """Hold the lock of a results store.

    Parameters
    ----------
    store : Path
        The lock is ``{store}.lock``, and inside a store that exists.

    Yields
    ------
    LauncherLock
        To be given to whatever changes the store.

    Raises
    ------
    StoreError
        If another launcher holds it; the text names the owner.
    """
    real = place_for(store)
    # Earlier versions put their lock beside the link that they were given.
    for name in names_of(store)[:-1]:
        path = _beside(name, ".lock")
        _refuse_if_alive(path, _read(path), partial(_local_age, path))
    lock = LauncherLock(store)
    stop = threading.Event()
    heartbeat = threading.Thread(target=_beat, args=(lock, stop), daemon=True)
    try:
        lock._take(beside(store, ".lock"))
        if os.access(real / "zarr.json", os.F_OK):
            lock.cover(real)
        heartbeat.start()
        yield lock
    finally:
        stop.set()
        if heartbeat.ident is not None:
            heartbeat.join()
        lock._release()


def holder(store: Path) -> dict[str, Any] | None:
    """Return who holds the lock of a store (``host``, ``pid``, ``since``), if they are alive.

    Writes nothing. For an owner elsewhere, this machine's clock has to be right within minutes.
    """
    beside_names = [_beside(name, ".lock") for name in reversed(names_of(store))]
    for path in (*beside_names, followed(store) / INSIDE):
        owner = _read(path)
        if owner is not None and _alive(owner, path, partial(_local_age, path)):
            return owner
    return None


def beside(store: Path, suffix: str) -> Path:
    """Return the path of something that belongs to a store and lies next to it.

    It is the same file by whatever links the store is named, and keeps the spelling of the
    directory, which can be another on each machine of a cluster.
    """
    return _beside(followed(store), suffix)


def _beside(place: Path, suffix: str) -> Path:
    return place.with_name(place.name + suffix)


def _refuse_if_alive(
    path: Path,
    owner: dict[str, Any] | None,
    age: Callable[[], float],
    names: Sequence[Path] = (),
) -> None:
    if owner is not None and _alive(owner, path, age):
        others = (name for name in names if name != path and os.access(name, os.F_OK))
        files = map(str, (path, *others))
        raise StoreError(
            f"another launcher is working on this store: {_who(owner)}, since "
            f"{owner.get('since', 'when is not known')}. Wait for it or stop it; if it is "
            f"certainly gone, remove {' and '.join(files)} (one that has given no sign of life for "
            f"{_STALE_SECONDS / 60:.0f} minutes counts as gone)"
        )


def _who(owner: dict[str, Any]) -> str:
    if not owner:
        return "another user's, whose lock cannot be read"
    return f"process {owner.get('pid')} on {owner.get('host')}"


def _alive(owner: dict[str, Any], path: Path, age: Callable[[], float]) -> bool:
    if (
        owner.get("job")
        and (owner["job"], owner.get("cluster")) == (_JOB, _CLUSTER)
        and owner.get("start") != _START
    ):
        # SLURM has put that launcher's job back into the queue, and this is its next start.
        return False
    lives = _process_lives(owner, path)
    return age() < _STALE_SECONDS if lives is None else lives


def _process_lives(owner: dict[str, Any], path: Path) -> bool | None:
    """Return whether the owner's process lives, or None if that cannot be seen from here."""
    pid, started = owner.get("pid"), owner.get("started")
    here = _started(os.getpid())
    if owner.get("host") != socket.gethostname() or not started or not here:
        return None
    if _boot(started) != _boot(here):
        # Another machine of that name, or this one before it was booted again.
        return None
    found = _started(pid)
    if found == started:
        return True
    if owner.get("namespace") is None or owner["namespace"] != _namespace():
        return None
    if owner.get("directory") != _directory(path.parent):
        # The file came here with a copy of the directory; its owner may never have known of it.
        return None
    if found is None and _exists(pid):
        return None  # of another user, and hidden from this one
    return False


def _boot(started: Any) -> str:
    return str(started).partition("/")[0]


def _started(pid: Any) -> str | None:
    """Return when a process started, or None if none is to be seen.

    Counted in clock ticks since booting, with the boot's identity: the time of day can be set back
    while a launcher runs. A process that ended and was not waited for has no start.
    """
    if not isinstance(pid, int) or _namespace() is None:
        return None
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (OSError, ValueError):
        return None
    return f"{boot}/{'ended' if state in 'ZX' else fields[18]}"


def _namespace() -> str | None:
    """Return which processes the numbers of ``/proc`` are of, or None if not those of this one."""
    try:
        # A new namespace can still have the old one's /proc.
        if str(Path("/proc/self").readlink()) != str(os.getpid()):
            return None
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return None


def _exists(pid: Any) -> bool:
    if not isinstance(pid, int) or pid <= 0:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _directory(path: Path) -> int | None:
    """Return what tells a directory from its copy."""
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _age(path: Path) -> float:
    """Return the seconds since `path` was touched, by the file server's own clock."""
    probe = path.with_name(f"{path.name}.{uuid.uuid4().hex}.clock")
    probe.touch()
    try:
        return probe.stat().st_mtime - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
    finally:
        probe.unlink()


def _local_age(path: Path) -> float:
    """Return the same by this machine's clock, without writing."""
    try:
        return time.time() - path.stat().st_mtime
    except OSError:
        return float("inf")


def _beat(lock: LauncherLock, stop: threading.Event) -> None:
    while not stop.wait(_HEARTBEAT_SECONDS):
        lock._touch()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        content = json.loads(path.read_text())
    except PermissionError:
        return {}  # another user's: whose, is not known, but it is one
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return content if isinstance(content, dict) else None


_JOB = os.environ.get("SLURM_JOB_ID")
_START = os.environ.get("SLURM_RESTART_COUNT", "0")
_CLUSTER = os.environ.get("SLURM_CLUSTER_NAME")
_SINCE = time.strftime("%Y-%m-%d %H:%M:%S")


def _me(token: str, directory: Path) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "started": _started(os.getpid()),
        "namespace": _namespace(),
        "since": _SINCE,
        "job": _JOB,
        "start": _START,
        "cluster": _CLUSTER,
        "directory": _directory(directory),
        "token": token,
    }
