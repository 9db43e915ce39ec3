"""A store of format 1, made by version 0.1.0, serves as it did; its files are in tests/data."""

from __future__ import annotations

import filecmp
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import zarr

from daskcurv.cli import main
from daskcurv.measures import FORMAT_1
from daskcurv.storage import ResultsStore
from daskcurv.storage.read import open_results
from tests.support.project import REPOSITORY, Project

NAMES = ["curvature", "curvature_sq", "directional_eig", "loss", "grad_norm", "prediction"]
LAUNCH = [
    "--data_path", "cifar-100-python", "--model_dir", "model_parameters",
    "--store", "curvature.zarr", "--save_base_dir", "tree", "--class_order", "regenerate",
    "--initial_classes", "4", "--class_increment", "4", "--class_frequency", "2",
    "--validation_per_class", "1", "--n_probes", "4", "--batch_size", "8", "--block_size", "16",
    "--workers", "1",
]  # fmt: skip


@pytest.fixture
def old(tmp_path, monkeypatch):
    """The directory of the older version's files, which is also the current one."""
    with tarfile.open(REPOSITORY / "tests/data/format1/format1.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def files_in(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def assert_same_tree(found: Path, expected: Path) -> None:
    assert files_in(found).keys() == files_in(expected).keys()
    for name, content in files_in(expected).items():
        assert (found / name).read_bytes() == content, name


@pytest.mark.parametrize("store", ["curvature.zarr", "compact.zarr", "imported.zarr"])
def test_it_is_opened_and_holds_the_six_measures(old, store):
    assert [measure.name for measure in ResultsStore.open(old / store).measures] == NAMES
    results = open_results(old / store)
    for name in NAMES:
        stored = zarr.open_array(old / store / name, mode="r")
        np.testing.assert_array_equal(results[name], stored[:])  # its epochs are in order
        assert results[name].dtype == stored.dtype
        measure = next(m for m in FORMAT_1 if m.name == name)
        assert measure.dtype == stored.dtype
        np.testing.assert_array_equal(measure.fill, stored.fill_value)
        assert measure.attrs() == stored.attrs.asdict()


@pytest.mark.parametrize("store", ["curvature.zarr", "compact.zarr", "imported.zarr"])
def test_it_is_verified(old, store):
    assert main(["verify", store]) == 0
    digests = old / store / "integrity" / "block_digest"
    damaged = next(path for path in digests.rglob("c/**/*") if path.is_file())
    content = damaged.read_bytes()
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert main(["verify", store]) == 1


def test_it_is_exported_to_the_same_bytes(old):
    assert main(["export_npy", "curvature.zarr", "again"]) == 0
    assert_same_tree(old / "again", old / "tree")
    assert main(["export_npy", "imported.zarr", "imported"]) == 0
    assert_same_tree(old / "imported", old / "tree")
    assert main(["export", "curvature.zarr", "again.csv"]) == 0
    assert filecmp.cmp(old / "again.csv", old / "table.csv", shallow=False)


def test_it_is_compacted_to_the_same_bytes(old):
    assert main(["compact", "curvature.zarr", "again.zarr"]) == 0
    again, before = files_in(old / "again.zarr"), files_in(old / "compact.zarr")
    # Chunks of a shard are written in any order.
    arrays = {name for name in before if "/c/" in name}
    assert {name: again[name] for name in again.keys() - arrays} == {
        name: before[name] for name in before.keys() - arrays
    }
    left, right = (zarr.open_group(old / name, mode="r") for name in ("again.zarr", "compact.zarr"))
    for name in NAMES:
        for layout in (name, f"by_sample/{name}"):
            a, b = (np.asarray(group.get(layout)) for group in (left, right))
            np.testing.assert_array_equal(a, b)


def test_it_is_reported_on(old):
    assert main(["report", "curvature.zarr", "-o", "report.html"]) == 0
    assert "curvature" in (old / "report.html").read_text()


def test_it_is_continued_and_stays_of_its_format(old):
    before = files_in(old / "curvature.zarr")
    run = Project(old).run("launch", *LAUNCH, "--epochs", "all")
    assert run.returncode == 0, run.stdout
    results = open_results(old / "curvature.zarr", incomplete="raise").load()
    assert results.epoch.values.tolist() == [0, 1, 2, 4]
    assert (results.status.sel(epoch=4) == 1).all()
    assert np.isfinite(results.curvature.sel(epoch=4)).all()
    after = files_in(old / "curvature.zarr")
    per_sample = (*NAMES, "status")
    blocks = [name for name in before if "/c/" in name and name.split("/c/")[0] in per_sample]
    assert len(blocks) == 7 * 3 * 3
    for name in blocks:
        assert after[name] == before[name]
    # What describes the store has one epoch more, and is otherwise what it was.
    was, now = (json.loads(files["zarr.json"]) for files in (before, after))
    assert now["attributes"] == {**was["attributes"], "epochs": [0, 1, 2, 4]}
    for node in now["consolidated_metadata"]["metadata"].values():
        if node.get("dimension_names", [""])[0] == "epoch":
            node["shape"][0] -= 1
    assert now["consolidated_metadata"] == was["consolidated_metadata"]
    assert main(["verify", "curvature.zarr"]) == 0
