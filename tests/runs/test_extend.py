"""Raising the number of probes of a store that is there."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

from daskcurv.errors import StoreError
from daskcurv.measures import MEASURES
from daskcurv.runs.accounts.run_file import read_run_file
from daskcurv.runs.extend import change_places, larger_store, recover, smaller_store
from daskcurv.storage import ResultsStore, launcher_lock
from daskcurv.storage.read import open_results
from tests.support.project import Project
from tests.support.stores import IDENTITY, make_store

DIRECT = ["--method", "finite-difference", "--block_size", "20", "--workers", "1"]


def values(store: Path) -> xr.Dataset:
    return open_results(store)[[variable.name for variable in MEASURES]].load()


def launch(project: Project, *extra: str) -> str:
    run = project.launch(*DIRECT, *extra)
    assert run.returncode == 0, run.stdout
    return run.stdout


def assert_as_if_fresh(project: Project, n_probes: int) -> None:
    """Compare with a run that had all probes from the start.

    A mean of stored float32 means is off by their rounding.
    """
    fresh = project.root / "fresh.zarr"
    launch(project, "--n_probes", str(n_probes), "--store", str(fresh), "--no_export")
    ours, theirs = values(project.store), values(fresh)
    for name in ("loss", "grad_norm", "prediction"):
        np.testing.assert_array_equal(ours[name], theirs[name])
    for name in ("curvature", "curvature_sq"):
        np.testing.assert_allclose(ours[name], theirs[name], rtol=5e-7)
    size = np.abs(theirs.directional_eig).max().item()
    np.testing.assert_allclose(ours.directional_eig, theirs.directional_eig, atol=5e-7 * size)


def test_added_probes_give_what_a_fresh_run_with_all_of_them_gives(project):
    launch(project)
    before = values(project.store)
    assert "adding probes 3 to 5 to each sample" in launch(project, "--n_probes", "5")
    assert ResultsStore.open(project.store).identity["estimator"]["n_probes"] == 5
    assert not np.array_equal(values(project.store).curvature, before.curvature, equal_nan=True)
    assert_as_if_fresh(project, 5)

    # The export follows, and nothing else is left.
    metadata = json.loads((project.tree / "epoch_0001" / "metadata.json").read_text())
    assert metadata["identity"]["estimator"]["n_probes"] == 5
    exported = np.load(project.tree / "epoch_0001" / "per_image_curvature.npy")
    np.testing.assert_array_equal(exported, values(project.store).curvature.sel(epoch=1))
    left = {path.name for path in project.root.iterdir() if path.name.startswith("curvature")}
    beside = {f"curvature.zarr.{what}" for what in ("inputs", "run.json", "run.yaml")}
    assert left == {"curvature.zarr", *beside}
    settings = read_run_file(project.root / "curvature.zarr.run.yaml")
    assert (settings["store"], settings["n_probes"]) == (project.store, 5)


def test_a_launcher_killed_while_it_adds_probes_goes_on_and_loses_nothing(project):
    launch(project)
    before = values(project.store)
    running = project.start("launch", *project.launch_arguments(*DIRECT, "--n_probes", "4"))
    larger = project.root / "curvature.zarr.4-probes"
    deadline = time.monotonic() + 60
    while not list(larger.glob("status/c/*/*")):
        assert time.monotonic() < deadline
        assert running.poll() is None
        time.sleep(0.02)
    os.killpg(running.pid, signal.SIGKILL)
    running.communicate()

    # What was there is still there, and the next launch takes up what was added.
    xr.testing.assert_identical(values(project.store), before)
    kept = {path: path.stat().st_mtime_ns for path in larger.glob("status/c/*/*")}
    assert len(kept) < 12
    launch(project, "--n_probes", "4")
    for path, written in kept.items():
        moved = project.store / path.relative_to(larger)
        assert moved.stat().st_mtime_ns == written
    assert_as_if_fresh(project, 4)


def with_probes(count: int) -> dict[str, Any]:
    identity: dict[str, Any] = IDENTITY
    return {**identity, "estimator": {**identity["estimator"], "n_probes": count}}


def test_only_a_store_that_differs_in_too_few_probes_is_added_to(tmp_path):
    assert smaller_store(tmp_path / "s", with_probes(20)) is None
    make_store(tmp_path / "s", 0)
    assert smaller_store(tmp_path / "s", with_probes(20)) is not None
    assert smaller_store(tmp_path / "s", with_probes(10)) is None
    assert smaller_store(tmp_path / "s", with_probes(5)) is None
    assert smaller_store(tmp_path / "s", {**with_probes(20), "head": "active"}) is None


def test_epochs_that_would_be_lost_are_named(tmp_path):
    store = make_store(tmp_path / "s", 0, 100, 200)
    assert larger_store(store, 20, [0, 100, 200, 300]) == tmp_path / "s.20-probes"
    with pytest.raises(StoreError, match="epochs 100, 200, which this launch does not include"):
        larger_store(store, 20, [0])


def test_fewer_probes_than_the_store_has_are_refused(project, dry_launch, capsys):
    launch(project)
    assert dry_launch(*DIRECT, "--n_probes", "1") == 2
    assert "estimator.n_probes: the store has 2, this run has 1" in capsys.readouterr().err


def test_a_dry_run_says_what_would_be_added_and_makes_nothing(project, dry_launch, capsys):
    launch(project)
    before = sorted(path.name for path in project.root.iterdir())
    assert dry_launch(*DIRECT, "--n_probes", "3") == 0
    printed = capsys.readouterr().err
    assert "adding probes 3 to 3" in printed
    assert "to do: 4 epochs, 12 blocks" in printed
    assert sorted(path.name for path in project.root.iterdir()) == before


def test_a_launcher_killed_between_the_two_renames_leaves_a_store_to_go_on_with(tmp_path):
    make_store(tmp_path / "s", 0)
    make_store(tmp_path / "s.20-probes", 0, 100)
    os.rename(tmp_path / "s", tmp_path / "s.fewer-probes")
    recover(tmp_path / "s")
    assert list(ResultsStore.open(tmp_path / "s").rows) == [0]
    with launcher_lock(tmp_path / "s") as lock:
        lock.cover(tmp_path / "s.20-probes")
        change_places(tmp_path / "s", tmp_path / "s.20-probes", lock)
        assert lock.held
    assert list(ResultsStore.open(tmp_path / "s").rows) == [0, 100]
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
    recover(tmp_path / "s")
    assert list(ResultsStore.open(tmp_path / "s").rows) == [0, 100]
