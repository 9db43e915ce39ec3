"""What a run shows of its progress."""

from __future__ import annotations

import io
import logging
import re
import sys
import time

import pytest

from daskcurv.clusters.base import Reason, Why, Workers
from daskcurv.logs import counted
from daskcurv.runs.accounts import progress
from daskcurv.runs.accounts.progress import Progress
from daskcurv.runs.accounts.tally import Tally
from daskcurv.runs.events import Ended, EpochComplete, Polled
from tests.support.events import done, started

QUEUED = (Reason(Why.QUEUED, "Priority", 60), Reason(Why.QUEUED, "Resources", 1))


def local(running: int) -> Polled:
    return Polled(Workers("local", running, wanted=2), running)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(time, "monotonic", clock)
    return clock


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def use_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Make standard error a terminal of 80 columns."""
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "_columns", lambda: 80)
    monkeypatch.setenv("COLUMNS", "80")
    return terminal


def drawn(terminal: Terminal) -> str:
    """Return what the bar's line shows last."""
    return re.split(r"[\r\n]", terminal.getvalue().rstrip())[-1].rstrip()


def test_the_rate_does_not_count_the_start_of_the_workers(clock):
    run = Progress()
    run(started(epochs=1, blocks=10, samples=1000))
    for _ in range(60):
        clock.now += 1
        run(local(0))
    assert run.line() == "epochs 0/1, blocks 0/10, 0 workers, time left unknown"
    clock.now += 1
    run(local(1))
    clock.now += 9
    run(done(samples=100))
    assert run.line() == "epochs 0/1, blocks 1/10, 1 worker, 10.0 samples/s, 0:01:30 left"


def test_workers_that_are_lost_in_between_do_count(clock):
    tally = Tally()
    tally(started(epochs=1, blocks=10, samples=1000))
    tally(local(1))
    clock.now += 10
    tally(done(samples=100))
    clock.now += 10
    tally(local(0))
    assert tally.state() == {
        "epochs": {"done": 0, "of": 1},
        "blocks": {"done": 1, "of": 10},
        "samples": {"done": 100, "of": 1000},
        "samples_per_second": pytest.approx(5),
        "seconds_left": pytest.approx(180),
    }


def test_epochs_that_were_complete_before_are_no_progress(clock):
    tally = Tally()
    tally(EpochComplete(0, 0, computed=False))
    tally(EpochComplete(200, 1))
    assert tally.done == {"epochs": 1, "blocks": 0, "samples": 0}


def test_the_last_line_has_the_final_counts(clock, monkeypatch):
    terminal = use_terminal(monkeypatch)
    run = Progress()
    run(started(epochs=1, blocks=2, samples=200))
    run(local(2))
    for _ in range(2):
        clock.now += 30
        run(done(samples=100))
    run(EpochComplete(0, 0))
    run(Ended())
    assert run.summary() == "epochs 1/1, blocks 2/2, 200 samples in 0:01:00"
    assert re.fullmatch(r"100%\|[█#]+\| epochs 1/1, blocks 2/2", drawn(terminal))


@pytest.mark.parametrize(
    ("workers", "text"),
    [
        (Workers("local", 2, wanted=2), "2 workers"),
        (
            Workers("slurm", 3, waiting=61, wanted=64, reasons=QUEUED),
            "3 of 64 workers running, 61 waiting in the queue (Priority, Resources)",
        ),
    ],
)
def test_the_bar_fits_a_terminal_of_80_columns(clock, monkeypatch, workers, text):
    terminal = use_terminal(monkeypatch)
    run = Progress()
    run(started(epochs=4001, blocks=40_010, samples=200_000_000))
    run(Polled(workers, 2))
    clock.now += 3
    run(done(samples=5000))
    line = drawn(terminal)
    assert len(line) <= 80
    assert re.match(r" +0%\|[^|]{10,}\| 1 day, 9:19:57 left, ", line)
    assert text[:35] in line
    assert line.endswith("workers") or line.endswith("…")
    run(Ended())


def test_a_terminal_has_the_bar_and_the_log_file_the_lines(clock, monkeypatch, caplog):
    use_terminal(monkeypatch)
    caplog.set_level(logging.DEBUG, "daskcurv")
    run = Progress()
    run(started(epochs=1, blocks=2, samples=200))
    run(local(1))
    clock.now += 31
    run(done(samples=100))
    lines = [*caplog.messages]
    run(Ended())
    assert {record.levelname for record in caplog.records[: len(lines)]} == {"DEBUG"}
    assert "blocks 1/2" in lines[-1]


def test_lines_are_logged_every_half_minute_and_when_workers_change(clock, caplog):
    caplog.set_level(logging.INFO, "daskcurv")
    run = Progress()
    run(started(epochs=1, blocks=200, samples=200))
    run(Polled(Workers("slurm", 1, wanted=8), 1))
    for _ in range(100):
        clock.now += 1
        run(Polled(Workers("slurm", 2, wanted=8), 1))
    assert len(caplog.records) == 1 + 3
    run(Polled(Workers("slurm", 2, starting=1, wanted=8), 1))
    assert len(caplog.records) == 1 + 3 + 1


def test_one_is_singular():
    assert [counted(n, "worker") for n in (0, 1, 2, 4001)] == [
        "0 workers", "1 worker", "2 workers", "4,001 workers",
    ]  # fmt: skip
