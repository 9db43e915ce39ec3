"""Old results in: what is imported is what was there, and exports again to the same bytes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from daskcurv.cli import main
from daskcurv.errors import DataError, ExportError, StoreError
from daskcurv.storage import ResultsStore, export_epochs
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.compact import compact
from daskcurv.storage.integrity.verify import verify
from daskcurv.storage.npy import importing
from daskcurv.storage.npy.importing import import_tree
from daskcurv.storage.read import open_results
from tests.support.disks import enlarge, mounted
from tests.support.exports import ACTIVE_CLASSES, LABELS, ORDER, active, epoch_values, make_store
from tests.support.stores import files_below

N = len(LABELS)


def older_metadata(epoch: int, allowed: list[int]) -> dict[str, Any]:
    """What the older scripts write, and nothing more."""
    return {
        "epoch": epoch,
        "total_samples": N,
        "num_gpus": 4,
        "compute_time_seconds": 12.5,
        "allowed_classes": allowed,
        "curvature_stats": {"mean": 1.0, "std": 0.5, "min": 0.1, "max": 2.0},
    }


def write_older(tree: Path, filtered: bool = False, divided_by: int = 1) -> Path:
    """Write a tree as the older scripts do: other spacing of the JSON, no newline at its end."""
    for epoch, count in ACTIVE_CLASSES.items():
        directory = tree / f"epoch_{epoch:04d}"
        directory.mkdir(parents=True)
        kept = active(epoch) if filtered else np.ones(N, bool)
        values = epoch_values(epoch)
        for name in ("curvature", "directional_eig"):
            scaled = values[name] / np.float32(divided_by)
            np.save(directory / f"per_image_{name}.npy", scaled[kept])
        np.save(directory / "per_image_labels.npy", LABELS[kept])
        if filtered:
            np.save(directory / "per_image_sample_ids.npy", np.flatnonzero(kept))
        metadata = older_metadata(epoch, ORDER[:count])
        (directory / "metadata.json").write_text(json.dumps(metadata, indent=4))
    return tree


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_older(tmp_path / "tree")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "imported.zarr"


def exported(store: ResultsStore, out: Path, **options: Any) -> dict[str, bytes]:
    list(export_epochs(store, out, **options))
    return files_below(out)


@pytest.mark.parametrize("filtered", [False, True])
def test_an_older_tree_comes_back_as_the_same_bytes(tmp_path, path, filtered):
    tree = write_older(tmp_path / "tree", filtered)
    store = import_tree(tree, path)
    assert exported(store, tmp_path / "again") == files_below(tree)


@pytest.mark.parametrize("inactive", ["nan", "zero", "drop"])
@pytest.mark.parametrize("extras", [False, True])
@pytest.mark.parametrize("divide_by", [None, 512])
def test_an_export_comes_back_as_the_same_bytes(tmp_path, path, inactive, extras, divide_by):
    source = ResultsStore.open(make_store(tmp_path / "source.zarr"))
    options = {"inactive": inactive, "extras": extras, "divide_by": divide_by}
    tree = exported(source, tmp_path / "tree", **options)
    store = import_tree(tmp_path / "tree", path, divide_by or 1)
    assert exported(store, tmp_path / "again") == tree
    for name in ("curvature", "directional_eig"):
        for epoch, row in store.rows.items():
            np.testing.assert_array_equal(store.read(name, row), epoch_values(epoch)[name])


def test_what_was_imported_can_be_asked_like_any_results(tree, path):
    import_tree(tree, path)
    results = open_results(path, incomplete="raise")
    assert results.epoch.values.tolist() == [*ACTIVE_CLASSES]
    np.testing.assert_array_equal(results.label, LABELS)
    places = {0: 3, 1: 1, 2: 4, 3: 0, 4: 2}
    assert results.class_position.values.tolist() == [places[label] for label in LABELS.tolist()]
    first = {3: 0, 1: 0, 4: 200, 0: 200, 2: 1000}
    assert results.first_epoch_active.values.tolist() == [first[label] for label in LABELS.tolist()]
    assert results.sample.values.tolist() == list(range(N))
    assert results.split.values.tolist() == [0] * N
    assert results.complete.values.tolist() == [True] * 3
    assert results.compute_seconds.values.tolist() == [12.5] * 3
    assert results.method.values.tolist() == ["imported"] * 3
    assert results.task.values.tolist() == [0, 1, 2]
    assert results.num_active_classes.values.tolist() == [2, 4, 5]
    assert results.num_workers.values.tolist() == [4, 4, 4]
    assert identity_of(results)["estimator"]["method"] == "imported"
    for epoch in ACTIVE_CLASSES:
        values = results.sel(epoch=epoch)
        np.testing.assert_array_equal(values.curvature, epoch_values(epoch)["curvature"])
        eig = epoch_values(epoch)["directional_eig"]
        np.testing.assert_array_equal(values.directional_eig, eig)
        np.testing.assert_array_equal(values.status == 1, active(epoch))
        assert np.isnan(values.loss).all()
        assert np.isnan(values.curvature_stderr).all()
        assert "number of probes is not known" in values.curvature_stderr.attrs["long_name"]
        assert (values.prediction == -1).all()


def test_positions_are_those_of_an_order_that_is_not_its_own_inverse(tmp_path, path):
    directory = tmp_path / "tree" / "epoch_0000"
    directory.mkdir(parents=True)
    for name in ("curvature", "directional_eig"):
        np.save(directory / f"per_image_{name}.npy", np.ones(3, np.float32))
    np.save(directory / "per_image_labels.npy", np.array([0, 1, 2]))
    (directory / "metadata.json").write_text('{"epoch": 0, "allowed_classes": [1, 2, 0]}')
    results = open_results(import_tree(tmp_path / "tree", path).path)
    assert results.class_position.values.tolist() == [2, 0, 1]


@pytest.mark.parametrize("filtered", [False, True])
def test_an_import_is_in_order_also_when_it_is_compacted(tmp_path, path, filtered):
    tree = write_older(tmp_path / "tree", filtered)
    store = import_tree(tree, path)
    assert verify(store).damage == []
    compact(store, tmp_path / "compact.zarr")
    smaller = ResultsStore.open(tmp_path / "compact.zarr")
    assert verify(smaller).damage == []
    assert exported(smaller, tmp_path / "again") == files_below(tree)


def test_samples_that_no_filtered_epoch_has_are_unknown(tmp_path, path):
    tree = write_older(tmp_path / "tree", filtered=True)
    shutil.rmtree(tree / "epoch_1000")
    results = open_results(import_tree(tree, path).path)
    unknown = ~active(200)
    assert (results.label.values[unknown] == -1).all()
    assert (results.first_epoch_active.values[unknown] == -1).all()
    assert (results.status.values[:, unknown] == 2).all()
    assert verify(ResultsStore.open(path)).damage == []


def test_a_batch_size_is_multiplied_away(tmp_path, path):
    tree = write_older(tmp_path / "tree", divided_by=100)
    store = import_tree(tree, path, multiply_by=100)
    expected = epoch_values(1000)["curvature"]
    np.testing.assert_allclose(store.read("curvature", store.rows[1000]), expected, rtol=2e-7)
    again = exported(store, tmp_path / "again")
    for name, content in files_below(tree).items():
        if not name.endswith("curvature.npy") and not name.endswith("eig.npy"):
            assert again[name] == content


@pytest.mark.parametrize("factor", [2, 64, 2**14])
def test_a_power_of_two_is_multiplied_away_and_divided_again_without_loss(tmp_path, path, factor):
    tree = write_older(tmp_path / "tree", divided_by=factor)
    store = import_tree(tree, path, multiply_by=factor)
    for epoch in ACTIVE_CLASSES:
        expected = epoch_values(epoch)["curvature"]
        np.testing.assert_array_equal(store.read("curvature", store.rows[epoch]), expected)
    assert exported(store, tmp_path / "again") == files_below(tree)


def test_options_of_an_export_apply_to_an_import_too(tree, path, tmp_path):
    store = import_tree(tree, path)
    exported(store, tmp_path / "zero", inactive="zero")
    metadata = json.loads((tmp_path / "zero" / "epoch_0000" / "metadata.json").read_text())
    assert metadata["identity"] == store.identity
    curvature = np.load(tmp_path / "zero" / "epoch_0000" / "per_image_curvature.npy")
    assert (curvature[~active(0)] == 0).all()


def change(file: str, values: Any, epoch: int = 200) -> Callable[[Path], None]:
    def apply(tree: Path) -> None:
        np.save(tree / f"epoch_{epoch:04d}" / f"per_image_{file}.npy", values, allow_pickle=True)

    return apply


def metadata(**changes: Any) -> Callable[[Path], None]:
    def apply(tree: Path) -> None:
        path = tree / "epoch_0200" / "metadata.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return apply


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def apply(tree: Path) -> None:
        (tree / "epoch_0200" / name).write_bytes(content)

    return apply


def with_nan(tree: Path) -> None:
    values = epoch_values(200)["curvature"]
    values[np.flatnonzero(active(200))[:2]] = np.nan
    change("curvature", values)(tree)


WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (lambda tree: shutil.rmtree(tree), "tree is not a directory"),
    (lambda tree: [shutil.rmtree(e) for e in tree.iterdir()], "has no epoch_… directory"),
    (lambda tree: (tree / "epoch_0200/per_image_labels.npy").unlink(), "labels.npy does not exist"),
    (lambda tree: (tree / "epoch_0200/metadata.json").unlink(), "metadata.json cannot be read"),
    (lambda tree: (tree / "epoch_0200").rename(tree / "epoch_0300"), "has epoch 200; expected"),
    (lambda tree: shutil.copytree(tree / "epoch_0200", tree / "epoch_200"), "both epoch 200"),
    (write("metadata.json", b"{"), "cannot be read as JSON"),
    (write("metadata.json", b"\xff"), "cannot be read as JSON"),
    (write("metadata.json", b"[]"), "holds no JSON object"),
    (write("per_image_curvature.npy", b"nonsense"), "cannot be read as an npy file"),
    (write("per_image_curvature.npy", b""), "cannot be read as an npy file"),
    (metadata(allowed_classes=None), "no list of distinct class numbers"),
    (metadata(allowed_classes=[3, 3]), "no list of distinct class numbers"),
    (metadata(allowed_classes=["3"]), "no list of distinct class numbers"),
    (metadata(allowed_classes=[1, 3, 4, 0]), "do not begin with those of epoch 0"),
    (metadata(allowed_classes=[3, 1, 4]), "has values other than nan"),
    (change("curvature", np.zeros(N)), "expected float32"),
    (change("curvature", np.zeros((N, 1), np.float32)), "of shape (10, 1)"),
    (change("curvature", np.zeros(N - 1, np.float32)), "has 9 values; expected 10"),
    (change("curvature", np.array([{}] * N)), "cannot be read as an npy file"),
    (change("directional_eig", np.ones(N, np.float32)), "has values other than nan"),
    (change("labels", np.roll(LABELS, 1)), "differs from that of epoch 0"),
    (change("labels", LABELS[:-1]), "has 9 values; expected 10"),
    (change("loss", np.ones(N, np.float32)), "at some epochs and absent at others"),
    (change("sample_ids", np.arange(N)), "has sample ids, and"),
    (with_nan, "NaN for 2 samples of allowed_classes"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), WRONG)
def test_what_does_not_fit_is_refused_and_nothing_is_left(tree, path, capfd, spoil, message):
    spoil(tree)
    assert main(["import_npy", str(tree), str(path)]) == 2
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert {entry.name for entry in path.parent.iterdir()} <= {"tree"}


FILTERED_WRONG: list[tuple[Callable[[Path], Any], str]] = [
    (change("sample_ids", np.arange(8)[::-1].copy()), "repeated or out of order"),
    (change("sample_ids", np.array([-1, *range(1, 8)])), "below 0"),
    (change("sample_ids", np.flatnonzero(active(0)), 1000), "has 10 values; expected 4"),
    (change("labels", np.full(8, 2)), "has label 2, not one of allowed_classes"),
    (change("labels", np.full(8, 3)), "gives samples other labels"),
    (change("curvature", np.zeros(3, np.float32)), "has 3 values; expected 8"),
    (lambda tree: (tree / "epoch_0200/per_image_sample_ids.npy").unlink(), "does not exist"),
]  # fmt: skip


@pytest.mark.parametrize(("spoil", "message"), FILTERED_WRONG)
def test_what_does_not_fit_a_filtered_tree_is_refused(tmp_path, path, spoil, message):
    tree = write_older(tmp_path / "tree", filtered=True)
    spoil(tree)
    with pytest.raises(DataError) as refusal:
        import_tree(tree, path)
    assert message in str(refusal.value)


def test_filtered_epochs_only_gain_samples(tmp_path, path):
    tree = write_older(tmp_path / "tree", filtered=True)
    kept = np.flatnonzero(active(1000))[1:]
    change("sample_ids", kept, 1000)(tree)
    change("labels", LABELS[kept], 1000)(tree)
    with pytest.raises(DataError, match="lacks samples that epochs before had"):
        import_tree(tree, path)


def test_nothing_that_exists_is_replaced(tree, path):
    path.mkdir()
    with pytest.raises(StoreError, match="exists"):
        import_tree(tree, path)


def test_an_interrupted_import_leaves_nothing_and_the_next_removes_its_draft(
    tree, path, monkeypatch
):
    with monkeypatch.context() as patch:
        patch.setattr(importing, "_fill", interrupt)
        with pytest.raises(KeyboardInterrupt):
            import_tree(tree, path)
    assert [entry.name for entry in path.parent.iterdir()] == ["tree"]
    (path.parent / f".{path.name}.killed.partial").mkdir()
    import_tree(tree, path)
    assert {entry.name for entry in path.parent.iterdir()} == {"tree", path.name}


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def test_a_full_disk_ends_it_with_a_message_and_a_rerun_completes_it(tree, tmp_path, capfd):
    with mounted(tmp_path / "disk", "100k") as disk:
        arguments = ["import-npy", str(tree), str(disk / "s.zarr")]
        assert main(arguments) == 2
        assert "No space left on device" in capfd.readouterr().err
        assert list(disk.iterdir()) == []
        enlarge(disk)
        assert main(arguments) == 0
        assert "imported 3 epochs of 10 samples" in capfd.readouterr().err


def test_a_launch_does_not_touch_an_import(tree, path, project, capfd):
    import_tree(tree, path)
    project.store = path
    assert main(["launch", *project.launch_arguments("--dry_run")]) == 2
    assert "was imported, not computed" in capfd.readouterr().err


def test_lost_metadata_are_noticed(tree, path, tmp_path):
    store = import_tree(tree, path)
    next((path / "imported" / "metadata").rglob("c/*")).unlink()
    assert [damage.where for damage in verify(store).damage] == ["imported/metadata"]
    with pytest.raises(ExportError, match="import the tree again"):
        exported(store, tmp_path / "again")
