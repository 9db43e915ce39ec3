"""What is done of a run, and how fast."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

from daskcurv.runs.events import Done, EpochComplete, Event, Polled, Started

RATE_SECONDS = 600.0
"""The rate is averaged over the last minutes, because workers come and go."""


class Tally:
    """Observer that counts epochs, blocks and samples.

    Attributes
    ----------
    done, of : dict
        Counts by name, in the order epochs, blocks, samples.
    """

    def __init__(self) -> None:
        self.done = dict.fromkeys(("epochs", "blocks", "samples"), 0)
        self.of = dict(self.done)
        # When so many samples had been scored.
        self._history = deque([(time.monotonic(), 0)])

    def __call__(self, event: Event) -> None:
        """Count what is done."""
        match event:
            case Started(epochs=epochs, blocks=blocks, samples=samples):
                self.of = {"epochs": epochs, "blocks": blocks, "samples": samples}
                self._history = deque([(time.monotonic(), 0)])
            case Done(task):
                self.done["blocks"] += 1
                self.done["samples"] += task.samples
                self._history.append((time.monotonic(), self.done["samples"]))
            case EpochComplete(computed=True):
                self.done["epochs"] += 1
            case Polled(computing=0) if not self.done["samples"]:
                # The time that workers take to start says nothing about their speed.
                self._history = deque([(time.monotonic(), 0)])

    def rate(self) -> tuple[float, float | None]:
        """Return samples per second, and the seconds left if known."""
        now = time.monotonic()
        while len(self._history) > 1 and self._history[1][0] < now - RATE_SECONDS:
            self._history.popleft()
        since, before = self._history[0]
        elapsed = now - since
        rate = (self.done["samples"] - before) / elapsed if elapsed else 0.0
        left = self.of["samples"] - self.done["samples"]
        return rate, left / rate if rate else None

    def state(self) -> dict[str, Any]:
        """Return all of it as JSON-able values."""
        rate, left = self.rate()
        counts = {name: {"done": self.done[name], "of": self.of[name]} for name in self.of}
        return {**counts, "samples_per_second": rate, "seconds_left": left}
