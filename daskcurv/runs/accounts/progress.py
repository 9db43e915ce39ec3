"""Progress of a run: a bar on a terminal, log lines otherwise."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from datetime import timedelta
from typing import Any

from tqdm import tqdm

from daskcurv.runs.accounts.tally import Tally
from daskcurv.runs.events import Done, Ended, EpochComplete, Event, Polled, Started
from daskcurv.runs.wording import workers_in_words

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0

_BAR_COLUMNS = len("100%|") + 10 + len("| ")
"""Terminal columns that are kept for percentage and bar."""


class Progress:
    """Observer that shows the progress of a run, counted in samples scored."""

    def __init__(self) -> None:
        self._tally = Tally()
        self._workers = ""
        self._bar: tqdm[Any] | None = None
        self._began = self._logged = time.monotonic()

    def __call__(self, event: Event) -> None:
        """Show what has changed."""
        self._tally(event)
        match event:
            case Started(samples=samples):
                self._began = self._logged = time.monotonic()
                self._bar = tqdm(
                    total=samples,
                    bar_format="{percentage:3.0f}%|{bar}| {desc}",
                    disable=not sys.stderr.isatty(),
                    dynamic_ncols=True,
                )
            case Done() | EpochComplete():
                self._show()
            case Polled(workers):
                text = workers_in_words(workers)
                changed = _without_numbers(text) != _without_numbers(self._workers)
                self._workers = text
                self._show(changed)
            case Ended() if self._bar is not None:
                log.info("%s", self.summary())
                self._draw(self._bar, ", ".join(self._counts()))
                self._bar.close()

    def _show(self, changed: bool = False) -> None:
        """Redraw the bar; log a line every half minute, and if the workers changed."""
        if self._bar is None:
            return
        self._draw(self._bar, self._short())
        now = time.monotonic()
        if changed or now - self._logged >= LOG_SECONDS:
            self._logged = now
            # On a terminal, where there is the bar, the line goes to the log file alone.
            log.log(logging.INFO if self._bar.disable else logging.DEBUG, "%s", self.line())

    def _draw(self, bar: tqdm[Any], text: str) -> None:
        bar.n = self._tally.done["samples"]
        bar.set_description_str(text, refresh=False)
        bar.refresh()

    def line(self) -> str:
        """Return the progress as one line: counts, workers, rate, and time left."""
        return ", ".join(
            part for part in (*self._counts(), self._workers, *self._rate_and_left()) if part
        )

    def summary(self) -> str:
        """Return what was done as one line, for the end of the run."""
        seconds = timedelta(seconds=round(time.monotonic() - self._began))
        return f"{', '.join(self._counts())}, {self._tally.done['samples']:,} samples in {seconds}"

    def _short(self) -> str:
        """Return the line with as many of its parts as fit beside the bar."""
        rate, left = self._rate_and_left()
        epochs, blocks = self._counts()
        room = _columns() - _BAR_COLUMNS
        for parts in (
            (left, rate, blocks, epochs, self._workers),
            (left, rate, blocks, self._workers),
            (left, blocks, self._workers),
            (left, self._workers),
        ):
            text = ", ".join(part for part in parts if part)
            if len(text) <= room:
                return text
        return text[: max(0, room - 1)] + "…"

    def _rate_and_left(self) -> tuple[str, str]:
        rate, left = self._tally.rate()
        if left is None:
            return "", "time left unknown"
        return f"{rate:,.1f} samples/s", f"{timedelta(seconds=round(left))} left"

    def _counts(self) -> tuple[str, str]:
        done, of = self._tally.done, self._tally.of
        epochs, blocks = (f"{name} {done[name]}/{of[name]}" for name in ("epochs", "blocks"))
        return epochs, blocks


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "", text)
