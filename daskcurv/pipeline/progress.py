"""How far a run is: a bar on a terminal, plain log lines otherwise."""

from __future__ import annotations

import logging
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
"""The rate is that of the last minutes: workers come and go."""


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
        self._logged = time.monotonic()
        # When so many samples had been scored.
        self._history = deque([(self._logged, 0)])
        self._bar = tqdm(
            total=samples,
            unit=" samples",
            unit_scale=True,
            disable=not sys.stderr.isatty(),
            dynamic_ncols=True,
            smoothing=0.05,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.close()

    def block_done(self, samples: int) -> None:
        """Count a finished block."""
        self._blocks += 1
        self._samples += samples
        self._history.append((time.monotonic(), self._samples))
        self._bar.update(samples)
        self.tick()

    def epoch_done(self) -> None:
        """Count a finished epoch."""
        self._epochs += 1

    def tick(self, workers: str = "") -> None:
        """Show where things stand; called often, writes seldom.

        On a terminal at once, else every half minute, or when something about the workers changed.
        """
        changed = bool(workers) and _without_numbers(workers) != _without_numbers(self._workers)
        self._workers = workers or self._workers
        self._bar.set_postfix_str(self._counts(), refresh=False)
        self._bar.refresh()
        now = time.monotonic()
        if self._bar.disable and (changed or now - self._logged >= LOG_SECONDS):
            self._logged = now
            log.info("%s", self.line())

    def line(self) -> str:
        """Return the state as one line: counts, rate, and time left."""
        rate, left = self._rate()
        eta = "unknown" if left is None else str(timedelta(seconds=round(left)))
        return f"{self._counts()}, {rate:.1f} samples/s, {eta} left"

    def state(self) -> dict[str, Any]:
        """Return the same as JSON-able values."""
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
        """Return samples per second, and the seconds left if that can be said."""
        now = time.monotonic()
        while len(self._history) > 1 and self._history[1][0] < now - RATE_SECONDS:
            self._history.popleft()
        since, before = self._history[0]
        elapsed = now - since
        rate = (self._samples - before) / elapsed if elapsed else 0.0
        left = self._totals[2] - self._samples
        return rate, left / rate if rate else None

    def _counts(self) -> str:
        epochs, blocks, _ = self._totals
        workers = f", {self._workers}" if self._workers else ""
        return f"epochs {self._epochs}/{epochs}, blocks {self._blocks}/{blocks}{workers}"


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "", text)
