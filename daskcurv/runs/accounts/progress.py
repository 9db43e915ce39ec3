"""Progress of a run: a bar on a terminal, log lines otherwise."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from collections import deque
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0
RATE_SECONDS = 600.0
"""The rate is averaged over the last minutes, because workers come and go."""

_BAR_COLUMNS = len("100%|") + 10 + len("| ")
"""Terminal columns that are kept for percentage and bar."""


class Progress:
    """Progress of a run, counted in samples scored.

    Parameters
    ----------
    epochs, blocks, samples : int
        Totals of what is left to do.
    """

    def __init__(self, epochs: int, blocks: int, samples: int):
        self._totals = epochs, blocks, samples
        self._epochs = self._blocks = self._samples = 0
        self._workers = ""
        self._began = self._logged = time.monotonic()
        # When so many samples had been scored.
        self._history = deque([(self._began, 0)])
        self._bar = tqdm(
            total=samples,
            bar_format="{percentage:3.0f}%|{bar}| {desc}",
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._draw(", ".join(self._counts()))
        self._bar.close()

    def block_done(self, samples: int) -> None:
        """Count a finished block."""
        self._blocks += 1
        self._samples += samples
        self._history.append((time.monotonic(), self._samples))
        self._bar.n = self._samples
        self._show()

    def epoch_done(self) -> None:
        """Count a finished epoch."""
        self._epochs += 1
        self._show()

    def tick(self, workers: str, running: int) -> None:
        """Take note of the workers and show the progress; called about once a second.

        Parameters
        ----------
        workers : str
            Description of the workers.
        running : int
            Blocks that are being computed.
        """
        changed = _without_numbers(workers) != _without_numbers(self._workers)
        self._workers = workers
        if not running and not self._samples:
            # The time that workers take to start says nothing about their speed.
            self._history = deque([(time.monotonic(), 0)])
        self._show(changed)

    def _show(self, changed: bool = False) -> None:
        """Redraw the bar; log a line every half minute, and if the workers changed."""
        self._draw(self._short())
        now = time.monotonic()
        if changed or now - self._logged >= LOG_SECONDS:
            self._logged = now
            # On a terminal, where there is the bar, the line goes to the log file alone.
            log.log(logging.INFO if self._bar.disable else logging.DEBUG, "%s", self.line())

    def _draw(self, text: str) -> None:
        self._bar.set_description_str(text, refresh=False)
        self._bar.refresh()

    def line(self) -> str:
        """Return the progress as one line: counts, workers, rate, and time left."""
        return ", ".join(
            part for part in (*self._counts(), self._workers, *self._rate_and_left()) if part
        )

    def summary(self) -> str:
        """Return what was done as one line, for the end of the run."""
        seconds = timedelta(seconds=round(time.monotonic() - self._began))
        return f"{', '.join(self._counts())}, {self._samples:,} samples in {seconds}"

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

    def state(self) -> dict[str, Any]:
        """Return the progress as JSON-able values."""
        rate, left = self._rate()
        done = self._epochs, self._blocks, self._samples
        names = ("epochs", "blocks", "samples")
        return {
            **{
                name: {"done": count, "of": total}
                for name, count, total in zip(names, done, self._totals, strict=True)
            },
            "samples_per_second": rate,
            "seconds_left": left,
            "workers": self._workers,
        }

    def _rate(self) -> tuple[float, float | None]:
        """Return samples per second, and the seconds left if known."""
        now = time.monotonic()
        while len(self._history) > 1 and self._history[1][0] < now - RATE_SECONDS:
            self._history.popleft()
        since, before = self._history[0]
        elapsed = now - since
        rate = (self._samples - before) / elapsed if elapsed else 0.0
        left = self._totals[2] - self._samples
        return rate, left / rate if rate else None

    def _rate_and_left(self) -> tuple[str, str]:
        rate, left = self._rate()
        if left is None:
            return "", "time left unknown"
        return f"{rate:,.1f} samples/s", f"{timedelta(seconds=round(left))} left"

    def _counts(self) -> tuple[str, str]:
        epochs, blocks, _ = self._totals
        return f"epochs {self._epochs}/{epochs}", f"blocks {self._blocks}/{blocks}"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        return 80


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "", text)
