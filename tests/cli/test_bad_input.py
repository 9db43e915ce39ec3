"""Whatever a user gets wrong ends in one message that says what and where, and in nothing else."""

from __future__ import annotations

import errno
import io
import json
import os
import pickle
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from daskcurv.cli import main
from daskcurv.clusters.local import local_cluster
from daskcurv.config import EstimatorConfig
from daskcurv.errors import ClusterError
from daskcurv.experiment.curriculum import Schedule
from daskcurv.runs.inputs import experiment_of
from daskcurv.runs.options import LaunchOptions
from daskcurv.storage import ResultsStore, schema
from tests.support.builders import TINY, make_model, write_checkpoints, write_cifar
from tests.support.project import Project

Refused = Callable[..., str]


def contents(path: Path) -> dict[str, bytes | None]:
    """Everything below `path` except the log, with the contents of files."""
    return {
        entry.relative_to(path).as_posix(): entry.read_bytes() if entry.is_file() else None
        for entry in path.rglob("*")
        if entry.relative_to(path).parts[0] != "log"
    }


def the_error(printed: str) -> str:
    """Return the message, which is all that follows ``error: ``."""
    assert "Traceback" not in printed
    lines = printed.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    assert len(starts) == 1, f"{len(starts)} messages in:\n{printed}"
    return "\n".join(lines[starts[0] :])


@pytest.fixture
def refused(
    project: Project, dry_launch: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> Refused:
    """Dry-run a launch that has to be refused; returns the message."""

    def run(*extra: object) -> str:
        before = contents(project.root)
        capsys.readouterr()
        assert dry_launch(*map(str, extra)) == 2
        assert contents(project.root) == before
        return the_error(capsys.readouterr().err)

    return run


def without_epochs(arguments: list[str]) -> list[str]:
    position = arguments.index("--epochs")
    return arguments[:position] + arguments[position + 2 :]


class Calls:
    """Pickles as a call that is made when the pickle is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def change_weights(path: Path, **changes: torch.Tensor) -> None:
    torch.save({**make_model().state_dict(), **changes}, path)


def make_store(project: Project, **settings: Any) -> None:
    """Make the store of the launch that `project` describes, some of the estimator's settings set.

    Epoch 0 is in it, and nothing is computed.
    """
    options = LaunchOptions(
        epochs="all",
        data_path=project.data,
        model_dir=project.models,
        schedule=Schedule(initial_classes=4, class_increment=4, class_frequency=2),
        estimator=EstimatorConfig(**{"n_probes": 2, **settings}),
    )
    experiment = experiment_of(options)
    values: dict[str, Any] = {"epoch": 0, "checkpoint": "index-0_epoch-0.pt"}
    ResultsStore.create(
        project.store,
        identity=experiment.identity(),
        samples=experiment.sample_columns(),
        epochs={
            variable.name: [values.get(variable.name, variable.fill)]
            for variable in schema.EPOCH_VARIABLES
        },
    )


# All is well


def test_a_dry_run_of_good_inputs_says_what_would_be_done_and_makes_nothing(
    project, dry_launch, capsys
):
    before = contents(project.root)
    assert dry_launch() == 0
    printed = capsys.readouterr().err
    assert f"store {project.store}: would be created" in printed
    assert "4 epochs, 4 blocks" in printed
    assert "error: " not in printed
    assert contents(project.root) == before


def test_a_store_of_the_same_configuration_is_accepted(project, dry_launch, capsys):
    make_store(project)
    assert dry_launch() == 0
    assert f"store {project.store}: exists" in capsys.readouterr().err


def test_options_may_be_spelled_with_hyphens(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    arguments = [
        "launch",
        f"--data-path={project.data}",
        "--model-dir", str(project.models),
        "--save-base-dir", str(project.tree),
        "--store", str(project.store),
        "--start-epoch", "1", "--end-epoch", "3", "--step=1",
        "--skip-missing", "--dry-run", "--n-probes", "3", "--block-size=20",
    ]  # fmt: skip
    assert main(arguments) == 0
    printed = capsys.readouterr().err
    assert "skipping 1 epoch without a checkpoint: [3]" in printed
    assert "2 epochs, 6 blocks" in printed


def test_a_hyphen_in_a_value_stays_a_hyphen(project, refused):
    assert str(project.root / "some-data") in refused("--data-path", project.root / "some-data")
    assert str(project.root / "some-data") in refused(f"--data-path={project.root / 'some-data'}")


# The data set


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_data_directory_without_data_is_refused(project, refused, kind):
    path = project.root / "elsewhere"
    if kind == "empty":
        path.mkdir()
    elif kind == "a file":
        path.write_text("")
    message = refused("--data_path", path)
    none = f"{path} is in none of the formats"
    assert (str(path / "train") if kind == "missing" else none) in message
    assert "--data_path" in message


def test_a_truncated_train_file_is_refused(project, refused):
    path = project.data / "train"
    path.write_bytes(path.read_bytes()[:5000])
    message = refused()
    assert str(path) in message
    assert "truncated" in message


def test_a_train_file_that_imports_os_is_refused_and_not_run(project, refused, tmp_path):
    path, marker = project.data / "train", tmp_path / "marker"
    path.write_bytes(pickle.dumps({"data": Calls(os.system, f"touch {marker}")}))
    message = refused()
    assert str(path) in message
    assert "posix.system" in message
    assert not marker.exists()


def test_a_train_file_with_a_negative_label_is_refused_and_the_label_named(project, refused):
    path = project.data / "train"
    content = pickle.loads(path.read_bytes())
    content["fine_labels"][17] = -41
    path.write_bytes(pickle.dumps(content))
    message = refused()
    assert str(path) in message
    assert "'fine_labels'" in message
    assert "-41" in message


def test_labels_beyond_the_networks_outputs_are_refused(project, refused):
    write_cifar(project.data, num_classes=12)
    message = refused()
    assert str(project.data) in message
    assert "label 11" in message
    assert "10 outputs" in message
    assert str(project.models / "index-0_epoch-0.pt") in message


def test_downloading_into_a_directory_of_another_name_is_refused(project, refused):
    path = project.root / "cifar"
    message = refused("--data_path", path, "--download")
    assert str(path / "cifar-100-python") in message


# The checkpoints


@pytest.mark.parametrize("kind", ["missing", "empty", "a file"])
def test_a_model_directory_without_checkpoints_is_refused(project, refused, kind):
    path = project.root / "elsewhere"
    if kind == "empty":
        path.mkdir()
    elif kind == "a file":
        path.write_text("")
    message = refused("--model_dir", path)
    assert str(path) in message
    assert "epoch-" in message


def test_another_experiment_index_is_refused_and_the_right_one_hinted_at(project, refused):
    message = refused("--experiment_index", 3)
    assert str(project.models) in message
    assert "index 3" in message
    assert "it has index 0" in message


def test_two_files_for_one_epoch_are_refused(project, refused):
    copy = project.models / "checkpoint_index-0_epoch-2.pt"
    shutil.copy(project.models / "index-0_epoch-2.pt", copy)
    message = refused()
    assert "epoch 2" in message
    assert copy.name in message
    assert "index-0_epoch-2.pt" in message


def test_missing_checkpoints_are_listed_all_at_once(project, refused):
    message = refused("--epochs", "0,1,7,200,3")
    assert str(project.models) in message
    assert "3 of 5 epochs: 3, 7, 200" in message
    assert "--skip_missing" in message


def test_missing_checkpoints_are_skipped_on_request(project, dry_launch, capsys):
    assert dry_launch("--epochs", "0,1,7,200,3", "--skip_missing") == 0
    printed = capsys.readouterr().err
    assert "[3, 7, 200]" in printed
    assert "2 epochs, 2 blocks" in printed


def test_nothing_left_after_skipping_is_refused(project, refused):
    message = refused("--epochs", "7,9", "--skip_missing")
    assert str(project.models) in message
    assert "none of the requested epochs (2) has a checkpoint" in message


@pytest.mark.parametrize("epoch", [0, 2])
@pytest.mark.parametrize("kind", ["truncated", "empty", "text", "nested", "hostile"])
def test_a_damaged_checkpoint_is_refused(project, refused, tmp_path, epoch, kind):
    path, marker = project.models / f"index-0_epoch-{epoch}.pt", tmp_path / "marker"
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:50_000])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("weights\n")
    elif kind == "nested":
        torch.save({"model_state": make_model().state_dict()}, path)
    else:
        torch.save({"weight": Calls(os.system, f"touch {marker}")}, path)
    assert str(path) in refused()
    assert not marker.exists()


def test_all_damaged_checkpoints_are_listed_at_once(project, refused):
    paths = [project.models / f"index-0_epoch-{epoch}.pt" for epoch in (0, 1, 4)]
    for path in paths:
        path.write_bytes(path.read_bytes()[:50_000])
    message = refused()
    assert all(str(path) in message for path in paths)


def test_a_checkpoint_of_another_network_is_refused_with_the_names_that_differ(project, refused):
    path = project.models / "index-0_epoch-2.pt"
    torch.save({"encoder.weight": torch.zeros(3)}, path)
    message = refused()
    assert str(path) in message
    assert "missing conv1.weight" in message
    assert "unexpected encoder.weight" in message


def test_checkpoints_all_of_another_network_are_refused(project, refused):
    for epoch in (0, 1, 2, 4):
        torch.save({"encoder.weight": torch.zeros(3)}, project.models / f"index-0_epoch-{epoch}.pt")
    message = refused()
    assert str(project.models / "index-0_epoch-0.pt") in message
    assert "unexpected encoder.weight" in message


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_checkpoint_of_other_shapes_is_refused_with_the_shapes(project, refused, epoch):
    path = project.models / f"index-0_epoch-{epoch}.pt"
    change_weights(path, **{"layer1.0.conv1.weight": torch.zeros(4, 4, 5, 5)})
    message = refused()
    assert str(path) in message
    assert "layer1.0.conv1.weight has shape (4, 4, 5, 5) instead of (4, 4, 3, 3)" in message


def test_a_checkpoint_with_weights_of_no_shape_is_refused(project, refused):
    path = project.models / "index-0_epoch-0.pt"
    change_weights(path, **{"fc.weight": torch.tensor(1.0)})
    message = refused()
    assert str(path) in message
    assert "fc.weight" in message


def test_a_checkpoint_of_another_width_among_the_others_is_refused(project, refused):
    write_checkpoints(project.models, [2], spec=type(TINY)(num_classes=10, width=8))
    message = refused()
    assert str(project.models / "index-0_epoch-2.pt") in message
    assert "(8, 3, 3, 3) instead of (4, 3, 3, 3)" in message


@pytest.mark.parametrize("epoch", [0, 4])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_checkpoint_that_diverged_is_refused_with_the_weights_named(
    project, refused, epoch, value
):
    path = project.models / f"index-0_epoch-{epoch}.pt"
    change_weights(path, **{"fc.bias": torch.full((10,), value)})
    message = refused()
    assert str(path) in message
    assert "fc.bias" in message
    assert "--epochs" in message


# The class order


@pytest.mark.parametrize(
    ("order", "expected"),
    [
        (np.arange(9), "(9,)"),
        (np.arange(10).reshape(2, 5), "(2, 5)"),
        (np.array(3), "()"),
        (np.r_[np.arange(9), 8], "not a permutation of 0 … 9"),
        (np.arange(1, 11), "not a permutation of 0 … 9"),
        (np.array(list("abcdefghij")), "dtype <U1; expected integers"),
        (np.arange(10) + 0.5, "dtype float64; expected integers"),
    ],
    ids=["short", "two dimensions", "one number", "repeated", "from one", "letters", "fractions"],
)
@pytest.mark.parametrize("given", [True, False], ids=["given", "beside the models"])
def test_a_class_order_that_is_no_permutation_is_refused(project, refused, order, expected, given):
    path = project.root / "class_order" / "index-0.npy"
    path.parent.mkdir()
    np.save(path, order)
    message = refused(*(["--class_order", path] if given else []))
    assert str(path) in message
    assert expected in message


def test_a_class_order_that_is_no_npy_file_is_refused(project, refused):
    path = project.root / "order"
    path.write_text("8 44 23\n")
    message = refused("--class_order", path)
    assert str(path) in message
    assert ".npy" in message
    # The advice to load it unsafely is NumPy's, and no advice to give here.
    assert "unsafely" not in message


@pytest.mark.parametrize("kind", ["missing", "empty", "a directory", "a checkpoint", "npz", "cut"])
def test_a_class_order_of_another_kind_is_refused(project, refused, kind):
    path = project.root / "order"
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "a directory":
        path.mkdir()
    elif kind == "a checkpoint":
        path = project.models / "index-0_epoch-0.pt"
    elif kind == "npz":
        path = path.with_suffix(".npz")
        np.savez(path, order=np.arange(10))
    elif kind == "cut":
        with open(path, "wb") as file:
            np.save(file, np.arange(10))
        path.write_bytes(path.read_bytes()[:-20])
    message = refused("--class_order", path)
    assert str(path) in message
    assert ".npy" in message


@pytest.mark.parametrize("which", ["the file", "its directory", "given"])
def test_a_class_order_that_is_a_link_to_nothing_is_refused(project, refused, which):
    path = project.root / "class_order" / "index-0.npy"
    link = path.parent if which == "its directory" else path
    link.parent.mkdir(exist_ok=True)
    link.symlink_to("/not/mounted")
    message = refused(*(["--class_order", path] if which == "given" else []))
    assert str(path) in message
    assert "a link to /not/mounted" in message


NEARLY = [
    "index_0.npy",
    "index-00.npy",
    "Index-0.npy",
    "index-0.npy.npy",
    "index-0.csv",
    "index-0 (1).npy",
    "index-0.npy.part",
    "order.npy",
]


@pytest.mark.parametrize("name", NEARLY)
def test_a_class_order_that_is_nearly_there_is_not_replaced_by_another(project, refused, name):
    directory = project.root / "class_order"
    directory.mkdir()
    np.save(directory / "order.npy", np.arange(10)[::-1])
    (directory / "order.npy").rename(directory / name)
    message = refused()
    assert f"{directory / 'index-0.npy'} does not exist" in message
    assert f"has {name}, which may be the same file" in message
    assert "--class_order regenerate" in message


@pytest.mark.parametrize("name", ["class-order", "Class_Order", "class_orders"])
def test_a_directory_that_is_nearly_that_of_class_orders_is_refused(project, refused, name):
    (project.root / name).mkdir()
    assert f"has {name}. Name the file" in refused()


def test_a_file_in_place_of_the_directory_of_class_orders_is_refused(project, refused):
    (project.root / "class_order").write_text("8 44 23")
    assert f"{project.root / 'class_order'} cannot be read: Not a directory" in refused()


def test_a_mistyped_regenerate_is_not_taken_for_a_file(refused):
    assert "class order regenrate does not exist; did you mean regenerate?" in refused(
        "--class_order", "regenrate"
    )


def test_a_class_order_is_regenerated_where_that_is_asked_for(project, dry_launch, capsys):
    (project.root / "class_order").mkdir()
    np.save(project.root / "class_order" / "index_0.npy", np.arange(10))
    assert dry_launch("--class_order", "regenerate") == 0
    assert "regenerated from experiment index 0, as requested" in capsys.readouterr().err


def options_of(project: Project) -> LaunchOptions:
    return LaunchOptions(
        epochs="all", data_path=project.data, model_dir=project.models, store=project.store
    )


def test_other_experiments_class_orders_are_named_and_recorded(project, dry_launch, capsys):
    directory = project.root / "class_order"
    directory.mkdir()
    for name in ("index-1.npy", "index-10.npy", ".DS_Store"):
        (directory / name).touch()
    assert dry_launch() == 0
    said = f"{directory} has only index-1.npy, index-10.npy"
    assert f"regenerated from experiment index 0 ({said})" in capsys.readouterr().err
    assert experiment_of(options_of(project)).class_order_source.endswith(f"; {said}")


def test_the_class_order_beside_a_model_directory_named_by_dots_is_found(project, monkeypatch):
    path = project.root / "class_order" / "index-0.npy"
    path.parent.mkdir()
    np.save(path, np.arange(10)[::-1])
    monkeypatch.chdir(project.models)
    inputs = experiment_of(replace(options_of(project), model_dir=Path()))
    assert list(inputs.curriculum.order) == [*range(10)][::-1]
    assert inputs.class_order_source == str(path)


# Places that may not be entered or written


@pytest.fixture
def denied(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Refuse this process a directory as the system would; root is refused nothing."""

    def deny(directory: Path) -> None:
        stat, listing, access, opening = os.stat, os.listdir, os.access, io.open
        scan, making = os.scandir, os.open

        def below(path: Any) -> bool:
            if isinstance(path, int):
                return False
            return directory in Path(path).absolute().parents

        def refusing(function: Callable[..., Any], itself: bool) -> Callable[..., Any]:
            def call(path: Any = ".", *arguments: Any, **options: Any) -> Any:
                own = itself and not isinstance(path, int) and Path(path) == directory
                if below(path) or own:
                    raise PermissionError(errno.EACCES, "Permission denied", str(path))
                return function(path, *arguments, **options)

            return call

        monkeypatch.setattr(os, "stat", refusing(stat, False))
        monkeypatch.setattr(os, "listdir", refusing(listing, True))
        monkeypatch.setattr(os, "scandir", refusing(scan, True))
        monkeypatch.setattr(os, "open", refusing(making, True))
        monkeypatch.setattr(io, "open", refusing(opening, False))
        monkeypatch.setattr("builtins.open", refusing(opening, False))
        monkeypatch.setattr(
            os, "access", lambda path, mode: Path(path) != directory and access(path, mode)
        )

    return deny


@pytest.mark.parametrize("what", ["class order", "data", "data to download", "models", "tree"])
def test_a_directory_that_may_not_be_entered_ends_in_one_message(
    project, dry_launch, capsys, denied, what
):
    place = {
        "class order": project.root / "class_order",
        "models": project.models,
        "tree": project.tree,
    }.get(what, project.data)
    place.mkdir(exist_ok=True)
    denied(place)
    assert dry_launch(*(["--download"] if "download" in what else [])) == 2
    message = the_error(capsys.readouterr().err)
    assert str(place) in message
    assert "Permission denied" in message


def test_a_store_below_a_directory_that_may_not_be_entered_is_refused(
    project, dry_launch, capsys, denied
):
    (project.root / "closed").mkdir()
    denied(project.root / "closed")
    assert dry_launch("--store", str(project.root / "closed" / "run" / "s.zarr")) == 2
    message = the_error(capsys.readouterr().err)
    path = project.root / "closed" / "run" / "s.zarr"
    assert f"results store {path} cannot be accessed: Permission denied" in message


# The data set, nearly there


@pytest.mark.parametrize("arguments", [[], ["--download"]])
@pytest.mark.parametrize("kind", ["other case", "link"])
def test_a_data_set_that_is_nearly_there_is_refused(project, refused, kind, arguments):
    path = project.data / "train"
    if kind == "link":
        path.unlink()
        path.symlink_to("/not/mounted/train")
    else:
        path.rename(project.data / "Train")
    message = refused(*arguments)
    assert str(project.data) in message
    assert ("/not/mounted/train" if kind == "link" and not arguments else "rain") in message


# Options


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "0,x"], ["epochs", "'x'", "0,500,1000"]),
        (["--epochs", "0,,1"], ["epochs", "''"]),
        (["--epochs="], ["epochs", "''"]),
        (["--epochs", "0.5"], ["epochs", "'0.5'"]),
        (["--epochs=-1"], ["epochs", "-1"]),
        (["--epochs", "-1"], ["epochs", "-1"]),
        (["--epochs", "0,1,1"], ["epochs", "1 twice"]),
        (["--epochs", "0,1", "--step", "2"], ["--epochs", "--step"]),
        (["--end_epoch", "2"], ["--epochs", "--end_epoch"]),
        (["--h", "0"], ["h is 0.0", "above 0"]),
        (["--h=-0.001"], ["h is -0.001", "above 0"]),
        (["--h", "nan"], ["h is nan", "finite"]),
        (["--temperature", "0"], ["temperature is 0.0", "above 0"]),
        (["--temperature", "inf"], ["temperature is inf", "finite"]),
        (["--n_probes", "0"], ["n_probes is 0", "1 or more"]),
        (["--seed=-1"], ["seed is -1", "expected"]),
        (["--batch_size", "0"], ["batch_size is 0", "from 1 to"]),
        (["--block_size", "0"], ["block_size is 0", "from 1 to"]),
        (["--workers", "0"], ["workers is 0", "from 1 to"]),
        (["--validation_per_class=-1"], ["validation_per_class is -1", "0 or more"]),
        (["--initial_classes", "0"], ["initial_classes is 0", "from 1 to"]),
        (["--class_increment", "0"], ["class_increment is 0", "from 1 to"]),
        (["--class_frequency", "0"], ["class_frequency is 0", "from 1 to"]),
        (["--experiment_index=-1"], ["index -1"]),
    ],
    ids=" ".join,
)
def test_an_option_that_cannot_be_used_is_refused_with_its_value(refused, arguments, expected):
    message = refused(*arguments)
    assert all(part in message for part in expected), message


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--start_epoch", "3", "--end_epoch", "2"], ["start_epoch 3", "end_epoch 2"]),
        (["--start_epoch=-1", "--end_epoch", "2"], ["start_epoch -1"]),
        (["--step", "0"], ["step 0", "step >= 1"]),
    ],
    ids=["start after end", "negative start", "no step"],
)
def test_a_range_that_names_no_epochs_is_refused(project, monkeypatch, capsys, arguments, expected):
    monkeypatch.chdir(project.root)
    everything = without_epochs(project.launch_arguments("--dry_run", *arguments))
    assert main(["launch", *everything]) == 2
    message = the_error(capsys.readouterr().err)
    assert all(part in message for part in expected)
    assert not project.store.exists()


def test_a_range_without_its_checkpoints_lists_them(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    arguments = without_epochs(project.launch_arguments("--dry_run"))
    assert main(["launch", *arguments, "--end_epoch", "6", "--step", "1"]) == 2
    assert "3 of 7 epochs: 3, 5, 6" in the_error(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("arguments", "choices"),
    [
        (["--head", "both"], ["all", "active"]),
        (["--class_partition", "leaving"], ["entering", "trained"]),
        (["--n_probes", "many"], ["many"]),
        (["--h", "small"], ["small"]),
        (["--no_such_option"], ["--no_such_option"]),
        (["--epoch", "3"], ["--epoch"]),
    ],
    ids=["head", "partition", "not a number", "not a float", "unknown", "abbreviated"],
)
def test_a_word_that_no_option_takes_is_refused_with_the_choices(
    project, dry_launch, capsys, arguments, choices
):
    with pytest.raises(SystemExit) as stop:
        dry_launch(*arguments)
    assert stop.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "error: " in last
    assert arguments[0] in last
    assert all(choice in last for choice in choices)
    assert not project.store.exists()


# The store


def test_a_store_of_another_configuration_is_refused_with_what_differs(project, refused):
    make_store(project, h=0.5)
    message = refused()
    assert str(project.store) in message
    differing = [line.strip() for line in message.splitlines() if ": the store has" in line]
    assert differing == ["estimator.h: the store has 0.5, this run has 0.001"]
    assert "--store" in message


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (["--n_probes", "1"], "estimator.n_probes"),
        (["--seed", "1"], "estimator.seed"),
        (["--temperature", "2"], "estimator.temperature"),
        (["--head", "active"], "head"),
        (["--class_frequency", "3"], "classes.class_frequency"),
        (["--class_partition", "trained"], "classes.class_partition"),
        (["--validation_per_class", "1"], "dataset.validation_per_class"),
    ],
    ids=["fewer probes", "seed", "temperature", "head", "frequency", "partition", "held out"],
)
def test_a_store_is_not_continued_with_another_setting(project, refused, arguments, field):
    make_store(project)
    message = refused(*arguments)
    differing = [line.strip() for line in message.splitlines() if ": the store has" in line]
    assert len(differing) == 1
    assert differing[0].startswith(f"{field}: ")


def test_a_store_is_not_continued_with_another_label(project, refused):
    make_store(project)
    path = project.data / "train"
    content = pickle.loads(path.read_bytes())
    content["fine_labels"][3] = (content["fine_labels"][3] + 1) % 10
    path.write_bytes(pickle.dumps(content))
    message = refused()
    assert message.count(": the store has") == 1
    assert "dataset.sha256" in message


def test_a_store_of_a_newer_format_is_refused(project, refused):
    make_store(project)
    path = project.store / "zarr.json"
    content = json.loads(path.read_text())
    content["attributes"]["daskcurv_format"] = schema.FORMAT_VERSION + 1
    path.write_text(json.dumps(content))
    message = refused()
    assert str(project.store) in message
    assert f"format {schema.FORMAT_VERSION + 1}" in message


@pytest.mark.parametrize("kind", ["a directory", "an empty directory", "a file"])
def test_a_store_path_that_is_something_else_is_refused(project, refused, kind):
    path = project.root / "thesis"
    if kind == "a file":
        path.write_text("precious")
    else:
        path.mkdir()
        if kind == "a directory":
            (path / "chapter.txt").write_text("precious")
    message = refused("--store", path)
    assert str(path) in message
    assert "not a daskcurv results store" in message
    assert "--store" in message


def test_the_working_directory_is_no_store(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    before = contents(project.root)
    assert main(["launch", *project.launch_arguments("--store", ".")]) == 2
    the_error(capsys.readouterr().err)
    assert contents(project.root) == before


# Launches that are not dry


@pytest.mark.parametrize(
    ("gpus", "arguments", "expected"),
    [
        ([], ["--device", "cuda"], "no GPU is visible"),
        (["0"], ["--workers", "2"], "workers is 2, but 1 GPU(s) are visible"),
    ],
)
def test_devices_that_are_not_there_are_refused_before_anything_is_made(
    project, monkeypatch, capsys, gpus, arguments, expected
):
    monkeypatch.chdir(project.root)
    monkeypatch.setattr("daskcurv.clusters.local.visible_gpus", lambda: gpus)
    before = contents(project.root)
    assert main(["launch", *project.launch_arguments(*arguments)]) == 2
    assert expected in the_error(capsys.readouterr().err)
    assert contents(project.root) == before


def test_places_for_results_that_cannot_be_made_are_refused_before_anything_is_made(
    project, monkeypatch, capsys
):
    monkeypatch.chdir(project.root)
    (project.root / "file").write_text("precious")
    before = contents(project.root)
    for option in ("--store", "--save_base_dir"):
        place = project.root / "file" / "results"
        assert main(["launch", *project.launch_arguments(option, str(place))]) == 2
        message = the_error(capsys.readouterr().err)
        assert (
            f"{project.root / 'file'} is not a directory; choose another path ({option})" in message
        )
        assert contents(project.root) == before


def test_a_directory_for_temporary_files_without_space_ends_in_one_message(monkeypatch):
    def full(**_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", "/scratch/tmp")

    monkeypatch.setattr("tempfile.TemporaryDirectory", full)
    with pytest.raises(ClusterError, match=r"No space left on device: .*TMPDIR"):
        local_cluster(workers=1, device="cpu").__enter__()


def test_a_store_that_cannot_be_written_ends_in_one_message(project):
    (project.root / "file").write_text("precious")
    before = contents(project.root)
    run = project.launch("--store", str(project.root / "file" / "curvature.zarr"))
    assert run.returncode == 2
    message = the_error(run.stdout)
    assert str(project.root / "file" / "curvature.zarr") in message
    assert contents(project.root) == before


def test_another_programs_epoch_directory_is_refused_and_left_alone(project):
    directory = project.tree / "epoch_0002"
    directory.mkdir(parents=True)
    np.save(directory / "per_image_curvature.npy", np.arange(5.0))
    (directory / "metadata.json").write_text('{"epoch": 2, "num_gpus": 8}')
    before = contents(project.tree)
    run = project.launch("--workers", "1")
    assert run.returncode == 2
    message = the_error(run.stdout)
    assert str(directory) in message
    assert "--save_base_dir" in message
    assert contents(project.tree) == before
    assert not ResultsStore.open(project.store).done_blocks().any()


def test_an_export_that_cannot_be_made_is_refused_before_anything_is_computed(project):
    (project.root / "file").write_text("precious")
    run = project.launch("--workers", "1", "--save_base_dir", str(project.root / "file"))
    assert run.returncode == 2
    assert str(project.root / "file") in the_error(run.stdout)
    assert not project.store.exists() or not ResultsStore.open(project.store).done_blocks().any()


def test_a_log_that_cannot_be_written_ends_in_one_message(project, monkeypatch, capsys):
    monkeypatch.chdir(project.root)
    (project.root / "log").write_text("precious")
    assert main(["launch", *project.launch_arguments("--dry_run")]) == 2
    assert "log" in the_error(capsys.readouterr().err)
    assert (project.root / "log").read_text() == "precious"


def test_a_demo_that_cannot_be_written_ends_in_one_message(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    for place in (tmp_path / "file", tmp_path / "file" / "demo"):
        assert main(["launch", "--demo", str(place)]) == 2
        assert str(place) in the_error(capsys.readouterr().err)
