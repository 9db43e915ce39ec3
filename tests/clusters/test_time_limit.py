"""One time limit for the launcher and its workers."""

from __future__ import annotations

import time

import pytest

from daskcurv.clusters import time_limit
from daskcurv.clusters.time_limit import TimeLimit


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that pass, on both clocks."""
    passed = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: 500.0 + passed[0])
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + passed[0])
    # Set first, so that what a test hands down is removed after it.
    monkeypatch.setenv("DASKCURV_DEADLINE", "")
    monkeypatch.delenv("DASKCURV_DEADLINE")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    return passed


def test_without_a_limit_everything_is_allowed(clock):
    for limit in (TimeLimit(), TimeLimit.of_job(), TimeLimit.inherited()):
        limit.block_took(1e9)
        assert limit.allows(blocks=100, seconds=1e9)


def test_the_longest_block_counts(clock):
    limit = TimeLimit(100)
    assert limit.allows(blocks=4, seconds=60)
    for seconds in (5, 11, 7):
        limit.block_took(seconds)
    assert limit.allows(blocks=3, seconds=60)
    assert not limit.allows(blocks=4, seconds=60)
    clock[0] += 70
    assert limit.allows(blocks=0, seconds=25)
    assert not limit.allows(blocks=1, seconds=25)


@pytest.mark.parametrize(("told", "expected"), [(600.0, True), (90.0, False), (None, True)])
def test_a_job_s_limit_is_what_slurm_tells(clock, monkeypatch, told, expected):
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setattr(time_limit, "seconds_left", {"12": told}.get)
    assert TimeLimit.of_job().allows(blocks=0, seconds=100) is expected


def test_the_limit_reaches_the_process_that_computes(clock):
    TimeLimit(1000).hand_down("")
    clock[0] += 300
    inherited = TimeLimit.inherited()
    assert inherited.allows(blocks=0, seconds=699)
    assert not inherited.allows(blocks=0, seconds=701)


def test_jobs_that_started_together_do_not_leave_together(clock):
    left = []
    for name in ("11", "12", "13", "14"):
        TimeLimit(36000).hand_down(name)
        inherited = TimeLimit.inherited()
        left.append(max(s for s in range(36000) if inherited.allows(blocks=0, seconds=s)))
    assert all(36000 * 0.95 - 5 < seconds <= 36000 for seconds in left)
    assert max(left) - min(left) > 60
