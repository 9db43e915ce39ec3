"""One launcher at a time: the lock beside a results store."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daskcurv.errors import StoreError, StoreWriteError
from daskcurv.storage import launcher_lock, lock

HOLDER = """
import sys
from pathlib import Path
from daskcurv.storage import launcher_lock
with launcher_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``tmp_path / "s"`` until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, tmp_path / "s"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> Any:
    # The command line switches this off, for the whole process.
    monkeypatch.setattr(logging.getLogger("daskcurv"), "propagate", True)
    return caplog


def write_lock(path: Path, age: float = 0, **owner: Any) -> Path:
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_second_launcher_is_refused_while_the_first_lives(tmp_path, holder):
    with pytest.raises(StoreError) as refusal, launcher_lock(tmp_path / "s"):
        pytest.fail("both hold the lock")
    message = str(refusal.value)
    assert f"process {holder.pid}" in message
    assert socket.gethostname() in message
    assert str(tmp_path / "s.lock") in message
    assert [path.name for path in tmp_path.iterdir()] == ["s.lock"]

    holder.communicate()
    assert list(tmp_path.iterdir()) == []
    with launcher_lock(tmp_path / "s"):
        assert (tmp_path / "s.lock").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_does_not_get_the_lock_twice(tmp_path):
    with launcher_lock(tmp_path / "s"):
        with (
            pytest.raises(StoreError, match=f"process {os.getpid()}"),
            launcher_lock(tmp_path / "s"),
        ):
            pytest.fail("held twice")
        assert [path.name for path in tmp_path.iterdir()] == ["s.lock"]


@pytest.mark.parametrize("reaped", [True, False])
def test_the_lock_of_a_killed_launcher_is_taken_over_with_a_warning(
    tmp_path, holder, messages, reaped
):
    os.kill(holder.pid, signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert (tmp_path / "s.lock").exists()
    with launcher_lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s.lock").read_text())["pid"] == os.getpid()
        assert [path.name for path in tmp_path.iterdir()] == ["s.lock"]
    (warning,) = [record for record in messages.records if record.levelno >= logging.WARNING]
    assert str(holder.pid) in warning.getMessage()
    assert list(tmp_path.iterdir()) == []


def test_the_lock_of_a_process_whose_number_was_given_to_another_is_taken_over(tmp_path, holder):
    owner = json.loads((tmp_path / "s.lock").read_text())
    # This process lives, but is not the one that started when the lock's owner did.
    write_lock(tmp_path / "s.lock", **{**owner, "pid": os.getpid()})
    with launcher_lock(tmp_path / "s"):
        taken = json.loads((tmp_path / "s.lock").read_text())
        assert (taken["pid"], taken["started"]) != (os.getpid(), owner["started"])
        assert taken["pid"] == os.getpid()


def test_a_launcher_elsewhere_keeps_its_lock_while_it_touches_it(tmp_path):
    path = write_lock(tmp_path / "s.lock", age=60, host="node17", pid=1, started=1.0, since="today")
    with (
        pytest.raises(StoreError, match="process 1 on node17") as refusal,
        launcher_lock(tmp_path / "s"),
    ):
        pytest.fail("both hold the lock")
    assert str(path) in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["s.lock"]


def test_a_requeued_job_takes_over_the_lock_of_its_own_last_start(tmp_path, monkeypatch):
    store = tmp_path / "store"
    path = write_lock(tmp_path / "store.lock", host="elsewhere", pid=1, job="7", start="0")
    with pytest.raises(StoreError, match="another launcher"), launcher_lock(store):
        pass
    monkeypatch.setattr(lock, "_JOB", "7")
    # Another launcher of the same allocation has the same job, and the same start.
    with pytest.raises(StoreError, match="another launcher"), launcher_lock(store):
        pass
    monkeypatch.setattr(lock, "_START", "1")
    with launcher_lock(store):
        assert json.loads(path.read_text())["start"] == "1"


def test_the_lock_of_a_silent_launcher_elsewhere_is_taken_over(tmp_path, messages):
    write_lock(tmp_path / "s.lock", age=3600, host="node17", pid=1, started=1.0, since="today")
    with launcher_lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s.lock").read_text())["pid"] == os.getpid()
    assert "node17" in messages.text
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"null", b'"text"'],
    ids=["empty", "truncated", "not text", "list", "null", "string"],
)
def test_a_corrupt_lock_is_taken_over(tmp_path, content):
    (tmp_path / "s.lock").write_bytes(content)
    with launcher_lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "owner",
    [{"started": 1.0}, {"pid": "x", "started": 1.0}, {"pid": -1, "started": 1.0}],
    ids=["no process", "text for a process", "negative process"],
)
def test_a_lock_of_this_host_that_names_no_process_is_taken_over(tmp_path, owner):
    write_lock(tmp_path / "s.lock", host=socket.gethostname(), **owner)
    with launcher_lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("owner", [{}, {"pid": 1}], ids=["no process", "no start"])
def test_a_lock_without_a_start_is_judged_by_its_age(tmp_path, owner):
    path = tmp_path / "s.lock"
    write_lock(path, host=socket.gethostname(), **owner)
    with pytest.raises(StoreError, match="another launcher"), launcher_lock(tmp_path / "s"):
        pytest.fail("taken from its owner")
    os.utime(path, (0, 0))
    with launcher_lock(tmp_path / "s"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_where_processes_cannot_be_looked_up_a_live_lock_is_respected(tmp_path, monkeypatch):
    monkeypatch.setattr("daskcurv.storage.lock._started", lambda pid: None)
    with (
        launcher_lock(tmp_path / "s"),
        pytest.raises(StoreError, match=str(os.getpid())),
        launcher_lock(tmp_path / "s"),
    ):
        pytest.fail("held twice")
    assert list(tmp_path.iterdir()) == []


def test_a_launcher_touches_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("daskcurv.storage.lock._HEARTBEAT_SECONDS", 0.02)
    with launcher_lock(tmp_path / "s"):
        os.utime(tmp_path / "s.lock", (0, 0))
        deadline = time.monotonic() + 10
        while (tmp_path / "s.lock").stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.01)


def test_the_lock_is_released_when_the_run_fails(tmp_path):
    with pytest.raises(ZeroDivisionError), launcher_lock(tmp_path / "s"):
        _ = 1 / 0
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_another_launcher_took_over_is_not_removed(tmp_path):
    with launcher_lock(tmp_path / "s"):
        write_lock(tmp_path / "s.lock", host="node17", pid=1, started=1.0, since="today")
    assert json.loads((tmp_path / "s.lock").read_text())["host"] == "node17"


def test_a_lock_that_cannot_be_written_is_a_store_write_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError) as refusal, launcher_lock(tmp_path / "file" / "s"):
        pytest.fail("held")
    assert str(tmp_path / "file" / "s.lock") in str(refusal.value)


def test_a_lock_on_a_full_disk_is_a_store_write_error_that_leaves_no_file(tmp_path, monkeypatch):
    def full(path: Path, text: str) -> None:
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with (
        pytest.raises(StoreWriteError, match="No space left on device"),
        launcher_lock(tmp_path / "s"),
    ):
        pytest.fail("held")
    assert list(tmp_path.iterdir()) == []
