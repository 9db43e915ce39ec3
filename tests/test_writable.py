"""What can be known of an output before it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daskcurv.errors import StoreWriteError
from daskcurv.places import check_writable
from tests.support.disks import mounted


def refusal(target: Path, **kind: Any) -> str:
    with pytest.raises(StoreWriteError) as caught:
        check_writable(target, **kind)
    return str(caught.value)


def test_a_place_that_can_be_written_is_left_as_it_was(tmp_path):
    (tmp_path / "old.html").write_text("old")
    check_writable(tmp_path / "new.html")
    check_writable(tmp_path / "old.html")
    check_writable(tmp_path, directory=True)
    check_writable(tmp_path / "new", directory=True)
    check_writable(tmp_path / "a" / "b" / "new", directory=True, parents=True)
    check_writable(tmp_path / "a" / "b" / "new.html", parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old.html"]
    assert (tmp_path / "old.html").read_text() == "old"


def test_a_relative_path_is_looked_for_where_the_program_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable(Path("new.html"))
    assert f"{tmp_path / 'no'} does not exist" in refusal(Path("no/new.html"))


def test_a_place_that_is_missing_or_of_another_kind_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert f"{tmp_path / 'no'} does not exist" in refusal(tmp_path / "no" / "new.html")
    assert f"{tmp_path / 'no'} does not exist" in refusal(tmp_path / "no" / "new", directory=True)
    assert "it is a directory" in refusal(tmp_path)
    assert "it is not a directory" in refusal(tmp_path / "file", directory=True)
    below = tmp_path / "file" / "new.html"
    assert f"{tmp_path / 'file'} is not a directory" in refusal(below)
    assert f"cannot write {below}" in refusal(below, parents=True)


def test_a_read_only_or_full_file_system_is_refused(tmp_path):
    with mounted(tmp_path / "disk", "16k") as disk:
        check_writable(disk / "new.html")
        with pytest.raises(OSError, match="No space left"):
            (disk / "filling").write_bytes(bytes(64 * 1024))
        assert "No space left on device" in refusal(disk / "new.html")
        assert "No space left on device" in refusal(disk / "a" / "new", parents=True)
