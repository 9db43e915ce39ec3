"""The command line: help, suggestions, exit codes, and errors that are nobody's input."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import daskcurv
from daskcurv import cli
from daskcurv.cli import build_parser, main
from daskcurv.cli.parser import CommandParser
from daskcurv.cli.runs import COMMON
from daskcurv.errors import StoreError
from tests.support.project import REPOSITORY

SBATCH = {"--exclusive", "--gres", "--mem", "--nodes", "--time", "--signal"}
"""Options of other programs that messages may name, beside the ones of ours."""


@pytest.fixture(scope="module")
def commands() -> dict[str, CommandParser]:
    parsers = build_parser().commands
    return {name: parser for name, parser in parsers.items() if "-" not in name}


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message with which a command line is refused, and the usage above it."""
    with pytest.raises(SystemExit) as stop:
        main(words)
    assert stop.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    usage, message = printed.err.splitlines()
    assert usage.startswith("usage: daskcurv")
    return str(message)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["lanch"], "daskcurv: error: there is no command 'lanch'; did you mean launch?"),
        (["verify-class-partition"], "did you mean verify-class-partitioning?"),
        (["launch", "--epoch", "3"], "unknown option --epoch; did you mean --epochs?"),
        (["launch", "--model-dirs=x"], "unknown option --model_dirs; did you mean --model_dir?"),
        (["report", "s.zarr", "--ouput", "r.html"], "did you mean --output?"),
        (["verify", "s.zarr", "--recomput", "3"], "did you mean --recompute?"),
        (["status", "s.zarr", "--n_probes", "3"], "it is an option of daskcurv doctor, daskcurv"),
        (["status", "--store", "s.zarr"], "store is given without an option's name: daskcurv st"),
        (["launch", "--frobnicate"], "daskcurv launch --help_all lists the options"),
        (["compact", "--frobnicate"], "daskcurv compact --help lists the options"),
    ],
)
def test_a_mistyped_word_is_refused_with_a_suggestion(words, expected, capsys):
    assert expected in refusal(words, capsys)


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"daskcurv {daskcurv.__version__}\n"


def shown(name: str, option: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main([name, option])
    assert stop.value.code == 0
    printed = capsys.readouterr()
    assert printed.err == ""
    return str(printed.out)


@pytest.mark.parametrize("name", ["launch", "plan", "doctor"])
def test_help_is_short_and_help_all_has_every_option(name, commands, capsys):
    every = {
        option
        for action in commands[name]._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    everything = shown(name, "--help-all", capsys)
    assert {option for option in every if option not in everything.split()} == set()
    short = shown(name, "--help", capsys)
    assert len(short.splitlines()) <= 50
    common = {
        action.option_strings[-1]
        for action in commands[name]._actions
        if action.option_strings and action.dest in COMMON
    }
    assert common | {"--help", "--help_all"} == {*re.findall(r"^  (?:-h, )?(--\w+)", short, re.M)}
    hidden = len(every) - len(common) - 2
    assert f"--help_all also shows {hidden} options" in " ".join(short.split())


def test_common_options_exist(commands):
    known = {action.dest for name in ("launch", "plan") for action in commands[name]._actions}
    assert {*COMMON} <= known


def test_every_option_that_a_message_names_is_an_option(commands):
    known = {
        option
        for parser in commands.values()
        for action in parser._actions
        for option in action.option_strings
    }
    unknown = {
        (path.name, option)
        for path in (REPOSITORY / "daskcurv").rglob("*.py")
        for text in messages(path)
        for option in re.findall(r"(?<![\w-])--[a-z]+(?:_[a-z]+)+", text)
        if option not in known
    }
    assert unknown == set()


def messages(path: Path) -> list[str]:
    """Return the texts of a module that are no docstrings."""
    tree = ast.parse(path.read_text())
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and isinstance(node.value, str)
        and id(node) not in docstrings
    ]


def test_messages_of_the_storage_name_no_option_of_a_launch(commands):
    # They are raised by every command that opens a store; but only a launch passes settings.
    launch = {option for action in commands["launch"]._actions for option in action.option_strings}
    others = {
        option
        for name in ("status", "verify", "compact", "export", "export_npy", "import_npy")
        for action in commands[name]._actions
        for option in action.option_strings
    }
    named = {
        (path.name, option)
        for path in (REPOSITORY / "daskcurv" / "storage").glob("*.py")
        for text in messages(path)
        for option in re.findall(r"(?<![\w-])--[a-z_]+", text)
        if text != option and option in launch - others and "Change these settings back" not in text
    }
    assert named == set()


def test_the_public_names_are_offered():
    assert {*daskcurv.__all__, "__version__", "analysis"} <= {*dir(daskcurv)}
    assert all(hasattr(daskcurv, name) for name in dir(daskcurv))
    with pytest.raises(AttributeError, match="no_such_name"):
        daskcurv.no_such_name  # noqa: B018


# Exit codes


def failing(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> int:
    def fail(words: list[str]) -> int:
        raise error

    monkeypatch.setattr(cli, "_run", fail)
    return main(["status"])


def test_an_error_in_the_program_is_one_message_and_a_file_with_the_traceback(
    monkeypatch, capsys, tmp_path
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert failing(KeyError("x"), monkeypatch) == 70
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: KeyError: 'x'.")
    (file,) = tmp_path.iterdir()
    assert str(file) in line
    assert "Traceback" in file.read_text()
    assert "KeyError: 'x'" in file.read_text()


def test_the_traceback_is_in_the_log_file_if_there_is_one(monkeypatch, capsys, tmp_path):
    from daskcurv.logs import log_to_file

    def fail(words: list[str]) -> int:
        log_to_file(tmp_path)
        raise RuntimeError("x")

    monkeypatch.setattr(cli, "_run", fail)
    assert main(["launch"]) == 70
    (file,) = tmp_path.iterdir()
    assert f"details are in {file}" in capsys.readouterr().err
    assert "Traceback" in file.read_text()


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (StoreError("s.zarr is not a store"), 2, "error: s.zarr is not a store\n"),
        (PermissionError(13, "Permission denied", "closed/s.zarr"), 2, "closed/s.zarr"),
        (BrokenPipeError(32, "Broken pipe", "standard output"), 141, ""),
        (BrokenPipeError(32, "Broken pipe"), 2, "Broken pipe"),
    ],
    ids=["user's", "system's", "reader left", "another pipe"],
)
def test_an_error_has_its_exit_code(error, code, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert failing(error, monkeypatch) == code
    printed = capsys.readouterr().err
    assert said in printed
    assert printed.count("\n") == (code == 2)


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daskcurv", *words],
        env={**os.environ, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_a_command_whose_reader_left_ends_quietly():
    ours, theirs = os.pipe()
    os.close(ours)
    process = subprocess.run(
        [sys.executable, "-m", "daskcurv", "verify_class_partitioning"],
        stdout=theirs, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    os.close(theirs)
    assert process.returncode == 141
    assert "class order" in process.stderr
    assert len(process.stderr.splitlines()) == 1


def test_a_working_directory_that_was_removed_is_named(tmp_path):
    gone = tmp_path / "gone"
    command = 'mkdir "$0"; cd "$0"; rmdir "$0"; exec "$@"'
    words = [sys.executable, "-m", "daskcurv", "status", "s.zarr"]
    done = subprocess.run(
        ["sh", "-c", command, str(gone), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: the working directory was removed; change to")


def test_an_ascii_locale_is_enough():
    done = run("verify_class_partitioning", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert "every class 0 ... 99 appears exactly once" in done.stdout


def test_python_without_assertions_is_refused():
    done = run("status", "s.zarr", PYTHONOPTIMIZE="1")
    assert done.returncode == 2
    assert done.stderr.startswith("error: Python runs with -O or PYTHONOPTIMIZE")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("daskcurv: [1\n  x: {", "is malformed"),
        ("- 1\n- 2\n", "is malformed"),
        ("logging:\n  distributed: nonsense\n", "NONSENSE"),
    ],
    ids=["broken", "a list", "a bad value"],
)
def test_a_broken_configuration_of_dask_is_named(content, said, tmp_path):
    file = tmp_path / "site.yaml"
    file.write_text(content)
    done = run("plan", DASK_CONFIG=str(file), TMPDIR=str(tmp_path))
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: Dask failed: ")
    assert said in line
    assert str(file) in line


def test_only_a_command_that_has_an_option_is_told_to_use_it(tmp_path, capsys):
    for command in (["status"], ["verify", "--repair"], ["export_npy", "out"]):
        assert main([command[0], str(tmp_path), *command[1:]]) == 2
        message = capsys.readouterr().err
        assert f"error: {tmp_path} is not a daskcurv results store" in message
        assert "--" not in message
    assert main(["status", str(tmp_path / "curvature")]) == 2
    assert f"such as {tmp_path / 'curvature.zarr'}" in capsys.readouterr().err


def test_directories_called_like_libraries_are_not_taken_for_them(tmp_path):
    (tmp_path / "sparse").mkdir()
    code = "import runpy, sys; runpy.run_module('daskcurv', run_name='daskcurv.__main__')\n"
    shown = "print(any(sys.path[i] in ('', sys.argv[1]) for i in range(len(sys.path))))"
    run = subprocess.run(
        [sys.executable, "-c", code + shown, str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout == "False\n"
