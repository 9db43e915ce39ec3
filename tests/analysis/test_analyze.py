"""The command that writes every analysis, and what it reads beside the store."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

from daskcurv import analysis
from daskcurv.analysis.files import naming
from daskcurv.analysis.given import read_flags, read_scores
from daskcurv.analysis.summary import RANKED, compare_with_known, summarise
from daskcurv.cli import main
from daskcurv.errors import DataError
from daskcurv.experiment.curriculum import Schedule
from daskcurv.storage.read import open_results
from daskcurv.storage.schema import COMPUTED
from tests.support.disks import enlarge, mounted
from tests.support.results import results
from tests.support.stores import CLASSES, IDENTITY, finish, make_store

NAME = "s"
"""Of the fixture's store, which is not of CIFAR-100."""

FIRST_TRAINED = np.array([1, 201, 101, 101, 1])[np.arange(11) % 5]
"""By sample: two classes at first, two more after epoch 100, the last after epoch 200."""


@pytest.fixture
def store(tmp_path: Path) -> Path:
    classes = {"order": list(range(CLASSES)), **Schedule(2, 2, 100).to_dict()}
    identity = {**IDENTITY, "classes": classes, "experiment_index": 3}
    store = make_store(
        tmp_path / "s.zarr", 0, 100, 200, 300,
        identity=identity, attrs={"class_names": list("abcde")},
    )  # fmt: skip
    return finish(store).path


def csl_of(data: xr.Dataset, untrained: bool = False) -> np.ndarray:
    """The sums of losses, by the definition."""
    on = data.status.values == COMPUTED
    if not untrained:
        on &= data.epoch.values[:, None] >= FIRST_TRAINED
    sums = np.where(on, data.loss.values.astype(float), 0).sum(axis=0)
    return np.where(on.any(axis=0), sums, np.nan)


class Definitions:
    """Every variable of a summary, computed in loops over one sample or epoch at a time."""

    def __init__(self, data: xr.Dataset, include_untrained: bool):
        self.data = data
        self.on = data.status.values == COMPUTED
        self.active = self.on.copy()
        if not include_untrained:
            self.on &= data.epoch.values[:, None] > data.first_epoch_active.values
        self.samples = range(data.sizes["sample"])

    def by_sample(self, name: str, number: Callable[[np.ndarray], float]) -> list[float]:
        values = self.data[name].values.astype(float)
        columns = [values[self.on[:, sample], sample] for sample in self.samples]
        return [number(column) if len(column) else np.nan for column in columns]

    def running(self, power: int) -> list[np.ndarray]:
        norms = self.data.grad_norm.values.astype(float) ** power
        columns = [norms[self.on[:, sample], sample] for sample in self.samples]
        return [np.cumsum(column) / np.arange(1, len(column) + 1) for column in columns]

    def tau(self, power: int) -> float:
        return float(np.mean(np.concatenate(self.running(power))))

    def learning_time(self, power: int) -> list[float]:
        tau = self.tau(power)
        return [
            float(np.mean(means >= tau)) if len(means) else np.nan for means in self.running(power)
        ]

    def threshold_learning_time(self) -> list[float]:
        def first(losses: np.ndarray) -> float:
            below = np.flatnonzero(losses <= 0.1)
            return float(below[0]) + 1 if len(below) else np.nan

        return self.by_sample("loss", first)

    def correct(self) -> np.ndarray:
        right = self.data.prediction.values == self.data.label.values
        return np.asarray(self.on & right)

    def forgetting_events(self) -> np.ndarray:
        right = self.correct()
        return np.asarray((right[:-1] & self.on[1:] & ~right[1:]).sum(axis=0))

    def groups(self, name: str, members: list[np.ndarray]) -> np.ndarray:
        values = self.data[name].values.astype(float)
        means = [
            [row[on & member].mean() if (on & member).any() else np.nan
             for row, on in zip(values, self.on, strict=True)]
            for member in members
        ]  # fmt: skip
        return np.array(means)

    def expected(self) -> dict[str, Any]:
        data = self.data
        found: dict[str, Any] = {}
        position, first = data.class_position.values, data.first_epoch_active.values
        members = {
            "class": [position == place for place in np.unique(position)],
            "cohort": [first == start for start in np.unique(first)],
            "split": [data.split.values == part for part in (0, 1)],
        }
        totals = {"loss": "csl", "curvature": "cumulative_curvature",
                  "grad_norm": "cumulative_grad_norm"}  # fmt: skip
        for name, total in totals.items():
            found[total] = self.by_sample(name, np.sum)
            found[f"mean_{name}"] = self.by_sample(name, np.mean)
            found[f"median_{name}"] = self.by_sample(name, np.median)
            for kind, each in members.items():
                found[f"{name}_by_{kind}"] = self.groups(name, each)
            # Old classes are trained throughout; epochs 400, 600, 800 and 1000 are rows 2 to 5.
            trained = Definitions(data, include_untrained=False)
            means = trained.groups(name, members["cohort"])
            found[f"{name}_change"] = means[:, [3, 5]] - means[:, [2, 4]]
        return {
            **found,
            "learning_time": self.learning_time(2),
            "learning_time_plain": self.learning_time(1),
            "threshold_learning_time": self.threshold_learning_time(),
            "forgetting_events": self.forgetting_events(),
            "ever_learned": self.correct().any(axis=0),
            "active_epochs": self.on.sum(axis=0),
            "untrained_epochs": self.active.sum(axis=0) - self.on.sum(axis=0),
        }


@pytest.mark.parametrize("untrained", [False, True], ids=["trained", "all weights"])
def test_every_variable_of_a_summary_is_what_its_name_says(untrained):
    data = results()
    data["loss"] = data.loss - 0.1  # so that some are below 0.1
    data.status[3, 5] = COMPUTED
    found = summarise(data.chunk({"epoch": 2}), include_untrained=untrained)
    definitions = Definitions(data, untrained)
    expected = definitions.expected()
    endings = ("", "_low", "_high", "_samples", "_combined", "_combined_low", "_combined_high")
    correlations = {f"rank_correlation{ending}" for ending in endings}
    assert {*found.data_vars} == {*expected} | correlations
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, rtol=1e-9, err_msg=name)
        assert len(np.unique(found[name])) > 1 or (name == "untrained_epochs" and untrained), name
    assert found.learning_time.attrs["tau"] == pytest.approx(definitions.tau(2))
    assert found.learning_time_plain.attrs["tau"] == pytest.approx(definitions.tau(1))
    known = definitions.on.any(axis=0)
    ranked = np.array([expected[name] for name in RANKED], float)
    for cohort, start in enumerate(found.active_from.values):
        member = known & (data.first_epoch_active.values == start)
        assert found.rank_correlation_samples[cohort] == member.sum()
        if member.sum() > 3:
            correlation = spearmanr(ranked[:, member], axis=1).statistic
            np.testing.assert_allclose(found.rank_correlation[cohort], correlation, atol=1e-12)
    assert (found.rank_correlation_samples > 3).sum() >= 3
    assert found.rank_correlation.measure.values.tolist() == list(RANKED)
    for values in found.values():
        assert "long_name" in values.attrs
        assert {*values.attrs} <= {"long_name", "units", "tau", "samples", "epochs"}
    assert ("whether or not" in found.attrs["epochs"]) == untrained


def test_the_command_writes_a_store_and_the_older_files(store, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["analyze", str(store), str(out)]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "analysis.zarr", f"csl_{NAME}.npy", f"lt_{NAME}.npy", f"metrics_{NAME}.json",
    ]  # fmt: skip
    data = open_results(store)
    written = xr.open_zarr(out / "analysis.zarr").load()
    np.testing.assert_allclose(written.csl, csl_of(data))
    csl = np.load(out / f"csl_{NAME}.npy")
    assert csl.dtype == np.float32
    np.testing.assert_allclose(csl, csl_of(data), rtol=1e-6)
    running, active = {}, data.status.values == COMPUTED
    on = active & (data.epoch.values[:, None] >= FIRST_TRAINED)
    for power in (1, 2):
        norms = [data.grad_norm.values.astype(float)[on[:, i], i] ** power for i in range(11)]
        running[power] = [np.cumsum(own) / np.arange(1, len(own) + 1) for own in norms]
    tau, tau_squared = (np.mean(np.concatenate(running[power])) for power in (1, 2))
    lt = np.load(out / f"lt_{NAME}.npy")
    expected = [float(np.mean(own >= tau)) if len(own) else np.nan for own in running[1]]
    np.testing.assert_allclose(lt, expected, rtol=1e-6)
    metrics = json.loads((out / f"metrics_{NAME}.json").read_text())
    assert metrics["kept_epochs"] == [0, 100, 200, 300]
    assert metrics["losses_shape"] == [4, 11]
    assert metrics["tau"] == pytest.approx(tau)
    assert metrics["tau_squared"] == pytest.approx(tau_squared)
    assert metrics["run_idx"] == 3
    assert metrics["dataset"] is metrics["noise_level"] is None, "the store does not say"
    assert metrics["values_counted"] == on.sum()
    left_out = (active & ~on).sum()
    assert metrics["values_left_out"] == left_out
    assert metrics["epochs_counted"].endswith("trained on the sample's class")
    said = capfd.readouterr().err
    assert f"left out: {left_out} of {on.sum() + left_out} values" in said
    assert "--include_untrained" in said
    assert "classes added at epoch 100 are trained on: from epoch 100 to 200" in said
    assert main(["analyze", str(store), str(out)]) == 2
    assert "out exists" in capfd.readouterr().err


def test_epochs_before_training_on_a_class_count_if_asked_for(store, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["analyze", str(store), str(out), "--include_untrained"]) == 0
    written = xr.open_zarr(out / "analysis.zarr").load()
    np.testing.assert_allclose(written.csl, csl_of(open_results(store), untrained=True))
    assert "left out" not in capfd.readouterr().err
    assert json.loads((out / f"metrics_{NAME}.json").read_text())["values_left_out"] == 0


def test_untrained_weights_count_with_a_warning_if_there_are_no_others(tmp_path, capfd):
    classes = {"order": list(range(CLASSES)), **Schedule(5, 1, 100).to_dict()}
    path = finish(
        make_store(tmp_path / "s.zarr", 0, identity={**IDENTITY, "classes": classes})
    ).path
    with pytest.raises(DataError, match=r"no epoch counts for any sample.*include untrained"):
        summarise(open_results(path))
    assert main(["analyze", str(path), str(tmp_path / "out")]) == 0
    assert "only results of weights that had not been trained" in capfd.readouterr().err
    assert main(["analyze", str(path), str(tmp_path / "asked"), "--include_untrained"]) == 0
    assert "only results of weights" not in capfd.readouterr().err
    written = [xr.open_zarr(tmp_path / name / "analysis.zarr").load() for name in ("out", "asked")]
    xr.testing.assert_identical(*written)


def test_what_a_store_does_not_have_is_not_ranked():
    data = results()
    for name in ("loss", "grad_norm"):
        data[name][:] = np.nan
    data.prediction[:] = -1
    found = summarise(data)
    assert "forgetting_events" not in found
    measures = found.rank_correlation.measure.values.tolist()
    assert measures == ["cumulative_curvature", "mean_curvature", "median_curvature"]
    assert found.rank_correlation_combined.notnull().all()
    marks = np.arange(40) < 20
    compared = compare_with_known(found, marks, np.arange(40.0))
    assert [*compared["auroc"]] == [*compared["agreement"]] == measures
    data["curvature"][:] = np.nan
    with pytest.raises(DataError, match="no sample has results that are numbers"):
        summarise(data)


def names_of(labels: np.ndarray, path: str, **identity: object) -> tuple[str, dict[str, object]]:
    data = xr.Dataset(coords={"label": ("sample", labels)}, attrs={"identity": identity})
    found = naming(data, Path(path))
    return found.suffix, found.fields


def test_only_a_store_of_all_of_cifar_100_has_its_name():
    labels = np.tile(np.arange(100), 500)
    name, fields = names_of(labels, "results/curvature.zarr", experiment_index=2)
    assert name == "cifar100_run2_noise_0.0"
    assert fields == {"dataset": "cifar100", "run_idx": 2, "noise_level": 0.0}
    mislabelled = np.where(np.arange(50_000) == 7, 8, labels)
    others = {"some": labels[:49_900], "flipped": mislabelled, "ten": labels % 10}
    for stem, other in others.items():
        name, fields = names_of(
            other, f"results/{stem}.zarr", experiment_index=2, dataset={"sha256": "ab"}
        )
        assert name == stem
        assert fields == {"dataset": "sha256:ab", "run_idx": 2, "noise_level": None}
    name, fields = names_of(labels, "imported.zarr")
    assert name == "imported", "no run is recorded"
    assert fields == {"dataset": None, "run_idx": None, "noise_level": None}


def test_earlier_epochs_can_be_left_out(store, tmp_path, capfd):
    out = tmp_path / "out"
    assert main(["analyze", str(store), str(out), "--start_epoch", "150"]) == 0
    written = xr.open_zarr(out / "analysis.zarr").load()
    np.testing.assert_allclose(written.csl, csl_of(open_results(store).sel(epoch=[200, 300])))
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
    assert "flagged.npy flags 3 of 11 samples; 2 of these have results" in said
    assert "csl finds flagged samples: AUROC within cohorts" in said
    assert "csl agrees with" in said
    assert "on 8 samples: Spearman within cohorts" in said
    metrics = json.loads((tmp_path / "out" / f"metrics_{NAME}.json").read_text())
    summary = summarise(open_results(store))
    flagged = np.isin(np.arange(11), [1, 4, 6])
    area = analysis.auroc(summary.csl, flagged)
    assert metrics["auroc"]["csl"]["area"] == pytest.approx(area)
    low, high = metrics["auroc"]["csl"]["interval"]
    assert low <= area <= high
    assert metrics["auroc"]["csl"]["within_cohorts"]["area"] is None  # no pair of one cohort
    assert metrics["agreement"]["csl"]["samples"] == 8  # one is never active
    scores = np.where(np.arange(11) < 9, np.arange(11) + 0.5, np.nan)
    expected = compare_with_known(summary, scores=scores)["agreement"]["cumulative_curvature"][
        "spearman"
    ]
    assert metrics["agreement"]["cumulative_curvature"]["spearman"] == pytest.approx(expected)


def test_flagged_samples_are_compared_with_those_of_their_cohort(store):
    summary = summarise(open_results(store))
    values, cohort = summary.csl.values, summary.first_epoch_active.values
    flagged = np.arange(11) % 3 == 0
    known = summary.active_epochs.values > 0
    wins = [
        float(values[i] > values[j]) + (values[i] == values[j]) / 2
        for i in np.flatnonzero(flagged & known)
        for j in np.flatnonzero(~flagged & known)
        if cohort[i] == cohort[j]
    ]
    found = compare_with_known(summary, flagged)["auroc"]["csl"]["within_cohorts"]
    assert len(wins) > 3
    assert found["area"] == pytest.approx(np.mean(wins))
    assert found["interval"][0] <= found["area"] <= found["interval"][1]


def test_every_figure_of_a_comparison_is_what_its_name_says():
    summary = summarise(results())
    generator = np.random.default_rng(3)
    known = summary.active_epochs.values > 0
    flagged = generator.random(40) < 0.3
    flagged[~known] = True
    scores = summary.csl.values + generator.normal(size=40)
    scores[11] = np.nan
    found = compare_with_known(summary, flagged, scores)
    assert {*found} == {"flagged", "flagged_with_results", "auroc", "agreement"}
    assert found["flagged"] == flagged.sum()
    assert found["flagged_with_results"] == (flagged & known).sum() < flagged.sum()
    assert [*found["auroc"]] == [*found["agreement"]] == list(RANKED)
    cohort = summary.first_epoch_active.values
    for name in RANKED:
        values = np.where(known, summary[name].values.astype(float), np.nan)
        area = found["auroc"][name]
        for groups, figures in ((np.zeros(40), area), (cohort, area["within_cohorts"])):
            wins = [
                float(values[i] > values[j]) + (values[i] == values[j]) / 2
                for i in np.flatnonzero(flagged & known)
                for j in np.flatnonzero(~flagged & known)
                if groups[i] == groups[j]
            ]
            assert figures["area"] == pytest.approx(np.mean(wins)), name
            assert figures["interval"] == analysis.auroc_interval(values, flagged, groups), name
        both = known & ~np.isnan(scores)
        agreed = found["agreement"][name]
        assert agreed["samples"] == both.sum()
        expected = spearmanr(values[both], scores[both]).statistic
        assert agreed["spearman"] == pytest.approx(expected), name
        assert agreed["pearson"] == pytest.approx(np.corrcoef(values[both], scores[both])[0, 1])
        starts, z, weights = np.unique(cohort[known]), [], []
        within = agreed["within_cohorts"]
        ours = [one for one in within["cohorts"] if one["samples"]]
        for one, start in zip(ours, starts, strict=True):
            member = both & (cohort == start)
            assert (one["active_from"], one["samples"]) == (start, member.sum())
            rho = spearmanr(values[member], scores[member]).statistic
            assert one["spearman"] == pytest.approx(rho), name
            # Bonett & Wright (2000).
            half = 1.959964 * np.sqrt((1 + rho**2 / 2) / (member.sum() - 3))
            interval = np.tanh([np.arctanh(rho) - half, np.arctanh(rho) + half])
            np.testing.assert_allclose(one["interval"], interval, atol=1e-6, err_msg=name)
            z.append(np.arctanh(rho))
            weights.append(member.sum() - 3)
        rho = np.tanh(np.array(z))
        mean = np.average(z, weights=weights)
        half = 1.959964 * np.sqrt(np.dot(weights, 1 + rho**2 / 2)) / np.sum(weights)
        assert within["spearman"] == pytest.approx(np.tanh(mean)), name
        interval = np.tanh([mean - half, mean + half])
        np.testing.assert_allclose(within["interval"], interval, atol=1e-6, err_msg=name)


def test_an_output_that_cannot_be_written_is_refused_first(store, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("daskcurv.analysis.summary.summarise", None)
    (tmp_path / "file").write_text("")
    assert main(["analyze", str(store), str(tmp_path / "file" / "out")]) == 2
    assert f"cannot write {tmp_path / 'file' / 'out'}: " in capfd.readouterr().err


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
        ("a.npy", np.array([1, 0]), [True, True, False, False]),
        ("a.csv", "flag\n1\n0\n0\n1\n", [True, False, False, True]),
        ("a.csv", "2\n", [False, False, True, False]),
        ("a.csv", "2.000e+00\n1.000e+00\n", [False, True, True, False]),
    ],
)
def test_flags_are_read(tmp_path, name, content, expected):
    write(tmp_path / name, content)
    assert read_flags(tmp_path / name, 4).tolist() == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.array([3, 9]), "has 9 among the numbers of samples; expected integers from 0"),
        ("a.npy", np.array([-1]), "has -1 among"),
        ("a.npy", np.array([1.5, 2]), "has 1.5 among"),
        ("a.npy", np.array([1, np.nan]), "has nan among"),
        ("a.npy", np.array([3, 2, 3]), "sample 3 more than once"),
        ("a.npy", np.array([0, 1, 0]), "3 numbers, sample 0 more than once.*mask.* has 4"),
        ("a.npy", np.array([0, 1, 0, 0, 1]), "5 numbers, sample 0 more than once.*mask.* has 4"),
        ("a.csv", "flag\n1\n0\n0\n", "3 numbers, sample 0 more than once.*mask.* has 4"),
        ("a.npy", np.array([True, False, True]), "is a mask of 3 samples; expected .4,. of 1"),
        ("a.npy", np.zeros(4, bool), "flags no sample"),
        ("a.npy", np.zeros(4, int), "flags no sample"),
        ("a.npy", np.array([], int), "flags no sample"),
        ("a.csv", "flag\n", "cannot be read .it has no numbers"),
        ("a.npy", np.ones(4, int), "flags all 4 samples"),
        ("a.npy", np.array([3, 2, 1, 0]), "flags all 4 samples"),
        ("a.npy", np.zeros((4, 1)), r"has shape \(4, 1\)"),
    ],
)
def test_flags_that_do_not_fit_are_refused(tmp_path, name, content, message):
    write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_flags(tmp_path / name, 4)


def test_flagged_samples_without_results_cannot_be_told_apart(store, tmp_path, capfd):
    np.save(tmp_path / "flagged.npy", np.array([4, 9]))  # of a class that arrives at 400
    arguments = ["analyze", str(store), str(tmp_path / "out"), "--flagged"]
    assert main([*arguments, str(tmp_path / "flagged.npy")]) == 2
    assert "none of the 9 samples that have results are flagged" in capfd.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_commands_refuse_a_mask_of_the_wrong_length(store, tmp_path, capfd):
    np.save(tmp_path / "flagged.npy", np.arange(10) % 2)
    arguments = ["analyze", str(store), str(tmp_path / "out"), "--flagged"]
    assert main([*arguments, str(tmp_path / "flagged.npy")]) == 2
    said = capfd.readouterr().err
    assert "flagged.npy has 10 numbers, sample 0 more than once" in said
    assert "a mask of 1 and 0 has 11 of them" in said


def write(path: Path, content: str | np.ndarray) -> None:
    if isinstance(content, str):
        path.write_text(content)
    else:
        np.save(path, content, allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.npy", np.array([0.5, 1, np.nan, 2]), [0.5, 1, np.nan, 2]),
        ("a.npy", np.array([True, False, False, True]), [1, 0, 0, 1]),
        ("a.csv", "0.5\nnan\n1\n2\n", [0.5, np.nan, 1, 2]),
        ("a.csv", "1e-05\n2\n1\n2\n", [1e-5, 2, 1, 2]),
        ("a.csv", "sample, score\n3, 0.5\n0, 1\n", [1, np.nan, np.nan, 0.5]),
    ],
)
def test_scores_are_read(tmp_path, name, content, expected):
    write(tmp_path / name, content)
    np.testing.assert_array_equal(read_scores(tmp_path / name, 4), expected)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", np.arange(5.0), r"shape \(5,\).*expected \(4,\)"),
        ("a.npy", np.array([{}]), "cannot be read"),
        ("a.csv", "", "cannot be read"),
        ("a.csv", "1\n2,3\n", "cannot be read"),
        ("a.csv", "x\ny\n", "cannot be read"),
        ("a.csv", "x,1\n2,3\n", "cannot be read"),
        ("a.csv", "7,1\n", "has 7 among the numbers of samples"),
        ("a.csv", "0.5,1\n", "has 0.5 among the numbers of samples"),
        ("a.csv", "2,1\n2,3\n", "sample 2 more than once"),
        ("a.npy", np.array([1, np.inf, 2, 3]), "infinite score for sample 1"),
        ("a.npy", np.full(4, np.nan), "no two different scores"),
        ("a.npy", np.full(4, 0.5), "no two different scores"),
        ("missing.npy", "", "cannot be read"),
    ],
)
def test_scores_that_do_not_fit_are_refused(tmp_path, name, content, message):
    if not name.startswith("missing"):
        write(tmp_path / name, content)
    with pytest.raises(DataError, match=message):
        read_scores(tmp_path / name, 4)


@pytest.mark.parametrize(
    ("samples", "message"), [("8,1234,8", "samples has 8 more than once"), ("8,,9", "expected num")]
)
def test_samples_to_show_are_named_once(store, tmp_path, capfd, samples, message):
    out = str(tmp_path / "r.html")
    assert main(["report", str(store), "-o", out, "--samples", samples]) == 2
    assert message in capfd.readouterr().err
