"""How far a run is: a bar on a terminal, plain log lines otherwise."""

from __future__ import annotations

import logging
import re
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from tqdm import tqdm

log = logging.getLogger(__name__)

LOG_SECONDS = 30.0


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
        self._started = time.monotonic()
        self._logged = self._started
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
        elapsed = time.monotonic() - self._started
        rate = self._samples / elapsed if elapsed else 0.0
        left = (self._totals[2] - self._samples) / rate if rate else None
        eta = "unknown" if left is None else str(timedelta(seconds=round(left)))
        return f"{self._counts()}, {rate:.1f} samples/s, {eta} left"

    def _counts(self) -> str:
        epochs, blocks, _ = self._totals
        workers = f", {self._workers}" if self._workers else ""
        return f"epochs {self._epochs}/{epochs}, blocks {self._blocks}/{blocks}{workers}"


def _without_numbers(text: str) -> str:
    return re.sub(r"\d+", "", text)
