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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from daskcurv.atomic import replace_note
from daskcurv.logs import log_file
from daskcurv.runs.accounts.tally import Tally
from daskcurv.runs.events import Done, Ended, Event, Opened, Polled, SetAside, Started
from daskcurv.runs.outcome import State
from daskcurv.runs.tasks import BlockResult, BlockTask
from daskcurv.runs.wording import STATES, workers_in_words
from daskcurv.storage.lock import LauncherLock, beside

log = logging.getLogger(__name__)

WRITE_SECONDS = 2.0
SUFFIX = ".run.json"

_MESSAGES_KEPT = 10


class RunRecord:
    """Observer that keeps the record of one launch.

    Parameters
    ----------
    store : Path
    lock : LauncherLock, optional
        The launch's lock; nothing is written after another launch has taken it.
    """

    def __init__(self, store: Path, lock: LauncherLock | None = None):
        path = log_file()
        self._lock = lock
        self._path = beside(store, SUFFIX)
        self._written = -float("inf")
        self._unwritable = False
        self.messages = _LastMessages()
        self._fields: dict[str, Any] = {
            "state": STATES[State.RUNNING],
            "state_code": State.RUNNING,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "lock": None if lock is None else lock.token,
            "job": os.environ.get("SLURM_JOB_ID"),
            "began": now(),
            "log": None if path is None else str(path.absolute()),
            "failed": [],
        }
        self._tally = Tally()
        self._connected: frozenset[str] = frozenset()
        self._workers: dict[str, dict[str, Any]] = {}

    def update(self, **fields: Any) -> None:
        """Set fields (JSON values); the next `write` writes them."""
        self._fields.update(fields)

    def end(self, state: State, **fields: Any) -> None:
        """Set the state that the run ends in, and further fields."""
        self.update(state=STATES[state], state_code=state, **fields)

    def __call__(self, event: Event) -> None:
        """Take note of an event, and write the file if it is time."""
        self._tally(event)
        match event:
            case Opened(store):
                self.update(store=str(store))
            case Started(cluster, dashboard):
                self.update(cluster=cluster, dashboard=dashboard, workers="", running=0)
            case Done(task, result):
                self._note(task, result)
            case SetAside(task, reason):
                self._fields["failed"].append(
                    {"block": str(task), "reason": reason, "epoch": task.epoch}
                )
            case Polled(workers, computing, connected):
                self._connected = connected
                self.update(
                    running=computing,
                    workers=workers_in_words(workers),
                    fleet=asdict(workers),
                )
            case Ended():
                self.update(running=0, **self._tally.state())
        if time.monotonic() - self._written >= WRITE_SECONDS:
            if "cluster" in self._fields:
                self.update(**self._tally.state())
            self.write()

    def _note(self, task: BlockTask, result: BlockResult) -> None:
        before = self._workers.get(result.worker, {"blocks": 0})
        self._workers[result.worker] = {
            "device": result.device,
            "address": result.address,
            "job": result.job or None,
            "blocks": before["blocks"] + 1,
            "last_block": str(task),
            "last_seconds": result.seconds,
            "last_time": now(),
        }

    def write(self) -> None:
        """Replace the file; if this fails, the run continues."""
        self._written = time.monotonic()
        if self._lock is not None and not self._lock.held:
            return
        alive = {
            worker: values
            for worker, values in self._workers.items()
            if values["address"] in self._connected
        }
        content = {
            **self._fields,
            "devices": alive,
            "messages": [*self.messages.kept],
            "updated": now(),
        }
        try:
            replace_note(self._path, json.dumps(content, indent=2) + "\n")
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
        The launch calls `RunRecord.end` when it ends normally.
    """
    record = RunRecord(store, lock)
    package = logging.getLogger("daskcurv")
    package.addHandler(record.messages)
    record.write()
    try:
        yield record
    except KeyboardInterrupt:
        record.end(State.INTERRUPTED)
        raise
    except Exception as error:
        record.end(State.FAILED, reason=str(error))
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
