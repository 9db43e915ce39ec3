"""Output that cannot be written stops no computation; text that cannot be encoded is still read."""

from __future__ import annotations

import errno
import logging
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest

from daskcurv import logs
from daskcurv.streams import Output, text_output

# A program that writes to both streams, as commands do, and shows that it got to its end.
PROGRAM = """
import sys, warnings
from pathlib import Path
from daskcurv.cli import main
from daskcurv import cli

def command(words):
    from daskcurv.streams import keep_computing
    from daskcurv.logs import log_to_file, stream_lost
    keep_computing(stream_lost)
    log_to_file(Path("log"))
    for number in range(3):
        cli.log.info("message %d", number)
        print("result", number)
        warnings.warn(f"warning {number}")
    Path("end").touch()
    return 0

cli._run = command
sys.exit(main(["status"]))
"""


def run_without_a_screen(root: Path, kind: str) -> int:
    command = [sys.executable, "-c", PROGRAM]
    if kind == "closed":
        command = ["sh", "-c", '"$@" >&- 2>&-', "sh", *command]
        return subprocess.run(command, cwd=root, check=False).returncode
    if kind == "full disk":
        with open("/dev/full", "w") as full:
            return subprocess.run(
                command, cwd=root, stdout=full, stderr=full, check=False
            ).returncode
    ours, theirs = pty.openpty() if kind == "terminal" else os.pipe()
    os.close(ours)
    try:
        return subprocess.run(
            command, cwd=root, stdout=theirs, stderr=theirs, check=False, start_new_session=True
        ).returncode
    finally:
        os.close(theirs)


@pytest.mark.parametrize("kind", ["terminal", "pipe", "closed", "full disk"])
def test_a_command_that_computes_goes_on_without_its_screen(tmp_path, kind):
    assert run_without_a_screen(tmp_path, kind) == 0
    assert (tmp_path / "end").exists()
    (log,) = (tmp_path / "log").iterdir()
    text = log.read_text()
    assert all(f"message {number}" in text for number in range(3))
    assert ("standard error takes no more output" in text) == (kind != "closed")


def test_what_fails_once_is_tried_again(tmp_path):
    lost: list[OSError] = []
    output = Output(os.open(tmp_path / "file", os.O_WRONLY | os.O_CREAT), closefd=True)
    output.lost = lost.append
    stream = text_output(output, "utf-8", "strict")
    whole = os.dup(output.fileno())
    full = os.open("/dev/full", os.O_WRONLY)
    stream.write("first\n")
    os.dup2(full, output.fileno())
    stream.write("second\n")
    stream.write("third\n")
    assert [error.errno for error in lost] == [errno.ENOSPC]
    os.dup2(whole, output.fileno())
    stream.write("fourth\n")
    os.dup2(full, output.fileno())
    stream.write("fifth\n")
    assert len(lost) == 2
    stream.close()
    os.close(whole)
    os.close(full)
    assert (tmp_path / "file").read_text() == "first\nfourth\n"


def test_all_of_a_long_text_gets_through_a_pipe_that_does_not_block():
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    text = "".join(f"line {number}\n" for number in range(30_000))
    assert len(text) > 4 * 65536
    reader = subprocess.Popen(
        [sys.executable, "-c", "import sys, time; time.sleep(0.3); print(len(sys.stdin.read()))"],
        stdin=ours,
        stdout=subprocess.PIPE,
        text=True,
    )
    os.close(ours)
    with text_output(Output(theirs, closefd=True), "utf-8", "strict") as stream:
        stream.write(text)
    assert reader.communicate()[0] == f"{len(text)}\n"


@pytest.mark.parametrize("blocking", [True, False])
def test_a_reader_that_has_stopped_delays_a_run_once(blocking):
    ours, theirs = os.pipe()
    os.set_blocking(theirs, blocking)
    lost: list[OSError] = []
    stream = text_output(
        Output(theirs, closefd=True, lost=lost.append, patience=0.2), "utf-8", "strict"
    )
    began = time.monotonic()
    for _ in range(100):
        stream.write("a message of a hundred characters".ljust(99) * 40 + "\n")
    assert 0.2 <= time.monotonic() - began < 1
    assert len(lost) == 1
    while len(os.read(ours, 65536)) == 65536:
        pass
    stream.write("the last\n")
    assert os.read(ours, 65536) == b"the last\n"
    stream.close()
    os.close(ours)


def test_characters_that_a_terminal_lacks_are_written_plainly():
    ours, theirs = os.pipe()
    with text_output(Output(theirs, closefd=True), "ascii", "strict") as stream:
        stream.write("0 … 99, 3×3, Zoë, file-\udce9.npy\n")
    with os.fdopen(ours, "rb") as reader:
        assert reader.read() == b"0 ... 99, 3x3, Zo\\xeb, file-\xe9.npy\n"


def test_a_log_disk_that_is_full_is_reported_once_and_used_again(
    tmp_path, package_log, monkeypatch, capsys
):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    logs.log_to_console()
    path = logs.log_to_file(tmp_path)
    (handler,) = (one for one in package_log.handlers if isinstance(one, logging.FileHandler))
    assert handler.stream is not None
    descriptor = handler.stream.fileno()
    whole = os.dup(descriptor)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, descriptor)
    package_log.info("one")
    package_log.info("two")
    os.dup2(whole, descriptor)
    package_log.info("three")
    os.close(whole)
    os.close(full)
    shown = capsys.readouterr().err
    assert shown.count(f"cannot write the log file {path}: No space left on device") == 1
    assert [word in shown for word in ("one", "two", "three", "Traceback")] == [1, 1, 1, 0]
    assert path.read_text().count("\n") == 1
    assert "three" in path.read_text()


def test_a_log_file_holds_any_text_in_any_locale(tmp_path):
    program = (
        "import logging; from pathlib import Path; from daskcurv.logs import log_to_file\n"
        "print(log_to_file(Path('.')))\n"
        "logging.getLogger('daskcurv').error('Zo\\xeb \\u2026')"
    )
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stderr == ""
    assert (tmp_path / run.stdout.strip()).read_text().endswith("ERROR Zoë …\n")
