"""What the store records of a run besides results: time, workers, methods, complete epochs."""

from __future__ import annotations

import logging
import time
from collections import defaultdict

from daskcurv.errors import CheckpointChangedError
from daskcurv.runs.events import Done, Ended, EpochComplete, Event, SetAside
from daskcurv.runs.tasks import BlockResult, BlockTask
from daskcurv.storage import ResultsStore
from daskcurv.storage.finite import count_not_finite, note_epochs, noted_epochs

log = logging.getLogger(__name__)

WRITE_SECONDS = 5.0


class StoreAccount:
    """Observer that keeps the columns of epochs in the store.

    An epoch's time, workers and methods are written before it is marked as complete.

    Parameters
    ----------
    store : ResultsStore
    """

    def __init__(self, store: ResultsStore):
        self._store = store
        self._complete = store.read("complete").tolist()
        self._seconds = store.read("compute_seconds").tolist()
        self._sharers = store.read("num_workers").tolist()
        self._methods = [{*text.split("; ")} - {""} for text in map(str, store.read("method"))]
        self._workers: defaultdict[int, set[str]] = defaultdict(set)
        self._not_finite = set(noted_epochs(store))
        self._unwritten: set[int] = set()
        self._written = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case Done(task, result):
                self._note(task, result)
            case SetAside(task, _, CheckpointChangedError()):
                # The record's size and time stand for another file, so they vouch for nothing.
                self._store.set_epoch(task.row, checkpoint_size=-1, checkpoint_mtime_ns=-1)
            case EpochComplete(_, row) if not self._complete[row]:
                self._write()
                self._store.set_epoch(row, complete=True)
                self._complete[row] = True
            case Ended():
                self._write()
        # At most a few seconds' worth is lost if the launcher is killed.
        if time.monotonic() - self._written > WRITE_SECONDS:
            self._write()

    def count_not_finite(self) -> dict[int, int]:
        """Count the results that are not finite, of the epochs that are known to have some."""
        counts = {
            epoch: count_not_finite(self._store, self._store.rows[epoch])
            for epoch in self._not_finite.intersection(self._store.rows)
        }
        counts = {epoch: count for epoch, count in counts.items() if count}
        if counts.keys() != self._not_finite:
            note_epochs(self._store, counts)  # some have been computed again
        return counts

    def _note(self, task: BlockTask, result: BlockResult) -> None:
        self._seconds[task.row] += result.seconds
        self._workers[task.row].add(result.worker)
        self._methods[task.row] |= {result.method} - {""}
        self._unwritten.add(task.row)
        if result.not_finite and task.epoch not in self._not_finite:
            self._not_finite.add(task.epoch)
            note_epochs(self._store, self._not_finite)
            log.warning(
                "%s: %d of %d results are not finite numbers; the network overflows or its "
                "weights are invalid",
                task,
                result.not_finite,
                task.samples,
            )
        log.debug("%s %s", task, result)

    def _write(self) -> None:
        for row in sorted(self._unwritten):
            self._sharers[row] = max(self._sharers[row], len(self._workers[row]))
            self._store.set_epoch(
                row,
                compute_seconds=self._seconds[row],
                num_workers=self._sharers[row],
                method="; ".join(sorted(self._methods[row])),
            )
        self._unwritten.clear()
        self._written = time.monotonic()
