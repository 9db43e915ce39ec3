"""``daskcurv status``, on runs that go on, were killed, failed, and ended."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daskcurv.cli import main, stores
from daskcurv.clusters.base import Workers
from daskcurv.experiment.curriculum import active_samples
from daskcurv.runs.accounts import record as run_record
from daskcurv.runs.accounts.record import RunRecord, recording
from daskcurv.runs.accounts.tally import Tally
from daskcurv.runs.events import Polled
from daskcurv.runs.outcome import State
from daskcurv.runs.status import describe, read_status
from daskcurv.runs.wording import STATES
from daskcurv.storage import launcher_lock
from daskcurv.storage.compact import compact
from daskcurv.storage.working import ResultsStore
from tests.support.builders import make_model
from tests.support.crashes import finished_blocks
from tests.support.events import done, started
from tests.support.launches import BLOCKS, SLOW, assert_ok, launch_in_progress, wait_for_blocks
from tests.support.project import Project
from tests.support.stores import finish, make_store

# Of 60 samples, the first 4 of 10 classes are active at epochs 0 and 1, 8 at 2, all at 4.
EPOCHS = 4


@pytest.fixture
def running(project: Project) -> Iterator[subprocess.Popen[str]]:
    with launch_in_progress(project) as process:
        yield process


def status_of(project: Project, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["status", str(project.store), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def replace_weights(project: Project, epoch: int) -> None:
    (path,) = project.models.glob(f"*epoch-{epoch}.pt")
    torch.save(make_model(seed=5).state_dict(), path)


def files_of(root: Path) -> dict[Path, tuple[int, int]]:
    return {
        path: (path.stat().st_ino, path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.exists()
    }


def test_a_run_is_followed_until_it_is_killed_and_until_its_end(project, running, capsys):
    before = len(finished_blocks(project))
    status = status_of(project, capsys)
    after = len(finished_blocks(project))
    store, run = status["store"], status["run"]
    assert before <= store["blocks"]["done"] <= after
    assert store["blocks"]["of"] == BLOCKS
    assert (run["state"], run["pid"]) == ("running", running.pid)
    assert run["workers"] == "2 workers"
    assert (run["state_code"], run["fleet"]["running"], run["fleet"]["wanted"]) == ("running", 2, 2)
    assert Path(run["log"]).parent == project.root / "log"
    run_record_file = project.store.with_name("curvature.zarr.run.json")
    # The file is written every two seconds; the blocks are counted now.
    wait_for_blocks(project, running, 14)
    status = status_of(project, capsys)
    assert 0 < status["run"]["blocks"]["done"] <= status["store"]["blocks"]["done"]
    assert 1 <= len(status["run"]["devices"]) <= 2
    for worker in status["run"]["devices"].values():
        assert worker["device"] == "cpu"
        assert worker["blocks"] >= 1

    os.killpg(running.pid, signal.SIGKILL)
    running.communicate(timeout=60)
    files = files_of(project.root)
    status = status_of(project, capsys)
    assert status["run"]["state"] == STATES[State.KILLED]
    done = len(finished_blocks(project))
    assert status["store"]["blocks"] == {"done": done, "of": BLOCKS}
    assert main(["status", str(project.store), "--watch"]) == 0
    text = capsys.readouterr().out
    assert "killed: no exit was recorded" in text
    assert "run the same launch command again" in text
    assert files_of(project.root) == files, "it wrote something"
    assert run_record_file in files

    assert_ok(project.launch(*SLOW))
    status = status_of(project, capsys)
    assert status["run"]["state"] == "finished"
    assert status["run"]["blocks"] == {"done": BLOCKS - done, "of": BLOCKS - done}
    assert status["store"]["epochs"] == {"done": EPOCHS, "of": EPOCHS}
    samples = int((ResultsStore.open(project.store).read("status") == 1).sum())
    assert status["store"]["samples"] == {"done": samples, "of": samples}
    assert "continue" not in describe(status)
    assert not [path for path in project.root.iterdir() if "partial" in path.name]


def test_watching_ends_with_the_run(project, running, capsys, monkeypatch):
    monkeypatch.setattr(stores, "WATCH_SECONDS", 0.2)
    assert main(["status", str(project.store), "--watch", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) > 2
    assert {line["run"]["state"] for line in lines[:-1]} == {"running"}
    assert lines[-1]["run"]["state"] == "finished"
    done = [line["store"]["blocks"]["done"] for line in lines]
    assert done == sorted(done)
    assert done[-1] == BLOCKS


def test_an_interrupted_run_is_told_from_one_that_failed(project, running, capsys):
    os.killpg(running.pid, signal.SIGINT)
    running.communicate(timeout=60)
    run = status_of(project, capsys)["run"]
    assert (run["state"], run["state_code"]) == ("interrupted", "interrupted")
    replace_weights(project, 0)
    run = project.launch(*SLOW)
    assert run.returncode == 2
    status = status_of(project, capsys)
    assert status["run"]["state"] == "failed"
    assert "the checkpoints of epochs 0 have changed" in status["run"]["reason"]
    assert "run       failed: the checkpoints of epochs 0 have" in describe(status)


def test_blocks_that_failed_are_counted_and_named(project, running, capsys):
    # Read by the workers when its turn comes.
    replace_weights(project, 4)
    running.communicate(timeout=200)
    assert running.returncode == 1
    status = status_of(project, capsys)
    assert status["run"]["state"] == "finished, some blocks failed"
    assert len(status["run"]["failed"]) == BLOCKS / EPOCHS
    assert "it changed during or before the run" in status["run"]["failed"][0]["reason"]
    text = describe(status)
    assert "failed    6 blocks, set aside; last one:\n          epoch 4 block" in text
    assert "warning: trying again: epoch 4 block" in text or "error: " in text


def test_other_stores_have_no_run_on_record(project, tmp_path, capsys):
    assert_ok(project.launch())
    compact(ResultsStore.open(project.store), tmp_path / "compact.zarr")
    status = read_status(tmp_path / "compact.zarr")
    assert status["run"] is None
    assert status["store"]["epochs"] == {"done": EPOCHS, "of": EPOCHS}
    assert "run       no record" in describe(status)


def test_where_there_is_nothing_it_says_so(tmp_path, capsys):
    assert main(["status", str(tmp_path / "none.zarr")]) == 2
    assert "none.zarr does not exist" in capsys.readouterr().err


def test_a_run_that_is_checking_its_inputs_has_no_store_yet(tmp_path):
    store = tmp_path / "s.zarr"
    with launcher_lock(store), recording(store):
        status = read_status(store)
        assert (status["store"], status["run"]["state"]) == (None, "running")
        assert "not created yet: inputs are being checked" in describe(status)


def test_another_process_that_holds_the_lock_is_not_taken_for_the_run(tmp_path):
    store = tmp_path / "s.zarr"
    record = RunRecord(store)
    record.update(pid=1)
    record.write()
    with launcher_lock(store):
        assert read_status(store)["run"]["state"] == STATES[State.KILLED]


def test_a_run_is_seen_by_whatever_name_its_store_is_called(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("s.zarr")
    monkeypatch.chdir(tmp_path)
    with launcher_lock(tmp_path / "link") as held, recording(tmp_path / "link", held):
        for name in ("link", "s.zarr", tmp_path / "s.zarr"):
            assert read_status(Path(name))["run"]["state"] == "running"


def test_a_launcher_in_another_container_is_not_called_dead(tmp_path):
    store = tmp_path / "s.zarr"
    with launcher_lock(store) as held:
        owner = json.loads((tmp_path / "s.zarr.lock").read_text())
        # As seen from a container with this host's name, which has no such process.
        with subprocess.Popen(["true"]) as process:
            owner.update(pid=process.pid, namespace="pid:[1]")
        record = RunRecord(store, held)
        record.write()
        path = tmp_path / "s.zarr.lock"
        path.write_text(json.dumps(owner))
        assert read_status(store)["run"]["state"] == "running"
        os.utime(path, (0, 0))
        assert read_status(store)["run"]["state"] == STATES[State.KILLED]


def test_a_store_without_its_surroundings_is_said_to_be_worked_on(tmp_path):
    make_store(tmp_path / "s", 0)
    with launcher_lock(tmp_path / "s") as held, recording(tmp_path / "s", held):
        # As a bind mount would show it.
        (tmp_path / "mount").mkdir()
        os.rename(tmp_path / "s", tmp_path / "mount/s")
        said = describe(read_status(tmp_path / "mount/s"))
    assert f"no record here, but process {os.getpid()} on {socket.gethostname()} has" in said


def test_a_launch_that_lost_its_lock_leaves_the_other_ones_record_alone(tmp_path):
    store = tmp_path / "s.zarr"
    with launcher_lock(store) as first, recording(store, first) as record:
        (tmp_path / "s.zarr.lock").unlink()
        with launcher_lock(store) as second, recording(store, second):
            assert read_status(store)["run"]["lock"] == second.token
            record.write()
            assert read_status(store)["run"]["lock"] == second.token


def test_with_probes_being_added_the_store_that_is_filled_is_counted(project, capsys):
    assert_ok(project.launch())
    larger = project.store.with_name("curvature.zarr.4-probes")
    shutil.copytree(project.store, larger)
    store = ResultsStore.open(larger)
    store.set_epoch(0, complete=False)
    store.discard_block(0, 0)
    record = RunRecord(project.store)
    record.update(store=str(larger))
    record.write()
    assert read_status(project.store)["store"]["epochs"] == {"done": EPOCHS - 1, "of": EPOCHS}


@pytest.mark.parametrize("change", ["copied", "renamed"])
def test_a_store_that_was_copied_or_renamed_is_counted_itself(tmp_path, change):
    (tmp_path / "first").mkdir()
    first = finish(make_store(tmp_path / "first/c.zarr", 0, 200))
    record = RunRecord(first.path)
    record.update(store=str(first.path))
    record.end(State.FINISHED)
    record.write()
    if change == "copied":
        shutil.copytree(tmp_path / "first", tmp_path / "second")
        path = tmp_path / "second/c.zarr"
    else:
        path = tmp_path / "first/d.zarr"
        shutil.copytree(first.path, path)
        shutil.copy(tmp_path / "first/c.zarr.run.json", tmp_path / "first/d.zarr.run.json")
    (path / "curvature/c/1/0").unlink()
    found = read_status(path)["store"]
    assert found["lost"] == ["epoch 200 block 0: curvature"]
    assert str(path) in found["remedy"]
    whole = read_status(first.path)["store"]
    assert (whole["lost"], whole["remedy"]) == ([], None)


def test_a_run_goes_on_if_it_cannot_say_how_far_it_is(project):
    project.store.with_name("curvature.zarr.run.json.partial").mkdir()
    run = project.launch()
    assert_ok(run)
    assert run.stdout.count("daskcurv status is out of date until this is fixed") == 1


def test_workers_that_are_gone_are_left_out_at_once_and_others_stay(tmp_path, monkeypatch):
    clock = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    record = RunRecord(tmp_path / "s")
    record(done(worker="a:1", address="tls://a:5", job="17"))
    record(done(block=1, worker="a:2", address="tls://a:6", job="18"))

    def shown(*connected: str) -> dict[str, Any]:
        record(Polled(Workers("local", len(connected)), 0, frozenset(connected)))
        record.write()
        content = run_record.read_record(tmp_path / "s")
        assert content is not None
        return {name: of["job"] for name, of in content["devices"].items()}

    assert shown("tls://a:5", "tls://a:6") == {"a:1": "17", "a:2": "18"}
    # However long its block takes.
    clock[0] += 1e6
    assert shown("tls://a:6", "tls://a:7") == {"a:2": "18"}
    assert shown() == {}


def test_the_text_of_a_run_on_a_cluster():
    status = {
        "path": "curvature.zarr",
        "store": {
            "epochs": {"done": 1, "of": 21},
            "blocks": {"done": 13, "of": 210},
            "samples": {"done": 5000, "of": 20000},
            "lost": [],
        },
        "run": {
            "state": "running",
            "host": "login1",
            "pid": 4711,
            "job": None,
            "began": "2026-11-02T09:00:00+01:00",
            "updated": "2026-11-02T09:30:00+01:00",
            "log": "/home/me/log/launch-1.log",
            "dashboard": "ssh -L 8787:127.0.0.1:8787 login1, then http://127.0.0.1:8787/status",
            "failed": [],
            "running": 3,
            "epochs": {"done": 1, "of": 21},
            "blocks": {"done": 13, "of": 210},
            "samples": {"done": 5000, "of": 20000},
            "samples_per_second": 2.5,
            "seconds_left": 6000.0,
            "workers": "3 of 8 workers running, 5 jobs waiting in the queue",
            "devices": {
                "gpu1:9": {
                    "device": "NVIDIA H100",
                    "job": "17",
                    "blocks": 13,
                    "last_block": "epoch 200 block 2",
                    "last_seconds": 4.25,
                    "last_time": "2026-11-02T09:29:58+01:00",
                }
            },
            "messages": [
                {"time": "2026-11-02T09:10:00+01:00", "level": "WARNING", "text": "job 7 ended"}
            ],
        },
    }
    text = describe(status, datetime.fromisoformat("2026-11-02T09:30:40+01:00"))
    assert text == (
        "store     curvature.zarr\n"
        "done      1 of 21 epochs, 13 of 210 blocks, 5,000 of 20,000 samples (25.0%)\n"
        "run       running\n"
        "          since 2026-11-02 09:00:00 +0100, as of 0:00:40 ago, process 4711, login1\n"
        "progress  13 of 210 blocks of this run, 3 running, 0 failed\n"
        "rate      2.5 samples/s, 1:40:00 left, until 2026-11-02 11:10 +0100\n"
        "workers   3 of 8 workers running, 5 jobs waiting in the queue\n"
        "          gpu1:9  job 17, NVIDIA H100, 13 blocks, last one (epoch 200 block 2) in 4.2 s\n"
        "messages  09:10:00 +0100 warning: job 7 ended\n"
        "log       /home/me/log/launch-1.log\n"
        "dashboard ssh -L 8787:127.0.0.1:8787 login1, then http://127.0.0.1:8787/status"
    )


def test_the_rate_is_that_of_the_last_minutes(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    tally = Tally()
    tally(started(epochs=2, blocks=1000, samples=100_000))
    assert tally.state()["seconds_left"] is None
    for _ in range(100):
        clock[0] += 10
        tally(done(samples=50))
    state = tally.state()
    assert state["samples_per_second"] == pytest.approx(5)
    assert state["seconds_left"] == pytest.approx((100_000 - 5000) / 5)
    # Most of the workers went away: soon the rate is that of those left.
    for _ in range(60):
        clock[0] += 10
        tally(done(samples=10))
    assert tally.state()["samples_per_second"] == pytest.approx(1, rel=0.1)
    assert tally.state()["blocks"] == {"done": 160, "of": 1000}
    # Nothing comes any more.
    clock[0] += 6000
    state = tally.state()
    assert state["samples_per_second"] == pytest.approx(0, abs=0.02)


def test_active_samples_are_counted_by_block():
    first_active = np.array([5, 0, 5, 10, 10, 0, 5])
    counts = active_samples(first_active, [10, 0, 5, 7], block_size=3)
    np.testing.assert_array_equal(counts, [[3, 3, 1], [1, 1, 0], [3, 1, 1], [3, 1, 1]])
    np.testing.assert_array_equal(active_samples(first_active + 1, [0], 4), [[0, 0]])
