"""Workers inside an allocation, without one: what is started where, and when it is given up."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daskcurv.clusters.base import Reason, Why, Workers
from daskcurv.clusters.slurm import allocation
from daskcurv.clusters.slurm.allocation import Slot, Steps
from daskcurv.clusters.slurm.fleet import TRIES
from daskcurv.errors import ClusterError
from tests.support.builders import write_command

Allocation = Callable[..., Steps]


@pytest.fixture
def connected() -> list[str]:
    """Names of the workers that have joined."""
    return []


@pytest.fixture
def allocate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, connected: list[str]
) -> Iterator[Allocation]:
    """Make an allocation with a slot on each node; on those called bad… nothing runs."""
    write_command(
        tmp_path / "bin" / "srun",
        'case "$*" in *nodelist=bad*) echo "a library is missing"; exit 1;; esac; exec sleep 60',
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    monkeypatch.setattr(allocation, "worker_names", lambda client: connected)
    monkeypatch.setattr(allocation, "BACK_OFF_SECONDS", 0.0)
    started: list[Slot] = []

    def make(*nodes: str) -> Steps:
        started.extend(Slot(node, 0, tmp_path / f"{node}.out") for node in nodes)
        client: Any = None
        return Steps(client, started, [])

    yield make
    for slot in started:
        if slot.step is not None:
            slot.step.kill()
            slot.step.wait()


def poll(steps: Steps, until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not until():
        assert time.monotonic() < deadline
        steps.poll()
        time.sleep(0.01)


def test_a_bad_node_is_left_alone_and_the_others_are_waited_for(allocate, connected, caplog):
    steps = allocate("bad", "good")
    bad, good = steps._slots
    poll(steps, lambda: bad.starts == TRIES and bad.step is None)
    for _ in range(10):
        steps.poll()
    assert (bad.starts, good.starts) == (TRIES, 1)
    assert "bad (GPU 0) started no worker in 3 tries" in caplog.text
    assert "a library is missing" in caplog.text
    connected.append("good-0.1")
    assert steps.poll() == Workers(
        "allocation",
        running=1,
        waiting=1,
        wanted=2,
        reasons=(Reason(Why.NODE_EXCLUDED, "bad (GPU 0)", 1),),
    )


def test_many_bad_nodes_do_not_end_a_launch_before_the_good_one_has_its_worker(allocate, connected):
    steps = allocate("bad1", "bad2", "bad3", "bad4", "good")
    poll(steps, lambda: not any(slot.step for slot in steps._slots[:4]))
    for _ in range(10):
        steps.poll()
    connected.append("good-0.1")
    workers = steps.poll()
    assert (workers.running, workers.wanted) == (1, 5)
    assert workers.starting + workers.waiting == 4
    # From here on the others are tried again.
    poll(steps, lambda: all(slot.starts == TRIES for slot in steps._slots[:4]))
    assert steps._slots[4].starts == 1


@pytest.mark.parametrize("nodes", [["bad"], ["bad1", "bad2"], ["bad1", "bad2", "bad3", "bad4"]])
def test_where_every_node_is_bad_the_launch_ends_with_the_reason(allocate, nodes):
    steps = allocate(*nodes)
    with pytest.raises(ClusterError, match=r"no worker could be started[^$]*a library is missing"):
        poll(steps, lambda: False)
