"""Run files: the settings of a launch, written beside its store and run again."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import dask
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcurv.cli import build_parser, main
from daskcurv.clusters.options import CLUSTERS, DEVICES, NO_GRES
from daskcurv.config import HEADS, METHODS, PRECISIONS
from daskcurv.errors import ConfigError
from daskcurv.experiment.curriculum import PARTITIONS
from daskcurv.runs.accounts.run_file import overridden, read_run_file, to_mapping
from daskcurv.runs.options import EPOCH_MEANS, SETTINGS, LaunchOptions, launch_options
from tests.support.launches import assert_same_results, results
from tests.support.project import Project


def run_file(project: Project) -> Path:
    return project.store.with_name("curvature.zarr.run.yaml")


# What a launch writes


def test_a_run_file_computes_the_same_again_from_another_directory(project, tmp_path, monkeypatch):
    arguments = project.launch_arguments("--head", "active", "--seed", "7", "--no_export")
    assert main(["launch", *arguments]) == 0
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    other = tmp_path / "other.zarr"
    assert main(["launch", str(run_file(project)), "--store", str(other)]) == 0
    assert_same_results(results(project.store), results(other))
    assert not project.tree.exists()
    first, second = (yaml.safe_load(store.with_name(f"{store.name}.run.yaml").read_text())
                     for store in (project.store, other))  # fmt: skip
    assert first == {**second, "store": str(project.store)}
    assert first["n_probes"] == 2
    assert first["epochs"] == "all"
    assert first["method"] in METHODS
    assert "start_epoch" not in first
    assert "partition" not in first


def test_only_a_launch_that_may_use_the_store_replaces_its_run_file(project, capsys):
    main(["launch", *project.launch_arguments("--dry_run")])
    assert not run_file(project).exists()
    assert main(["launch", *project.launch_arguments("--no_export")]) == 0
    before = run_file(project).read_text()
    assert main(["launch", *project.launch_arguments("--temperature", "2")]) == 2
    assert run_file(project).read_text() == before
    assert "temperature: the store has 1.0, this run has 2.0" in capsys.readouterr().err


def test_a_run_file_that_cannot_be_written_stops_nothing(project, capsys):
    (run_file(project) / "in the way").mkdir(parents=True)
    assert main(["launch", *project.launch_arguments("--no_export")]) == 0
    assert f"cannot write {run_file(project)}" in capsys.readouterr().err


def test_what_the_site_sets_is_left_to_it():
    with dask.config.set({"daskcurv.slurm": {"partition": "gpu", "prologue": ["export KEY=1"]}}):
        chosen = launch_options({"cluster": "slurm", "qos": "long", "prologue": ["module load x"]})
        written = to_mapping(chosen)
    assert "partition" not in written
    assert (written["qos"], written["prologue"]) == ("long", ["module load x"])
    with dask.config.set({"daskcurv.slurm": {"prologue": ["export KEY=1"]}}):
        assert "prologue" not in to_mapping(launch_options({"cluster": "slurm"}))


# From options to a file and back

NUMBERS = st.integers(1, 10**6)
TEXTS = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=8)
PATHS = TEXTS.map(lambda name: Path("/", name.replace("~", "x")))
KINDS = {int: NUMBERS, str: TEXTS, Path: PATHS, bool: st.booleans()}
SPECIAL: dict[str, Any] = {
    "h": st.floats(1e-12, 1e12), "temperature": st.floats(1e-12, 1e12),
    "seed": st.integers(0, 2**64 - 1), "n_probes": NUMBERS.map(lambda n: 2 * n),
    "method": st.sampled_from(METHODS), "precision": st.sampled_from(PRECISIONS),
    "head": st.sampled_from(HEADS), "class_partition": st.sampled_from(PARTITIONS),
    "cluster": st.sampled_from(CLUSTERS), "device": st.sampled_from(DEVICES),
    "time": st.from_regex(r"\A\d{1,3}(:[0-5]\d:[0-5]\d)?\Z"), "mem_per_gpu": st.just("16G"),
    "gres": st.sampled_from(["gpu:1", "gpu:a100:1", NO_GRES]),
    "prologue": st.lists(TEXTS, min_size=1), "sbatch_extra": st.just(["--exclusive"]),
    "checkpoints": st.just("/runs/*/net-{epoch}.pt"), "model_args": st.just('{"depth": 8}'),
    "model": st.sampled_from(["torchvision:vgg11", "/home/me/net.py:net", "resnet18-lop"]),
    "class_schedule": st.sampled_from(["none", "/home/me/classes.csv"]),
    "held_out": st.sampled_from(["first:50", "/home/me/held_out.npy"]),
    "epoch_means": st.sampled_from(EPOCH_MEANS),
    "submit_extra": st.just(["--nice", "--comment=x y"]),
}  # fmt: skip


def usable(given: dict[str, Any]) -> bool:
    try:
        launch_options(given)
    except ConfigError:
        return False
    return "epochs" not in given or not {"start_epoch", "end_epoch", "step"} & given.keys()


@st.composite
def launches(draw: st.DrawFn) -> dict[str, Any]:
    """Some settings that go together, as a command line gives them."""
    kept: dict[str, Any] = {}
    for name in draw(st.permutations(sorted(SETTINGS)))[: draw(st.integers(0, 20))]:
        value = draw(SPECIAL[name] if name in SPECIAL else KINDS[SETTINGS[name].kind])
        if usable({**kept, name: value}):
            kept[name] = value
    return kept


@settings(deadline=None, max_examples=200)
@given(given=launches())
def test_settings_come_back_from_a_file_as_they_were(given, tmp_path_factory):
    chosen = launch_options(given)
    path = tmp_path_factory.mktemp("file") / "run.yaml"
    path.write_text(yaml.safe_dump(to_mapping(chosen)))
    back = launch_options(overridden(read_run_file(path), {}))
    # A path that was not given is made absolute; all else has its value.
    paths = [name for name in SETTINGS if SETTINGS[name].kind is Path]
    assert {k: v for k, v in vars(back).items() if k not in paths} == {
        k: v for k, v in vars(chosen).items() if k not in paths
    }
    for name in paths:
        before, after = getattr(chosen, name), getattr(back, name)
        assert after == (before and before.absolute())


def test_every_setting_is_an_option_of_a_launch():
    launch = build_parser().commands["launch"]
    options = [action.dest for action in launch._actions if action.option_strings]
    assert sorted(SETTINGS) == sorted({*options} - {
        "help", "help_all", "demo", "demo_run", "dry_run", "print_job_script", "submit",
    })  # fmt: skip
    assert len(options) == len(set(options))


def test_the_documentation_of_a_class_has_its_settings():
    assert LaunchOptions.__doc__
    assert "    step : int\n        interval between epochs (default: 200)" in LaunchOptions.__doc__
    assert "    head : {all, active}\n" in LaunchOptions.__doc__


# The command line wins


@pytest.mark.parametrize(
    ("file", "given", "expected"),
    [
        ({"n_probes": 4, "seed": 1}, {"n_probes": 6}, {"n_probes": 6, "seed": 1}),
        ({"epochs": "all"}, {"step": 5}, {"step": 5}),
        ({"start_epoch": 3, "step": 5}, {"epochs": "7"}, {"epochs": "7"}),
        ({"cluster": "slurm", "gpus": 8}, {"workers": 2}, {"cluster": "slurm", "workers": 2}),
        ({"export": True}, {"export": False}, {"export": False}),
    ],
)
def test_the_command_line_wins(file, given, expected):
    assert overridden(file, given) == expected


def test_what_another_cluster_has_no_use_for_is_left_out_and_said(caplog):
    caplog.set_level(logging.INFO)
    file = {"cluster": "slurm", "gpus": 8, "time": "12:00:00", "device": "cpu", "n_probes": 2}
    kept = overridden(file, {"cluster": "local"})
    assert kept == {"cluster": "local", "device": "cpu", "n_probes": 2}
    assert "--cluster local does not use the run file's gpus, time" in caplog.text
    # Inside an allocation its size is settled; to submit one it is not.
    file = {"cluster": "allocation", "nodes": 2, "gres": "gpu:4"}
    assert overridden(file, {}) == {"cluster": "allocation"}
    assert overridden(file, {"submit": True}) == {**file, "submit": True}


def test_a_plan_and_a_doctor_take_a_run_file(project, capsys):
    main(["launch", *project.launch_arguments("--no_export")])
    assert main(["plan", str(run_file(project))]) == 0
    printed = capsys.readouterr()
    assert "to do: 0 epochs, 0 blocks, 0 samples" in printed.out + printed.err
    assert main(["doctor", str(run_file(project)), "--epochs", "0"]) == 0


# Files that cannot be used


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("n_probes: 2\nn_prob: 3", "n_prob is not an option of a launch; did you mean n_probes?"),
        ("frobnicate: 1", "frobnicate is not an option of a launch; daskcurv launch --help_all"),
        ("seed: 1\nseed: 2", "seed is there twice"),
        ("n_probes: 2.5", "n_probes is 2.5; expected a whole number"),
        ("n_probes: yes", "n_probes is True; expected a whole number"),
        ("h: small", "h is 'small'; expected a number"),
        ("download: 1", "download is 1; expected true or false"),
        ("cluster: slurm\ntime: 12:00:00", 'time is 43200; expected text; write it in quotes'),
        ("epochs: 5", "epochs is 5; expected text; write it in quotes"),
        ("epochs: all\nstep: 5", "epochs and step both select the epochs"),
        ("prologue: [1]", "prologue is [1]; expected lines of text"),
        ("store: curvature.zarr", "store is 'curvature.zarr'; expected an absolute path"),
        ("checkpoints: net-{epoch}.pt", "checkpoints is 'net-{epoch}.pt'; expected an absolute p"),
        ("model: net.py:net", "model is 'net.py:net'; expected an absolute path"),
        ("head: none", "head is 'none'; expected one of all, active"),
        ("- n_probes", "has no settings; expected lines like n_probes: 10"),
        ("", "has no settings"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.system [ls]", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_refused_by_name(tmp_path, capsys, text, said):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert main(["launch", str(path)]) == 2
    (message,) = capsys.readouterr().err.splitlines()
    assert said in message
    assert str(path) in message or said.startswith("head")


def test_a_file_that_is_not_there_is_refused(tmp_path, capsys):
    assert main(["launch", str(tmp_path / "r.yaml")]) == 2
    assert f"run file {tmp_path}/r.yaml cannot be read: No such file" in capsys.readouterr().err


def test_numbers_that_yaml_takes_for_text_are_numbers(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("h: 1e-4\ntemperature: 2\nstore: ~/c.zarr\nclass_order: regenerate\n")
    found = read_run_file(path)
    assert (found["h"], found["temperature"]) == (1e-4, 2.0)
    assert found["store"] == Path.home() / "c.zarr"
    assert found["class_order"] == Path("regenerate")


def test_the_demo_takes_no_run_file(tmp_path, capsys):
    assert main(["launch", "r.yaml", "--demo", str(tmp_path / "demo")]) == 2
    assert "leave out r.yaml" in capsys.readouterr().err
