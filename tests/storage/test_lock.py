"""One launcher at a time: the lock beside a results store."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daskcurv.cli import main
from daskcurv.errors import ConfigError, StoreError, StoreWriteError
from daskcurv.storage import ResultsStore, launcher_lock, lock, schema
from daskcurv.storage.integrity.columns import discard_column, restore_columns
from daskcurv.storage.integrity.verify import repair
from tests.support.stores import block_values, epoch_columns, make_store, sample_columns

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


def write_lock(path: Path, age: float = 0, **owner: Any) -> Path:
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


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
    tmp_path, holder, caplog, reaped
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
    (warning,) = [record for record in caplog.records if record.levelno >= logging.WARNING]
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


def test_the_lock_of_a_silent_launcher_elsewhere_is_taken_over(tmp_path, caplog):
    write_lock(tmp_path / "s.lock", age=3600, host="node17", pid=1, started=1.0, since="today")
    with launcher_lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s.lock").read_text())["pid"] == os.getpid()
    assert "node17" in caplog.text
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


@pytest.fixture
def ended(tmp_path: Path) -> dict[str, Any]:
    """What a launcher that was killed has left in ``tmp_path / "s.lock"``."""
    with launcher_lock(tmp_path / "s"):
        owner: dict[str, Any] = json.loads((tmp_path / "s.lock").read_text())
    with subprocess.Popen(["true"]) as process:
        owner["pid"] = process.pid
    return owner


@pytest.mark.parametrize("pid", [None, "x", -1, 0], ids=str)
def test_a_lock_of_this_host_that_names_no_process_is_taken_over(tmp_path, ended, pid):
    write_lock(tmp_path / "s.lock", **{**ended, "pid": pid})
    with launcher_lock(tmp_path / "s"):
        assert json.loads((tmp_path / "s.lock").read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "other",
    [
        {"namespace": "pid:[1]"},
        {"namespace": None},
        {"started": "00000000-0000-0000-0000-000000000000/1"},
        {"host": "node17"},
        {"directory": 1},
    ],
    ids=["container", "earlier version", "other boot", "other host", "copied directory"],
)
def test_a_process_number_says_nothing_where_it_can_be_another_ones(tmp_path, ended, other):
    path = write_lock(tmp_path / "s.lock", age=60, **{**ended, **other})
    with pytest.raises(StoreError, match="5 minutes"), launcher_lock(tmp_path / "s"):
        pytest.fail("taken from a launcher that may live")
    assert lock.holder(tmp_path / "s") is not None
    os.utime(path, (time.time() - 3600,) * 2)
    assert lock.holder(tmp_path / "s") is None
    with launcher_lock(tmp_path / "s"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


def test_a_launcher_of_an_earlier_version_keeps_its_lock_as_long_as_it_lives(tmp_path, holder):
    owner = json.loads((tmp_path / "s.lock").read_text())
    earlier = {name: owner[name] for name in ("host", "pid", "started", "since", "job", "start")}
    write_lock(tmp_path / "s.lock", age=3600, **earlier)
    with pytest.raises(StoreError, match=f"process {holder.pid}"), launcher_lock(tmp_path / "s"):
        pytest.fail("both hold the lock")


def test_a_process_that_is_hidden_from_this_user_is_not_taken_for_dead(
    tmp_path, holder, monkeypatch
):
    own = lock._started(os.getpid())
    monkeypatch.setattr(lock, "_started", lambda pid: own if pid == os.getpid() else None)
    with pytest.raises(StoreError, match=f"process {holder.pid}"), launcher_lock(tmp_path / "s"):
        pytest.fail("both hold the lock")


def test_process_numbers_of_another_namespaces_proc_are_not_used(tmp_path, monkeypatch):
    # What /proc/self says there; a process of this number is another one's.
    monkeypatch.setattr(os, "getpid", lambda: 1)
    assert lock._namespace() is None
    assert lock._started(1) is None


NAMES = {
    "as it is": "scratch/c",
    "link": "home/link",
    "link to a link": "home/second",
    "through a linked directory": "elsewhere/c",
    "up through a linked directory": "elsewhere/../scratch/c",
    "up from within": "scratch/c/sub/..",
    "with a slash": "scratch/c/",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with several names for ``scratch/c``, which is the current directory."""
    (tmp_path / "scratch").mkdir()
    (tmp_path / "home").mkdir()
    (tmp_path / "home/link").symlink_to("../scratch/c")
    (tmp_path / "home/second").symlink_to(tmp_path / "home/link")
    (tmp_path / "elsewhere").symlink_to("scratch")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_store_has_one_lock_whatever_it_is_called(place, name, exists, monkeypatch):
    if exists or name.endswith(".."):
        (place / "scratch/c/sub").mkdir(parents=True)
    with launcher_lock(Path(name)):
        assert (place / "scratch/c.lock").exists()
        assert [entry.name for entry in (place / "home").iterdir()] == ["link", "second"]
        for other in (*NAMES.values(), *(f"{place}/{one}" for one in NAMES.values())):
            if (place / "scratch/c").exists() or not other.endswith(".."):
                with pytest.raises(StoreError, match="another"), launcher_lock(Path(other)):
                    pytest.fail("held twice")
                assert lock.holder(Path(other)) is not None
        monkeypatch.chdir("/")
    assert not (place / "scratch/c.lock").exists()


def test_a_lock_that_an_earlier_version_put_beside_a_link_is_respected(place):
    path = write_lock(place / "home/link.lock", age=60, host="node17", pid=1, started=1.0)
    for name in ("home/link", "home/second"):
        with pytest.raises(StoreError, match="process 1 on node17"), launcher_lock(Path(name)):
            pytest.fail("both hold the lock")
    os.utime(path, (0, 0))
    with launcher_lock(Path("home/link")):
        pass


@pytest.mark.parametrize(
    ("target", "says"), [("nowhere/c", "nowhere is not"), ("loop", "circular link")]
)
def test_a_link_that_leads_nowhere_is_refused_by_name(tmp_path, target, says):
    (tmp_path / "loop").symlink_to(target)
    with pytest.raises(ConfigError, match=says) as refusal, launcher_lock(tmp_path / "loop"):
        pytest.fail("held")
    assert str(tmp_path / "loop") in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["loop"]


def test_a_store_is_locked_under_a_name_that_no_link_tells(tmp_path):
    make_store(tmp_path / "s", 0)
    with launcher_lock(tmp_path / "s") as held:
        with pytest.raises(StoreError) as refusal, launcher_lock(tmp_path / "s"):
            pytest.fail("held twice")
        both = f"remove {tmp_path}/s.lock and {tmp_path}/s/{lock.INSIDE}"
        assert both in str(refusal.value)
        # As a bind mount would show it: the same directory, with nothing beside it.
        (tmp_path / "mount").mkdir()
        os.rename(tmp_path / "s", tmp_path / "mount/other")
        with pytest.raises(StoreError, match="another"), launcher_lock(tmp_path / "mount/other"):
            pytest.fail("held twice")
        assert lock.holder(tmp_path / "mount/other") is not None
        with pytest.raises(StoreError, match="another"), launcher_lock(tmp_path / "s"):
            pytest.fail("held twice")
        assert [path.name for path in (tmp_path / "mount").iterdir()] == ["other"]
        with pytest.raises(StoreWriteError, match="is gone"):
            held.check()


def test_both_files_of_a_killed_launcher_are_taken_over_with_one_warning(tmp_path, ended, caplog):
    make_store(tmp_path / "s", 0)
    inside = write_lock(tmp_path / "s" / lock.INSIDE, **ended)
    write_lock(inside, **{**ended, "directory": inside.parent.stat().st_ino})
    with launcher_lock(tmp_path / "s") as held:
        assert held.held
    assert not inside.exists()
    assert caplog.text.count("took over") == 1


CHANGES: dict[str, Callable[[ResultsStore], None]] = {
    "add epochs": lambda store: store.add_epochs(epoch_columns(100)),
    "complete an epoch": lambda store: store.set_epoch(0, complete=True),
    "discard a block": lambda store: store.discard_block(0, 0),
    "rewrite metadata": lambda store: store.rewrite_metadata("label"),
    "discard a column": lambda store: discard_column(store, schema.COLUMN["task"]),
    "restore a column": lambda store: restore_columns(store, sample_columns(), epoch_columns(0)),
    "repair": lambda store: repair(store, []),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_launcher_that_lost_its_lock_changes_nothing(tmp_path, monkeypatch, change):
    monkeypatch.setattr(lock, "_RESTORED_SECONDS", 0.0)
    with launcher_lock(tmp_path / "s") as held:
        store = make_store(tmp_path / "s", 0, lock=held)
        store.write_block(0, 0, block_values(store, 0))
        (tmp_path / "s/num_workers/c/0").unlink()  # a column to restore
        (tmp_path / "s/label/rest.partial").touch()
        before = contents(tmp_path / "s")
        write_lock(tmp_path / "s.lock", host="node17", pid=1, started=1.0, since="today")
        with pytest.raises(StoreWriteError, match=r"no longer holds .* process 1 on node17"):
            change(store)
        assert contents(tmp_path / "s") == before


def test_a_launcher_that_holds_its_lock_changes_the_store(tmp_path):
    with launcher_lock(tmp_path / "s") as held:
        make_store(tmp_path / "s", 0, lock=held)
        for change in CHANGES.values():
            store = ResultsStore.open(tmp_path / "s", lock=held)
            (tmp_path / "s/num_workers/c/0").unlink(missing_ok=True)  # a column to restore
            change(store)
        store = ResultsStore.open(tmp_path / "s")
        assert store.read("epoch").tolist() == [0, 100]
        assert store.read("complete").tolist() == [True, False]
    assert not (tmp_path / "s" / lock.INSIDE).exists()


def test_a_store_is_not_put_in_place_by_a_launcher_that_lost_its_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_RESTORED_SECONDS", 0.0)
    with launcher_lock(tmp_path / "s") as held:
        (tmp_path / "s.lock").unlink()
        with pytest.raises(StoreWriteError, match="no longer holds"):
            make_store(tmp_path / "s", 0, lock=held)
    assert list(tmp_path.iterdir()) == []


def test_a_lock_that_is_given_back_at_once_is_not_lost(tmp_path):
    with launcher_lock(tmp_path / "s") as held:
        os.rename(tmp_path / "s.lock", tmp_path / "grave")
        back = threading.Timer(0.1, os.rename, (tmp_path / "grave", tmp_path / "s.lock"))
        back.start()
        held.check()
        back.join()


def test_a_launcher_does_not_keep_another_ones_lock_alive(tmp_path, monkeypatch):
    with launcher_lock(tmp_path / "s") as held:
        path = write_lock(tmp_path / "s.lock", age=3600, host="node17", pid=1, started=1.0)
        before = path.stat().st_mtime
        held._touch()
        assert path.stat().st_mtime == before


@pytest.mark.parametrize(("umask", "mode"), [(0o002, 0o664), (0o027, 0o640), (0o077, 0o600)])
def test_who_may_read_a_lock_is_for_the_umask_to_say(tmp_path, umask, mode):
    make_store(tmp_path / "s", 0)
    before = os.umask(umask)
    try:
        with launcher_lock(tmp_path / "s"):
            for path in (tmp_path / "s.lock", tmp_path / "s" / lock.INSIDE):
                assert stat.S_IMODE(path.stat().st_mode) == mode
    finally:
        os.umask(before)


def test_a_lock_that_this_user_may_not_read_is_judged_by_its_age(tmp_path, monkeypatch):
    path = write_lock(tmp_path / "s.lock", host="node17", pid=1)
    read_text = Path.read_text

    def secret(self: Path) -> str:
        if self.exists() and self.stat().st_ino == locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        return read_text(self)

    locked = path.stat().st_ino
    monkeypatch.setattr(Path, "read_text", secret)
    with pytest.raises(StoreError, match="cannot be read"), launcher_lock(tmp_path / "s"):
        pytest.fail("both hold the lock")
    os.utime(path, (0, 0))
    with launcher_lock(tmp_path / "s"):
        assert json.loads(path.read_text())["pid"] == os.getpid()


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


def test_every_store_that_a_launch_changes_is_guarded_by_its_lock(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(lock, "_RESTORED_SECONDS", 0.0)
    path = project.store.with_name("curvature.zarr.lock")
    filled = []

    def rob(options: Any, inputs: Any, checkpoints: Any, store: ResultsStore) -> None:
        filled.append(store.path.name)
        write_lock(path, host="node17", pid=1, started=1.0, since="today")
        store.set_epoch(0, complete=True)
        pytest.fail("went on without the lock")

    monkeypatch.setattr("daskcurv.runs.launch.make_plan", rob)
    # A store that is made, one that is there, and one beside it for more probes.
    for extra in ([], [], ["--n_probes", "3"]):
        assert main(["launch", *project.launch_arguments(*extra)]) == 2
        assert "no longer holds the lock" in capsys.readouterr().err
        assert json.loads(path.read_text())["host"] == "node17"
        path.unlink()
    assert filled == ["curvature.zarr", "curvature.zarr", "curvature.zarr.3-probes"]
    assert not (project.store / lock.INSIDE).exists()
    assert not ResultsStore.open(project.store).read("complete").any()
    assert "3-probes" not in project.store.with_name("curvature.zarr.run.json").read_text()
