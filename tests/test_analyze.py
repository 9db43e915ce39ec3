"""The command that writes every analysis, and what it reads beside the store."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from daskcurv import analysis
from daskcurv.analysis.summary import RANKED, compare, read_flags, read_scores, summarise
from daskcurv.cli import main
from daskcurv.errors import DataError
from daskcurv.storage import open_results
from tests.conftest import enlarge, mounted
from tests.test_analysis import results
from tests.test_store import finish, make_store

NAME = "cifar100_run0_noise_0.0"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    store = make_store(tmp_path / "s.zarr", 0, 100, 200, 300, attrs={"class_names": list("abcde")})
    return finish(store).path


def test_a_summary_has_every_analysis():
    data = results()
    found = summarise(data.chunk({"epoch": 2}))
    pairs = {
        "csl": analysis.cumulative(data, "loss"),
        "mean_curvature": analysis.mean_over_active_epochs(data, "curvature"),
        "learning_time_plain": analysis.learning_time(data, "plain"),
        "forgetting_events": analysis.forgetting_events(data).forgetting_events,
        "curvature_by_class": analysis.by_class(data, "curvature"),
        "grad_norm_by_cohort": analysis.by_cohort(data, "grad_norm"),
        "loss_by_split": analysis.by_split(data, "loss"),
        "curvature_change": analysis.boundary_changes(data, "curvature"),
    }
    for name, expected in pairs.items():
        np.testing.assert_allclose(found[name], expected, err_msg=name)
    assert found.rank_correlation.measure.values.tolist() == list(RANKED)
    for values in found.values():
        assert {"long_name"} <= values.attrs.keys() <= {"long_name", "units", "tau", "samples"}


def test_the_command_writes_a_store_and_the_older_files(store, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["analyze", str(store), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "analysis.zarr", f"csl_{NAME}.npy", f"lt_{NAME}.npy", f"metrics_{NAME}.json",
    ]  # fmt: skip
    data = open_results(store)
    written = xr.open_zarr(out / "analysis.zarr").load()
    xr.testing.assert_allclose(written.csl, analysis.cumulative(data, "loss"))
    csl = np.load(out / f"csl_{NAME}.npy")
    assert csl.dtype == np.float32
    np.testing.assert_allclose(csl, written.csl, rtol=1e-6)
    lt = np.load(out / f"lt_{NAME}.npy")
    np.testing.assert_allclose(lt, analysis.learning_time(data, "plain"), rtol=1e-6)
    metrics = json.loads((out / f"metrics_{NAME}.json").read_text())
    assert metrics["kept_epochs"] == [0, 100, 200, 300]
    assert metrics["losses_shape"] == [4, 11]
    assert metrics["tau"] == pytest.approx(written.learning_time_plain.attrs["tau"])
    assert main(["analyze", str(store), str(out)]) == 2
    assert "out exists" in capfd.readouterr().err


def test_earlier_epochs_can_be_left_out(store, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["analyze", str(store), str(out), "--start_epoch", "150"]) == 0
    data = open_results(store).sel(epoch=[200, 300])
    written = xr.open_zarr(out / "analysis.zarr").load()
    xr.testing.assert_allclose(written.csl, analysis.cumulative(data, "loss"))
    metrics = json.loads((out / f"metrics_{NAME}.json").read_text())
    assert metrics["kept_epochs"] == [200, 300]
    assert main(["analyze", str(store), str(tmp_path / "no"), "--start_epoch", "301"]) == 2
    assert "--start_epoch 301 leaves no epoch: the last of" in capfd.readouterr().err
    assert not (tmp_path / "no").exists()


def test_flags_and_scores_are_held_against_the_results(store, tmp_path, capfd):
    np.save(tmp_path / "flagged.npy", np.array([1, 4, 6]))
    (tmp_path / "scores.csv").write_text(
        "sample,score\n" + "".join(f"{i},{i}.5\n" for i in range(9))
    )
    arguments = [
        "--flagged",
        str(tmp_path / "flagged.npy"),
        "--compare",
        str(tmp_path / "scores.csv"),
    ]
    assert main(["analyze", str(store), str(tmp_path / "out"), *arguments]) == 0
    said = capfd.readouterr().err
    assert "csl finds flagged samples: AUROC" in said
    metrics = json.loads((tmp_path / "out" / f"metrics_{NAME}.json").read_text())
    summary = summarise(open_results(store))
    flagged = np.isin(np.arange(11), [1, 4, 6])
    area = analysis.auroc(summary.csl, flagged)
    assert metrics["auroc"]["csl"]["area"] == pytest.approx(area)
    low, high = metrics["auroc"]["csl"]["interval"]
    assert low <= area <= high
    assert metrics["agreement"]["csl"]["samples"] == 8  # one is never active
    scores = np.where(np.arange(11) < 9, np.arange(11) + 0.5, np.nan)
    expected = compare(summary, scores=scores)["agreement"]["cumulative_curvature"]["spearman"]
    assert metrics["agreement"]["cumulative_curvature"]["spearman"] == pytest.approx(expected)


def test_an_unfinished_store_is_refused(tmp_path, capfd):
    store = make_store(tmp_path / "s.zarr", 0)
    assert main(["analyze", str(store.path), str(tmp_path / "out")]) == 2
    assert "unfinished epochs [0]" in capfd.readouterr().err


def test_a_full_disk_ends_it_with_a_message(store, tmp_path, capfd):
    with mounted(tmp_path / "disk", "40k") as disk:
        assert main(["analyze", str(store), str(disk / "out")]) == 2
        assert "No space left on device" in capfd.readouterr().err
        assert list(disk.iterdir()) == []
        enlarge(disk)
        assert main(["analyze", str(store), str(disk / "out")]) == 0


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npy", np.array([0, 1, 1, 0]), [False, True, True, False]),
        ("a.npy", np.array([True, False, False, True]), [True, False, False, True]),
        ("a.npy", np.array([3, 1]), [False, True, False, True]),
        ("a.csv", "flag\n1\n0\n0\n1\n", [True, False, False, True]),
        ("a.csv", "2\n", [False, False, True, False]),
    ],
)
def test_flags_are_read(tmp_path, name, content, expected):
    write(tmp_path / name, content)
    assert read_flags(tmp_path / name, 4).tolist() == expected


def write(path: Path, content: str | np.ndarray) -> None:
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npy", np.array([0.5, 1, np.nan, 2]), [0.5, 1, np.nan, 2]),
        ("a.csv", "0.5\nnan\n1\n2\n", [0.5, np.nan, 1, 2]),
        ("a.csv", "sample,score\n3,0.5\n0,1\n", [1, np.nan, np.nan, 0.5]),
    ],
)
def test_scores_are_read(tmp_path, name, content, expected):
    write(tmp_path / name, content)
    np.testing.assert_array_equal(read_scores(tmp_path / name, 4), expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.zeros(5), r"shape \(5,\).*expected \(4,\)"),
        ("a.npy", np.array([{}]), "cannot be read"),
        ("a.csv", "", "cannot be read"),
        ("a.csv", "1\n2,3\n", "cannot be read"),
        ("a.csv", "x\ny\n", "cannot be read"),
        ("a.csv", "7,1\n", "samples other than 0 to 3"),
        ("missing.npy", "", "cannot be read"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, name, content, message):
    if not name.startswith("missing"):
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / name, 4)


def test_flags_that_are_not_of_samples_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.array([3, 9]))
    with pytest.raises(DataError, match="numbers that are not of samples"):
        read_flags(tmp_path / "a.npy", 4)
