"""Where files and directories are made: where links lead, with modes as by mkdir and open."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from daskcurv.atomic import discard_drafts, whole_directory, whole_file, write_whole
from daskcurv.cli import main
from daskcurv.errors import ConfigError
from daskcurv.experiment.checkpoints import Checkpoint
from daskcurv.places import followed, names_of, place_for
from daskcurv.runs.plan import Plan
from daskcurv.storage import ResultsStore
from tests.support.stores import make_store


@pytest.fixture(params=[0o002, 0o022, 0o077], ids="umask {:03o}".format)
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A directory with its setgid bit, and with the umask set."""
    before = os.umask(request.param)
    directory = tmp_path / "project"
    directory.mkdir()
    directory.chmod(directory.stat().st_mode | stat.S_ISGID)
    yield directory
    os.umask(before)


def mode(path: Path) -> str:
    return oct(stat.S_IMODE(path.stat().st_mode))


def fill_directory(target: Path) -> None:
    with whole_directory(target) as building:
        (building / "file").touch()


def fill_file(target: Path) -> None:
    with whole_file(target) as building, building.open("w") as file:
        file.write("text")


@pytest.mark.parametrize(
    "make", [fill_directory, make_store, Path.mkdir], ids=["directory", "store", "mkdir itself"]
)
def test_a_directory_has_the_mode_that_mkdir_gives(shared, make: Callable[[Path], object]):
    make(shared / "made")
    (shared / "expected").mkdir()
    assert mode(shared / "made") == mode(shared / "expected")
    assert mode(shared / "made") in ("0o2775", "0o2755", "0o2700")
    for path in (shared / "made").rglob("*"):
        model = shared / "expected" / path.name
        if path.is_dir():
            model.mkdir(exist_ok=True)
        else:
            model.touch()
        assert mode(path) == mode(model), path


@pytest.mark.parametrize("make", [fill_file, lambda path: write_whole(path, b"text")])
def test_a_file_has_the_mode_that_open_gives(shared, make: Callable[[Path], None]):
    make(shared / "made")
    (shared / "expected").open("w").close()
    assert mode(shared / "made") == mode(shared / "expected")


@pytest.mark.parametrize("kept", [0o600, 0o444, 0o664])
def test_a_file_that_is_replaced_keeps_its_mode(tmp_path, kept):
    (tmp_path / "report.html").touch()
    (tmp_path / "report.html").chmod(kept)
    write_whole(tmp_path / "report.html", b"new")
    assert (tmp_path / "report.html").read_bytes() == b"new"
    assert mode(tmp_path / "report.html") == oct(kept)


@pytest.fixture
def linked(tmp_path: Path) -> Path:
    """``home/link`` and ``home/second`` lead to ``scratch/target``, which is not there."""
    for name in ("home", "scratch"):
        (tmp_path / name).mkdir()
    (tmp_path / "home/link").symlink_to("../scratch/target")
    (tmp_path / "home/second").symlink_to("link")
    return tmp_path


@pytest.mark.parametrize("name", ["home/link", "home/second", "scratch/target"])
@pytest.mark.parametrize("there", [True, False])
def test_a_directory_is_made_where_a_link_leads(linked, name, there):
    if there:
        (linked / "scratch/target/old").mkdir(parents=True)
    with whole_directory(linked / name) as building:
        (building / "new").touch()
    assert [path.name for path in (linked / "scratch").iterdir()] == ["target"]
    assert [path.name for path in (linked / "scratch/target").iterdir()] == ["new"]
    assert (linked / "home/link").is_symlink()
    assert (linked / "home/second").is_symlink()


def test_a_store_is_made_where_a_dangling_link_leads_and_stays_there(linked):
    store = make_store(linked / "home/second", 0)
    (linked / "home/link").unlink()
    (linked / "home/link").symlink_to("../scratch/other")
    make_store(linked / "home/link", 0, 100)
    store.set_epoch(0, complete=True)
    for name, complete in (("target", [True]), ("other", [False, False])):
        found = ResultsStore.open(linked / "scratch" / name)
        assert found.read("complete").tolist() == complete


@pytest.mark.parametrize("there", [True, False])
def test_a_file_is_written_where_a_link_leads(linked, there):
    if there:
        (linked / "scratch/target").write_text("old")
    write_whole(linked / "home/second", b"new")
    assert (linked / "scratch/target").read_bytes() == b"new"
    assert (linked / "home/second").is_symlink()


def test_names_are_followed_but_not_the_directories_above(linked, monkeypatch):
    (linked / "alias").symlink_to("home")
    assert names_of(linked / "alias/second") == [
        linked / "alias/second",
        linked / "alias/link",
        linked / "alias/../scratch/target",
    ]
    monkeypatch.chdir(linked / "alias")
    assert followed(Path("link")).parent.samefile(linked / "scratch")
    assert followed(Path("..")) == linked
    assert followed(linked / "nothing") == linked / "nothing"


def test_a_link_into_a_directory_that_is_not_there_is_refused_by_name(linked):
    (linked / "scratch").rmdir()
    for name in ("link", "second"):
        with pytest.raises(ConfigError, match="not an accessible directory") as refusal:
            place_for(linked / "home" / name)
        assert str(linked / "home" / name) in str(refusal.value)
    # Without a link, missing directories are created.
    fill_directory(linked / "more/than/one")
    assert not (linked / "scratch").exists()


def test_a_link_in_a_circle_is_refused_by_name(tmp_path):
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(ConfigError, match="circle") as refusal:
        followed(tmp_path / "a")
    assert str(tmp_path / "a") in str(refusal.value)


def test_only_the_drafts_of_one_name_are_discarded(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "link").symlink_to("home/run[1]")
    kept = {".run[1].zarr.abc.partial", ".run1.abc.partial", ".run[1].abc.previous", "run[1]"}
    for name in (*kept, ".run[1].abc.partial", ".run[1].x_y9.partial"):
        (tmp_path / "home" / name).mkdir()
    discard_drafts(tmp_path / "link")
    assert {path.name for path in (tmp_path / "home").iterdir()} == kept


def test_a_tilde_is_the_home_directory_where_the_shell_leaves_it(tmp_path, monkeypatch, capsys):
    make_store(tmp_path / "s", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["status", "~/s"]) == 0
    assert f"store     {tmp_path}/s\n" in capsys.readouterr().out
    assert main(["status", "~nobody-of-this-name/s"]) == 2
    assert "~nobody-of-this-name/s does not exist" in capsys.readouterr().err


def test_workers_are_told_where_checkpoints_are_from_any_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [Checkpoint(epoch, Path(f"weights/{epoch}.pt"), "", 1, 1) for epoch in (0, 1)]
    nothing = np.zeros((2, 1))
    tasks = [*Plan(found, {0: 0, 1: 1}, nothing.astype(bool), nothing.astype(np.int64)).tasks()]
    first, second = (tmp_path / f"weights/{epoch}.pt" for epoch in (0, 1))
    assert [(task.checkpoint, task.following) for task in tasks] == [
        (first, second),
        (second, None),
    ]
