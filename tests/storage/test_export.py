"""Results out as npy files: exactly the documented tree, and nobody else's files touched."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daskcurv.cli import main
from daskcurv.errors import ConfigError, ExportError, StoreWriteError
from daskcurv.measures import MEASURES
from daskcurv.storage import ResultsStore, export_epoch, export_epochs, schema
from tests.support.disks import enlarge, mounted
from tests.support.exports import (
    ACTIVE_CLASSES,
    LABELS,
    ORDER,
    N,
    active,
    epoch_values,
    make_store,
    write_epoch,
)
from tests.support.stores import files_below

EXTRAS = {
    "curvature_sq": np.float32,
    "loss": np.float32,
    "grad_norm": np.float32,
    "prediction": np.int16,
    "status": np.uint8,
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A store of 10 samples in which 2, 4 and all 5 classes are active at epochs 0, 200, 1000."""
    return make_store(tmp_path / "curvature.zarr")


@pytest.fixture
def store(path: Path) -> ResultsStore:
    return ResultsStore.open(path)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "tree"


def read(directory: Path, name: str) -> Any:
    return np.load(directory / f"per_image_{name}.npy", allow_pickle=False)


def read_metadata(directory: Path) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        pytest.fail(f"{constant} is not JSON")

    content: dict[str, Any] = json.loads(
        (directory / "metadata.json").read_text(), parse_constant=refuse
    )
    return content


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_every_epoch_gets_the_documented_files(store, out):
    assert list(export_epochs(store, out)) == [0, 200, 1000]
    assert names_in(out) == ["epoch_0000", "epoch_0200", "epoch_1000"]
    for epoch in ACTIVE_CLASSES:
        directory = out / f"epoch_{epoch:04d}"
        assert names_in(directory) == [
            "metadata.json",
            "per_image_curvature.npy",
            "per_image_directional_eig.npy",
            "per_image_labels.npy",
        ]
        stored = epoch_values(epoch)
        for name in ("curvature", "directional_eig"):
            exported = read(directory, name)
            assert exported.dtype == np.float32
            assert exported.shape == (N,)
            np.testing.assert_array_equal(exported, stored[name])
            np.testing.assert_array_equal(np.isnan(exported), ~active(epoch))
        labels = read(directory, "labels")
        assert labels.dtype == np.int64
        np.testing.assert_array_equal(labels, LABELS)


def test_others_can_read_an_exported_directory(store, out):
    directory = export_epoch(store, out, 0)
    assert directory == out / "epoch_0000"
    assert directory.stat().st_mode & 0o777 == 0o755


def test_the_metadata_describe_the_epoch_and_its_active_samples(store, out):
    for epoch, row in store.rows.items():
        store.set_epoch(row, method=f"method of {epoch}", num_workers=3 + row)
    list(export_epochs(store, out))
    for row, (epoch, count) in enumerate(ACTIVE_CLASSES.items()):
        metadata = read_metadata(out / f"epoch_{epoch:04d}")
        assert {*metadata} == {
            "epoch", "total_samples", "num_gpus", "compute_time_seconds", "allowed_classes",
            "curvature_stats", "method", "active_samples", "checkpoint", "checkpoint_sha256",
            "identity", "fingerprint", "inactive", "divided_by",
        }  # fmt: skip
        assert metadata["epoch"] == epoch
        assert metadata["total_samples"] == N
        assert metadata["num_gpus"] == 3 + row
        assert metadata["method"] == f"method of {epoch}"
        assert metadata["checkpoint_sha256"] == f"{epoch:064x}"
        assert metadata["identity"] == {"estimator": {"h": 0.001}, "classes": {"order": ORDER}}
        assert (metadata["inactive"], metadata["divided_by"]) == ("nan", 1)
        assert metadata["compute_time_seconds"] == 12.25 + epoch
        assert metadata["allowed_classes"] == ORDER[:count]
        assert metadata["active_samples"] == active(epoch).sum()
        assert metadata["checkpoint"] == f"index-0_epoch-{epoch}.pt"
        assert metadata["fingerprint"] == store.fingerprint

        curvature = epoch_values(epoch)["curvature"][active(epoch)].astype(np.float64)
        assert metadata["curvature_stats"] == pytest.approx(
            {
                "mean": curvature.sum() / len(curvature),
                "std": np.sqrt(((curvature - curvature.mean()) ** 2).mean()),
                "min": curvature.min(),
                "max": curvature.max(),
            },
            rel=1e-12,
        )


def test_inactive_samples_can_be_zero(store, out):
    directory = export_epoch(store, out, 200, inactive="zero", extras=True)
    stored = epoch_values(200)
    for name in ("curvature", "directional_eig", "curvature_sq", "loss", "grad_norm"):
        np.testing.assert_array_equal(
            read(directory, name), np.where(active(200), stored[name], np.float32(0))
        )
    np.testing.assert_array_equal(read(directory, "labels"), LABELS)
    curvature = stored["curvature"][active(200)]
    assert read_metadata(directory)["curvature_stats"]["min"] == curvature.min()
    assert read_metadata(directory)["inactive"] == "zero"


def test_inactive_samples_can_be_dropped(store, out):
    directory = export_epoch(store, out, 200, inactive="drop", extras=True)
    stored, kept = epoch_values(200), np.flatnonzero(active(200))
    assert 0 < len(kept) < N
    ids = read(directory, "sample_ids")
    assert ids.dtype == np.int64
    np.testing.assert_array_equal(ids, kept)
    np.testing.assert_array_equal(read(directory, "labels"), LABELS[kept])
    for name in ("curvature", "directional_eig", *EXTRAS):
        np.testing.assert_array_equal(read(directory, name), stored[name][kept])
    assert read_metadata(directory)["total_samples"] == N


def test_extras_are_the_stores_other_variables(store, out):
    directory = export_epoch(store, out, 200, extras=True)
    stored = epoch_values(200)
    for name, dtype in EXTRAS.items():
        exported = read(directory, name)
        assert exported.dtype == dtype
        np.testing.assert_array_equal(exported, stored[name])
    assert len(names_in(directory)) == 4 + len(EXTRAS)


def test_dividing_by_a_batch_size_scales_gradients_by_it_and_squares_by_its_square(store, out):
    directory = export_epoch(store, out, 200, divide_by=40, extras=True)
    stored = epoch_values(200)
    for name, divisor in {
        "curvature": 40,
        "directional_eig": 40,
        "grad_norm": 40,
        "curvature_sq": 1600,
    }.items():
        exported = read(directory, name)
        assert exported.dtype == np.float32
        np.testing.assert_allclose(exported, stored[name] / divisor, rtol=1e-6)
    for name in ("loss", "prediction", "status"):
        np.testing.assert_array_equal(read(directory, name), stored[name])
    metadata = read_metadata(directory)
    assert metadata["divided_by"] == 40
    curvature = stored["curvature"][active(200)].astype(np.float64) / 40
    assert metadata["curvature_stats"]["mean"] == pytest.approx(curvature.mean(), rel=1e-6)
    assert metadata["curvature_stats"]["std"] == pytest.approx(curvature.std(), rel=1e-6)


@pytest.mark.parametrize("options", [{"divide_by": 0}, {"divide_by": -1}, {"inactive": "none"}])
def test_options_that_mean_nothing_are_refused_before_anything_is_written(store, out, options):
    with pytest.raises(ConfigError, match=next(iter(options))):
        list(export_epochs(store, out, **options))
    assert not out.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_metadata_are_strict_json_even_if_a_curvature_is_not_finite(store, out, value):
    values = epoch_values(200)
    values["curvature"][np.flatnonzero(active(200))[0]] = value
    write_epoch(store, 200, values)
    directory = export_epoch(store, out, 200)
    assert read_metadata(directory)["curvature_stats"] == {
        "mean": None,
        "std": None,
        "min": None,
        "max": None,
    }
    np.testing.assert_array_equal(read(directory, "curvature"), values["curvature"])


def test_an_epoch_without_active_samples_is_exported_without_statistics(store, out):
    values = {variable.name: np.full(N, variable.fill, variable.dtype) for variable in MEASURES}
    values["status"] = np.full(N, schema.INACTIVE, np.uint8)
    write_epoch(store, 0, values)
    directory = export_epoch(store, out, 0)
    assert read_metadata(directory)["curvature_stats"]["mean"] is None
    assert np.isnan(read(directory, "curvature")).all()


def test_unfinished_epochs_are_all_listed_before_anything_is_written(tmp_path, out):
    store = ResultsStore.open(make_store(tmp_path / "s", finished=(200,)))
    values = epoch_values(1000)
    store.write_block(store.rows[1000], 0, {name: values[name][:4] for name in values})
    with pytest.raises(ExportError, match=r"\[0, 1000\]") as refusal:
        list(export_epochs(store, out))
    assert str(tmp_path / "s") in str(refusal.value)
    assert not out.exists()
    assert list(export_epochs(store, out, [200])) == [200]


def test_epochs_that_the_store_does_not_have_are_listed_before_anything_is_written(store, out):
    with pytest.raises(ExportError, match=r"\[7, 8\]") as refusal:
        list(export_epochs(store, out, [0, 7, 8]))
    assert str(store.path) in str(refusal.value)
    assert not out.exists()


def foreign(target: Path, kind: str) -> None:
    target.parent.mkdir(exist_ok=True)
    if kind == "a file":
        target.write_text("precious")
        return
    target.mkdir()
    np.save(target / "per_image_curvature.npy", np.arange(3.0))
    contents = {
        "another program": '{"epoch": 200, "num_gpus": 8}',
        "another configuration": '{"fingerprint": "0123456789abcdef"}',
        "broken metadata": "{",
        "metadata of another kind": "[1, 2]",
        "metadata in another encoding": "ÿ",
    }
    if kind in contents:
        (target / "metadata.json").write_text(contents[kind], encoding="latin1")


@pytest.mark.parametrize(
    "kind",
    [
        "another program",
        "another configuration",
        "no metadata",
        "broken metadata",
        "metadata of another kind",
        "metadata in another encoding",
        "a file",
    ],
)
def test_what_another_program_or_configuration_made_is_refused_and_left_alone(store, out, kind):
    foreign(out / "epoch_0200", kind)
    before = files_below(out)
    with pytest.raises(ExportError) as refusal:
        list(export_epochs(store, out))
    assert str(out / "epoch_0200") in str(refusal.value)
    assert files_below(out) == before
    assert names_in(out) == ["epoch_0200"]


def test_the_export_of_a_store_with_other_settings_is_refused_and_left_alone(tmp_path, store, out):
    list(export_epochs(store, out, [0, 200]))
    before = files_below(out)
    other = ResultsStore.open(make_store(tmp_path / "other", h=0.01))
    with pytest.raises(ExportError, match="another configuration") as refusal:
        list(export_epochs(other, out, [200, 1000]))
    assert str(out / "epoch_0200") in str(refusal.value)
    assert files_below(out) == before


def test_exporting_again_replaces_what_was_exported(store, out):
    list(export_epochs(store, out, inactive="drop", extras=True))
    changed = epoch_values(200)
    changed["curvature"][active(200)] = 7
    write_epoch(store, 200, changed)
    list(export_epochs(store, out))
    np.testing.assert_array_equal(read(out / "epoch_0200", "curvature"), changed["curvature"])
    assert names_in(out) == ["epoch_0000", "epoch_0200", "epoch_1000"]
    assert len(names_in(out / "epoch_0200")) == 4


@pytest.mark.parametrize("exported_before", [True, False])
@pytest.mark.parametrize("failing", [1, 2, 3, "metadata"])
def test_a_full_disk_leaves_the_previous_export_whole(
    store, out, monkeypatch, disk_full_at, exported_before, failing
):
    if exported_before:
        export_epoch(store, out, 200)
    before = files_below(out)

    def full(path: Path, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if failing == "metadata":
        monkeypatch.setattr(Path, "write_bytes", full)
    else:
        disk_full_at(failing)
    with pytest.raises(StoreWriteError, match="No space left on device") as refusal:
        export_epoch(store, out, 200, inactive="zero")
    assert str(out / "epoch_0200") in str(refusal.value)
    assert files_below(out) == before
    assert names_in(out) == (["epoch_0200"] if exported_before else [])


@pytest.mark.parametrize("failing", [1, 2])
def test_a_rename_that_fails_leaves_the_previous_export_whole(store, out, monkeypatch, failing):
    export_epoch(store, out, 200)
    before = files_below(out)
    rename, calls = os.rename, []

    def rename_until_failing(*paths: Path) -> None:
        calls.append(paths)
        if len(calls) == failing:
            raise OSError(errno.EIO, "Input/output error")
        rename(*paths)

    monkeypatch.setattr(os, "rename", rename_until_failing)
    with pytest.raises(StoreWriteError, match="Input/output error"):
        export_epoch(store, out, 200, inactive="zero")
    assert files_below(out) == before
    assert names_in(out) == ["epoch_0200"]


def test_a_place_that_cannot_be_written_is_a_store_write_error(store, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError) as refusal:
        list(export_epochs(store, tmp_path / "file" / "tree"))
    assert f"cannot write {tmp_path / 'file' / 'tree'}: " in str(refusal.value)


def test_the_store_is_only_read(store, path, out):
    before = files_below(path)
    list(export_epochs(store, out, extras=True))
    assert files_below(path) == before


# The command


def run(*arguments: object) -> int:
    return main(["export_npy", *map(str, arguments)])


def test_the_command_exports_every_epoch(path, out, capsys):
    assert run(path, out) == 0
    assert names_in(out) == ["epoch_0000", "epoch_0200", "epoch_1000"]
    assert f"exported 3 epochs to {out}" in capsys.readouterr().err


def test_the_command_exports_the_epochs_asked_for_with_the_options_given(path, out):
    assert run(path, out, "--epochs", "1000,200", "--inactive", "drop", "--divide_by", "5") == 0
    assert names_in(out) == ["epoch_0200", "epoch_1000"]
    directory, kept = out / "epoch_0200", active(200)
    np.testing.assert_array_equal(read(directory, "sample_ids"), np.flatnonzero(kept))
    np.testing.assert_allclose(
        read(directory, "curvature"), epoch_values(200)["curvature"][kept] / 5, rtol=1e-6
    )
    assert not (directory / "per_image_loss.npy").exists()


def test_the_command_takes_hyphens_and_extras(path, out):
    arguments = ["export-npy", path, out, "--divide-by=5", "--inactive=zero", "--extras"]
    assert main([*map(str, arguments)]) == 0
    directory = out / "epoch_0200"
    np.testing.assert_allclose(
        read(directory, "curvature_sq"),
        np.where(active(200), epoch_values(200)["curvature_sq"] / 25, 0),
        rtol=1e-6,
    )


def test_the_command_says_all_for_every_epoch(path, out):
    assert run(path, out, "--epochs", "all") == 0
    assert len(names_in(out)) == 3


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--epochs", "0,7"], ["[7]"]),
        (["--epochs", "0,x"], ["'x'"]),
        (["--epochs=-1"], ["-1"]),
        (["--epochs", "0,0"], ["0 twice"]),
        (["--divide_by", "0"], ["divide_by", "0"]),
    ],
    ids=["unknown", "not a number", "negative", "twice", "divide by nothing"],
)
def test_the_command_ends_with_one_message_for_what_it_cannot_do(
    path, out, capsys, arguments, expected
):
    assert run(path, out, *arguments) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert len(printed.splitlines()) == 1
    assert all(part in printed for part in expected)
    assert not out.exists()


def test_the_command_refuses_a_path_that_is_no_store(tmp_path, out, capsys):
    (tmp_path / "directory").mkdir()
    for name in ("directory", "missing"):
        assert run(tmp_path / name, out) == 2
        printed = capsys.readouterr().err
        assert printed.startswith("error: ")
        assert str(tmp_path / name) in printed
    assert not out.exists()


def test_the_command_refuses_to_replace_another_programs_directory(path, out, capsys):
    foreign(out / "epoch_1000", "another program")
    before = files_below(out)
    assert run(path, out) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("error: ")
    assert str(out / "epoch_1000") in printed
    assert files_below(out) == before


def test_the_command_does_not_know_other_ways_to_treat_inactive_samples(path, out, capsys):
    with pytest.raises(SystemExit) as stop:
        run(path, out, "--inactive", "none")
    assert stop.value.code == 2
    assert "--inactive" in capsys.readouterr().err
    assert not out.exists()


def test_a_full_disk_ends_it_with_a_message_and_a_rerun_completes_it(path, tmp_path, capfd):
    with mounted(tmp_path / "disk", "24k") as disk:
        arguments = ["export_npy", str(path), str(disk / "tree")]
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert "No space left on device" in said
        assert "export again" in said
        finished = names_in(disk / "tree")
        assert finished == ["epoch_0000"]
        enlarge(disk)
        assert main(arguments) == 0
        assert names_in(disk / "tree") == ["epoch_0000", "epoch_0200", "epoch_1000"]
