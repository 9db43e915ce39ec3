"""The record that a launch keeps of itself, for ``daskcurv status``.

It is a small JSON file beside the store, replaced every few seconds. It is only for people and
scripts that monitor a run: no decision depends on it, and finished work is read from the store.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Iterator, Set
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

from daskcurv.logs import log_file
from daskcurv.storage.lock import LauncherLock, beside

log = logging.getLogger(__name__)

WRITE_SECONDS = 2.0
SUFFIX = ".run.json"

_MESSAGES_KEPT = 10


class RunRecord:
    """The record of one launch.

    Parameters
    ----------
    store : Path
    lock : LauncherLock, optional
        The launch's lock; nothing is written after another launch has taken it.

    Attributes
    ----------
    connected : set of str
        Dask addresses of the connected workers; others are not shown.
    """

    def __init__(self, store: Path, lock: LauncherLock | None = None):
        path = log_file()
        self._lock = lock
        self._path = beside(store, SUFFIX)
        self._written = -float("inf")
        self._unwritable = False
        self.messages = _LastMessages()
        self._fields: dict[str, Any] = {
            "state": "running",
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "lock": None if lock is None else lock.token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "began": now(),
            "log": None if path is None else str(path.absolute()),
            "failed": [],
        }
        self.connected: Set[str] = frozenset()
        self._workers: dict[str, dict[str, Any]] = {}

    def update(self, **fields: Any) -> None:
        """Set fields (JSON values); the next `write` writes them."""
        self._fields.update(fields)

    def block_done(
        self, worker: str, device: str, block: str, seconds: float, address: str, job: str = ""
    ) -> None:
        """Record that a worker finished a block, and how long it took."""
        before = self._workers.get(worker, {"blocks": 0})
        self._workers[worker] = {
            "device": device,
            "address": address,
            "job": job or None,
            "blocks": before["blocks"] + 1,
            "last_block": block,
            "last_seconds": seconds,
            "last_time": now(),
        }

    def failed(self, block: str, reason: str) -> None:
        """Record that a block was set aside."""
        self._fields["failed"].append({"block": block, "reason": reason})

    @property
    def due(self) -> bool:
        """Whether it is time to write the file again."""
        return time.monotonic() - self._written >= WRITE_SECONDS

    def write(self) -> None:
        """Replace the file; if this fails, the run continues."""
        self._written = time.monotonic()
        if self._lock is not None and not self._lock.held:
            return
        alive = {
            worker: values
            for worker, values in self._workers.items()
            if values["address"] in self.connected
        }
        content = {
            **self._fields,
            "devices": alive,
            "messages": [*self.messages.kept],
            "updated": now(),
        }
        # Not synced, as what is lost in a power cut is of no use after it.
        draft = self._path.with_name(self._path.name + ".partial")
        try:
            # One that a killed launcher has left can be another user's.
            draft.unlink(missing_ok=True)
            draft.write_text(json.dumps(content, indent=2) + "\n")
            draft.replace(self._path)
        except OSError as error:
            if not self._unwritable:
                self._unwritable = True
                log.warning(
                    "cannot write %s: %s; daskcurv status is out of date until this is fixed",
                    self._path,
                    error.strerror,
                )


@contextmanager
def recording(store: Path, lock: LauncherLock | None = None) -> Iterator[RunRecord]:
    """Keep the record of a launch until it ends; its lock must be held.

    Parameters
    ----------
    store : Path
    lock : LauncherLock, optional

    Yields
    ------
    RunRecord
        The launch sets ``state`` when it ends normally.
    """
    record = RunRecord(store, lock)
    package = logging.getLogger("daskcurv")
    package.addHandler(record.messages)
    record.write()
    try:
        yield record
    except KeyboardInterrupt:
        record.update(state="interrupted")
        raise
    except Exception as error:
        record.update(state="failed", reason=str(error))
        raise
    finally:
        package.removeHandler(record.messages)
        record.write()


def read_record(store: Path) -> dict[str, Any] | None:
    """Return the record of the last launch on a store, or None if there is no readable one."""
    try:
        content = json.loads(beside(store, SUFFIX).read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def now() -> str:
    """Return the current time as ISO 8601, to the second, with its offset from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")


class _LastMessages(logging.Handler):
    """Keeps the last warnings and errors."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.kept: deque[dict[str, str]] = deque(maxlen=_MESSAGES_KEPT)

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.kept.append({"time": now(), "level": record.levelname, "text": text})
