"""Weight files found by their names, here and in other people's directories."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daskcurv.errors import CheckpointError, ConfigError
from daskcurv.experiment.naming import Naming
from daskcurv.experiment.search import discover, find


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).touch()


def test_both_naming_schemes_are_found_in_the_order_of_epochs(tmp_path):
    names = ["index-0_epoch-1000.pt", "checkpoint_index-0_epoch-200.pt", "index-0_epoch-30.pt"]
    touch(tmp_path, *names)
    found = discover(tmp_path, 0)
    assert list(found.items()) == [
        (30, tmp_path / "index-0_epoch-30.pt"),
        (200, tmp_path / "checkpoint_index-0_epoch-200.pt"),
        (1000, tmp_path / "index-0_epoch-1000.pt"),
    ]


def test_other_files_and_other_experiments_are_ignored(tmp_path):
    touch(
        tmp_path,
        "index-2_epoch-5.pt",
        "index-12_epoch-7.pt",
        "index-2_epoch-6.pt.tmp",
        "old_index-2_epoch-8.pt",
        "index-2_epoch-.pt",
        "index-2_epoch-9.pth",
        "experiment_checkpoint-2.pkl",
        "notes.txt",
    )
    (tmp_path / "subdirectory").mkdir()
    assert discover(tmp_path, 2) == {5: tmp_path / "index-2_epoch-5.pt"}


@pytest.mark.parametrize(
    "name",
    [
        "index-2_epoch-9.PT",
        "index-2_epoch-9.pth",
        "index-2_epoch-9.pt.part",
        "Index-2_epoch-0009.pt",
        "index_2_epoch_9.pt",
        "index-2-epoch-9.pt",
        "index-2_epoch-9 (1).pt",
        "copy of checkpoint_index-02_epoch-9.pt",
    ],
)
def test_a_file_that_looks_like_a_checkpoint_of_another_epoch_is_named(tmp_path, caplog, name):
    caplog.set_level(logging.WARNING)
    touch(tmp_path, "index-2_epoch-5.pt", "index-2_epoch-5.pt.bak", "index-3_epoch-7.pth", name)
    assert list(discover(tmp_path, 2)) == [5]
    (warning,) = caplog.messages
    assert f"not used: {name}. Rename" in warning
    assert str(tmp_path) in warning


def test_an_index_without_checkpoints_is_told_which_indices_there_are(tmp_path):
    touch(tmp_path, "index-3_epoch-0.pt", "checkpoint_index-1_epoch-0.pt")
    with pytest.raises(CheckpointError) as refusal:
        discover(tmp_path, 0)
    message = str(refusal.value)
    assert str(tmp_path) in message
    assert "experiment index 0" in message
    assert "it has index 1, 3" in message


@pytest.mark.parametrize(
    "names",
    [
        ("index-0_epoch-4.pt", "checkpoint_index-0_epoch-4.pt"),
        ("index-0_epoch-4.pt", "index-0_epoch-004.pt"),
    ],
)
def test_two_files_for_one_epoch_are_refused_and_named(tmp_path, names):
    touch(tmp_path, *names)
    with pytest.raises(CheckpointError, match="epoch 4") as refusal:
        discover(tmp_path, 0)
    assert str(tmp_path) in str(refusal.value)
    assert all(name in str(refusal.value) for name in names)


def test_a_directory_that_is_missing_empty_or_a_file_is_refused_and_named(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    for name in ("missing", "empty", "file"):
        with pytest.raises(CheckpointError) as refusal:
            discover(tmp_path / name, 0)
        assert str(tmp_path / name) in str(refusal.value)


def tree(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def found(pattern: Path | str, **wanted: int) -> dict[int, str]:
    root, naming = Naming.of(str(pattern))
    return {n: str(p.relative_to(root)) for n, p in find(root, naming, **wanted).items()}


def refusal_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises((CheckpointError, ConfigError)) as refusal:
        function(*arguments, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    ("pattern", "directory", "rest"),
    [
        ("/a/b/epoch_{epoch}.pt", "/a/b", "epoch_{epoch}.pt"),
        ("a//run{run}/x/e{epoch:03d}.pt", "a", "run{run}/x/e{epoch:03d}.pt"),
        ("{epoch}.pt", ".", "{epoch}.pt"),
        ("a/*/checkpoint-{step}/model.safetensors", "a", "*/checkpoint-{step}/model.safetensors"),
        ("../a/{epoch}", "../a", "{epoch}"),
        ("~/a/{epoch}", str(Path.home() / "a"), "{epoch}"),
        ("a/b/*.pt", "a/b", "*.pt"),
        ("a/weights.pt", "a", "weights.pt"),
    ],
)
def test_a_pattern_is_split_where_it_is_no_longer_one_directory(pattern, directory, rest):
    assert Naming.of(pattern) == (Path(directory), Naming((rest,)))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("", "the name pattern is empty"),
        ("a/{epoch}-{epoch}.pt", "where a number is repeated, write *"),
        ("a/run{run}/run{run}_{epoch}.pt", "where a number is repeated, write *"),
        ("a/run{run}_{experiment}_{epoch}.pt", "where a number is repeated, write *"),
        ("a/{seed}/{epoch}.pt", "has {seed}; expected {epoch}, {step}, {task}, {experiment}"),
        ("a/**/{epoch}.pt", "side by side"),
        ("a/{task}{epoch}.pt", "side by side"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern, expected):
    message = refusal_of(Naming.of, pattern)
    assert expected in message


def test_files_are_found_by_a_pattern_in_the_order_of_epochs(tmp_path):
    tree(tmp_path, "e10.pt", "e9.pt", "e010.pth", "e.pt", "best.pt", "xe3.pt", "e8.pt/inside.pt")
    assert found(tmp_path / "e{epoch}.pt") == {9: "e9.pt", 10: "e10.pt"}
    (tmp_path / "e11.pt").symlink_to("/nowhere")
    assert found(tmp_path / "e{epoch:03d}.pt")[11] == "e11.pt"


def test_a_star_has_none_of_a_numbers_digits(tmp_path):
    tree(tmp_path, "resnet18-12_0.91.pt", ".resnet18-13_0.91.pt")
    assert found(tmp_path / "*{epoch}_*.pt") == {12: "resnet18-12_0.91.pt"}
    assert found(tmp_path / "*-{epoch}*.pt") == {12: "resnet18-12_0.91.pt"}
    assert found(tmp_path / "resnet1{epoch}*") == {8: "resnet18-12_0.91.pt"}


def test_files_in_directories_below(tmp_path):
    tree(
        tmp_path,
        *(f"run{r}/ckpt/task{t}/epoch_{e:02d}.pt" for r in (1, 2) for t in (0, 1) for e in (0, 5)),
        "run1/ckpt/notes.txt", "run3/other", "run1/ckpt/task7",
    )  # fmt: skip
    pattern = tmp_path / "run{run}/ckpt/task{task}/epoch_{epoch}.pt"
    assert found(pattern, experiment=2, task=1) == {
        0: "run2/ckpt/task1/epoch_00.pt",
        5: "run2/ckpt/task1/epoch_05.pt",
    }
    assert found(tmp_path / "run2/*/task{task}/epoch_{epoch}.pt", experiment=9, task=0) == {
        0: "ckpt/task0/epoch_00.pt",
        5: "ckpt/task0/epoch_05.pt",
    }
    assert f"{tmp_path} has files of 2 experiments: 1, 2. Name one with --experiment_index" in (
        refusal_of(found, pattern, task=0)
    )
    assert f"{tmp_path} has files of 2 tasks: 0, 1. Name one with --task" in (
        refusal_of(found, pattern, experiment=1)
    )
    assert refusal_of(found, pattern, experiment=7, task=0) == (
        f"{tmp_path} has no files named run7/ckpt/task0/epoch_{{epoch}}.pt; it has experiment "
        "1, 2, 3. Name one with --experiment_index"
    )
    no_task = refusal_of(found, tmp_path / "run1/ckpt/task1/epoch_{epoch}.pt", task=1)
    assert "epoch_00.pt does not say its task in its name; leave out --task" in no_task


def test_files_are_found_by_step_if_names_have_no_epoch(tmp_path):
    tree(tmp_path, *(f"checkpoint-{s}/model.safetensors" for s in (1000, 500)))
    tree(tmp_path, *(f"epoch={e}-step={s}.ckpt" for e, s in [(0, 391), (1, 782)]))
    assert found(tmp_path / "checkpoint-{step}/model.safetensors") == {
        500: "checkpoint-500/model.safetensors",
        1000: "checkpoint-1000/model.safetensors",
    }
    pattern = tmp_path / "epoch={epoch}-step={step}.ckpt"
    assert found(pattern) == {0: "epoch=0-step=391.ckpt", 1: "epoch=1-step=782.ckpt"}


def test_two_files_that_a_pattern_fits_for_one_epoch_are_named(tmp_path):
    tree(tmp_path, "a/e4.pt", "b/e04.pt", "b/e5.pt")
    assert refusal_of(found, tmp_path / "*/e{epoch}.pt") == (
        f"{tmp_path} has two files for epoch 4: a/e4.pt and b/e04.pt. Narrow the pattern "
        "*/e{epoch}.pt, so that it fits one of them"
    )
    assert "two files for step 4" in refusal_of(found, tmp_path / "*/e{step}.pt")


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("epoch_{epoch}.pt", "/w has epoch-1.pth, epoch-2.pth, notes.txt, run1/; nearest to"
         " epoch_{epoch}.pt is epoch-1.pth. Correct the pattern"),
        ("run{run}/ckpts/{epoch}.pt", "/w/run1 has ckpt/; nearest to ckpts is ckpt/. Correct"),
        ("run{run}/ckpt/{epoch}.pt", "/w/run1/ckpt is empty"),
        ("runs/{epoch}.pt", "directory {root}/w/runs cannot be read (No such file or directory)"),
        ("notes.txt/{epoch}.pt", "w/notes.txt cannot be read (Not a directory)"),
    ],
)  # fmt: skip
def test_a_pattern_that_nothing_fits_is_told_what_there_is(tmp_path, pattern, expected):
    tree(tmp_path / "w", "epoch-1.pth", "epoch-2.pth", "notes.txt", "run1/ckpt/1.pt")
    (tmp_path / "w/run1/ckpt/1.pt").unlink()
    message = refusal_of(found, tmp_path / "w" / pattern)
    assert expected.replace("{root}", str(tmp_path)) in message
    assert str(tmp_path) in message


def stating(root: Path, **contents: dict[str, int]) -> None:
    for name, numbers in contents.items():
        weights = {"w": torch.ones(2)}
        torch.save({"net": weights, **numbers} if numbers else weights, root / f"{name}.pt")


def test_files_without_an_epoch_in_their_names_say_it_themselves(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    both = {"first": (5, 50), "last": (7, 70), "middle": (6, 60)}
    contents = {n: {"epoch": e, "global_step": s} for n, (e, s) in both.items()}
    stating(tmp_path, **contents)
    assert found(tmp_path / "*.pt") == {5: "first.pt", 6: "middle.pt", 7: "last.pt"}
    assert "epochs as the files state them under 'epoch': 5, 6, 7" in caplog.text
    assert found(tmp_path / "last.pt") == {7: "last.pt"}
    contents["first"].pop("epoch")
    stating(tmp_path, **contents)
    assert found(tmp_path / "*.pt") == {50: "first.pt", 60: "middle.pt", 70: "last.pt"}


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        (
            {"a": {"epoch": 5}, "b": {"epoch": 6}, "c": {"epoch": 5}},
            "has two files for epoch 5: a.pt and c.pt",
        ),
        ({"a": {"epoch": 5}, "b": {}}, "has no {epoch}, and ROOT/b.pt states no epoch. Write {e"),
        ({"a": {}, "b": {}}, "ROOT/a.pt, ROOT/b.pt state no epoch or global_step. Write {epoch}"),
    ],
)
def test_files_that_do_not_say_their_epoch_are_named(tmp_path, contents, expected):
    stating(tmp_path, **contents)
    assert expected.replace("ROOT", str(tmp_path)) in refusal_of(found, tmp_path / "*.pt")


def test_what_is_no_weight_file_is_named(tmp_path):
    (tmp_path / "runs").mkdir()
    assert "runs is a directory, not a weight file" in refusal_of(found, tmp_path / "runs")
    (tmp_path / "a.pt").write_bytes(b"nothing")
    assert f"checkpoint {tmp_path / 'a.pt'} (7 bytes)" in refusal_of(found, tmp_path / "*.pt")


def test_many_files_are_found_or_summed_up(tmp_path):
    for number in range(40_000):
        (tmp_path / f"e{number}.pth").touch()
    assert list(found(tmp_path / "e{epoch}.pth")) == list(range(40_000))
    message = refusal_of(found, tmp_path / "e{epoch}.pt")
    assert "and 39995 more; nearest to e{epoch}.pt is e0.pth" in message


@pytest.mark.parametrize(
    ("names", "options"),
    [
        (["checkpoint_random_task-0_epoch-{}.pt"], {}),
        (["checkpoint_predetermined_asc_task-0_epoch-{}.pt"], {"task": 0}),
        (
            ["checkpoint_predetermined_desc_task-0_epoch-{}.pt",
             "checkpoint_predetermined_desc_task-1_epoch-{}.pt"],
            {"task": 0},
        ),
        (["checkpoint_no_ordering_task-0_epoch-{}.pt"], {}),
        (["checkpoint_original_index-4_epoch-{}.pt",
          "checkpoint_original_index-5_epoch-{}.pt"], {}),
        (["checkpoint_25pct_index-4_epoch-{}.pt"], {}),
        (["checkpoint_2.5pct_index-4_epoch-{}.pt", "best_index-4_epoch-{}.pt"], {}),
    ],
)  # fmt: skip
def test_later_names_are_found_if_no_file_has_the_older_ones(tmp_path, caplog, names, options):
    touch(tmp_path, *(name.format(epoch) for name in names for epoch in (30, 4)))
    assert list(discover(tmp_path, 4, **options).items()) == [
        (epoch, tmp_path / names[0].format(epoch)) for epoch in (4, 30)
    ]
    assert caplog.messages == []
    touch(tmp_path, "index-4_epoch-7.pt")
    assert list(discover(tmp_path, 4)) == [7]


def test_several_kinds_of_later_names_are_refused_and_listed(tmp_path):
    touch(
        tmp_path,
        *(f"checkpoint_{p}pct_index-0_epoch-{e}.pt" for p in (10, 25) for e in (0, 1)),
        "checkpoint_original_index-0_epoch-0.pt",
        "checkpoint_no_ordering_task-0_epoch-0.pt",
    )
    assert refusal_of(discover, tmp_path, 0) == (
        f"{tmp_path} has files of several kinds: "
        "checkpoint_10pct_index-{experiment}_epoch-{epoch}.pt, "
        "checkpoint_25pct_index-{experiment}_epoch-{epoch}.pt, "
        "checkpoint_no_ordering_task-{task}_epoch-{epoch}.pt, "
        "checkpoint_original_index-{experiment}_epoch-{epoch}.pt. Give the pattern of one"
    )
    one = tmp_path / "checkpoint_25pct_index-{experiment}_epoch-{epoch}.pt"
    assert list(found(one, experiment=0)) == [0, 1]


def test_the_task_is_asked_for_where_it_matters_and_refused_where_there_is_none(tmp_path):
    names = [f"checkpoint_random_task-{t}_epoch-{e}.pt" for t in (0, 3) for e in (0, 1)]
    touch(tmp_path, *names)
    assert "has files of 2 tasks: 0, 3. Name one with --task" in refusal_of(discover, tmp_path, 0)
    assert "it has task 0, 3. Name one with" in refusal_of(discover, tmp_path, 0, task=1)
    touch(tmp_path, "index-0_epoch-7.pt")
    message = refusal_of(discover, tmp_path, 0, task=1)
    assert "index-0_epoch-7.pt does not say its task in its name; leave out --task" in message


def test_another_index_of_later_names_is_told_which_indices_there_are(tmp_path):
    touch(tmp_path, "checkpoint_original_index-3_epoch-0.pt", "index-1_epoch-0.pt")
    assert "it has index 1, 3" in refusal_of(discover, tmp_path, 0)
