"""The page of pictures, on the demo's store and on those with less in them."""

from __future__ import annotations

import base64
import html
import itertools
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr
import zarr
from matplotlib.image import imread
from scipy.stats import binom, spearmanr

from daskcurv import open_results
from daskcurv.cli import main
from daskcurv.demo import demo_options
from daskcurv.errors import StoreError
from daskcurv.report import findings as gathering
from daskcurv.report.figures import FIGURES
from daskcurv.report.findings import choose, gather
from daskcurv.report.galleries import OVERALL, PER_CLASS, PICTURE
from daskcurv.report.statements import definition
from daskcurv.storage import ResultsStore
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.finite import note_epochs
from tests.support.builders import write_checkpoints, write_cifar
from tests.support.launches import assert_ok
from tests.support.project import Project
from tests.support.reports import Made
from tests.support.stores import chunk

# Writes into the page, once it is loaded, what a reader would see of it.
LOOK = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(i => [i.id, i.complete, i.naturalWidth, i.offsetWidth]);
  const fetched = performance.getEntriesByType("resource").map(e => e.name);
  const found = document.createElement("pre");
  found.id = "seen";
  found.textContent = JSON.stringify({images, fetched, width: document.body.scrollWidth});
  document.body.append(found);
});
</script>"""


@pytest.fixture(scope="module")
def made(
    demo: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path, Path]:
    """The demo's store, the page that reports on it, and the directory of its figures."""
    options = demo_options(demo[0] / "demo")
    out = tmp_path_factory.mktemp("report")
    arguments = ("--data_path", str(options.data_path), "--figures", str(out / "figures"))
    code = main(
        ["report", str(options.store), "-o", str(out / "report.html"), *arguments,
         "--samples", "8,1234"]
    )  # fmt: skip
    assert code == 0
    return options.store, out / "report.html", out / "figures"


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A small run of epochs 0, 1, 2 and 4, finished and exported."""
    project = Project(tmp_path_factory.mktemp("launched"))
    write_cifar(project.data)
    write_checkpoints(project.models, [0, 1, 2, 4])
    assert_ok(project.launch("--block_size", "10"))
    return project


@pytest.fixture
def small(launched: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ResultsStore:
    """Its store, to be spoiled; the working directory has no data set."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(launched.store, tmp_path / "small.zarr")
    return ResultsStore.open(tmp_path / "small.zarr")


@pytest.fixture
def browser() -> str:
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if found := shutil.which(name):
            return found
    text = "no Chromium found; .ci/run says what to install"
    return (pytest.fail if "CI" in os.environ else pytest.skip)(text)


def test_a_browser_shows_every_picture_and_fetches_nothing(made, browser, tmp_path):
    text = made[1].read_text()
    assert text.count("default-src 'none'") == 1
    watched = text.replace("default-src 'none'", "default-src 'none'; script-src 'unsafe-inline'")
    copy = tmp_path / "watched.html"
    copy.write_text(watched.replace("</body>", LOOK + "</body>"))
    command = [
        browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/user",
        "--window-size=1100,900", "--virtual-time-budget=20000", "--dump-dom", copy.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout)
    assert found is not None, done.stderr
    seen = json.loads(found[1])
    assert [name for name, *_ in seen["images"] if name] == [*FIGURES]
    assert len(seen["images"]) == len(FIGURES) + 2 * OVERALL + 10 * 2 * PER_CLASS
    for name, complete, natural, shown in seen["images"]:
        assert complete, name
        assert natural >= 32, name
        assert shown >= 32, name
    assert not [address for address in seen["fetched"] if not address.startswith("data:")]
    assert seen["width"] <= 1100, "it has to be scrolled sideways"


def test_the_page_refers_to_nothing_outside(made):
    text = made[1].read_text()
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert sources
    assert all(source.startswith("data:image/") for source in sources)
    assert "@import" not in text
    assert "url(" not in text


def rows(text: str, heading: str) -> list[list[str]]:
    """The first table of a section of the page, cell by cell."""
    section = text[text.index(f"<h2>{heading}</h2>") :]
    table = section[section.index("<table") : section.index("</table>")]
    found = re.findall(r"<tr>(.*?)</tr>", table, re.DOTALL)
    return [[html.unescape(c) for c in re.findall(r"<t[hd]>(.*?)</t[hd]>", row)] for row in found]


@pytest.fixture(scope="module")
def raw(made: tuple[Path, Path, Path]) -> SimpleNamespace:
    """What the store of the demo holds, as arrays; means by definition over epochs trained on."""
    group = zarr.open_group(made[0], mode="r")
    names = ("curvature", "loss", "curvature_sq", "first_epoch_active", "split", "status", "epoch")
    found = SimpleNamespace(**{name: np.asarray(group[name]) for name in names})
    found.trained = found.epoch[:, None] > found.first_epoch_active
    for name in ("curvature", "loss"):
        values = getattr(found, name).astype(np.float64)
        mean = np.nanmean(np.where(found.trained, values, np.nan), axis=0)
        setattr(found, f"mean_{name}", mean)
    return found


def test_the_page_says_what_was_run(made, raw):
    store, page, _ = made
    text = page.read_text()
    dataset = open_results(store).load()
    run = dict(rows(text, "What was run"))
    assert run["fingerprint"] == dataset.attrs["fingerprint"]
    assert identity_of(dataset)["dataset"]["sha256"] in run["data set"]
    assert "n_probes 10" in run["estimator"]
    assert run["epochs"] == "13, of which 13 are complete"
    for epoch in (0, 12):
        sha256 = dataset.checkpoint_sha256.sel(epoch=epoch).item()
        assert f"index-0_epoch-{epoch}.pt (sha256 {sha256})" in run["weights"]
    count = 7 * 1797 + 6 * int((raw.first_epoch_active == 0).sum())
    assert run["samples"] == f"1,797; {count:,} (epoch, sample) values"
    rate = count / float(dataset.compute_seconds.sum())
    assert run["throughput"].startswith(f"{rate:,.1f} samples/s per worker, ")
    left_out = f"1,797 of {count:,} (epoch, sample) values, at epochs 0 and 6, are of weights"
    assert left_out in text
    assert "Not in this store" not in text


def test_the_correlation_of_curvature_and_loss_is_within_cohorts(made, raw):
    _, *found, combined = rows(made[1].read_text(), "Curvature and loss")
    z, weights = [], []
    for epoch, (cohort, count, estimate) in zip((0, 6), found, strict=True):
        member = raw.first_epoch_active == epoch
        assert (cohort, count) == (f"added at epoch {epoch}", f"{member.sum():,}")
        rho = spearmanr(raw.mean_curvature[member], raw.mean_loss[member]).statistic
        z.append(np.arctanh(rho))
        weights.append(member.sum() - 3)
        half = 1.959964 * np.sqrt((1 + rho**2 / 2) / weights[-1])
        low, high = np.tanh(z[-1] - half), np.tanh(z[-1] + half)
        assert estimate == f"{rho:.3f} ({low:.3f} to {high:.3f})"
        assert rho > 0.85
    assert combined[:2] == ["cohorts combined", "1,797"]
    assert combined[2].startswith(f"{np.tanh(np.average(z, weights=weights)):.3f} (")


def test_held_out_samples_are_compared_with_the_trained_ones_of_their_cohort(made, raw):
    _, *found = rows(made[1].read_text(), "Trained on and held out")
    assert len(found) == 4
    expected = itertools.product((0, 6), (0, 1))
    for (epoch, part), (cohort, name, count, *estimates) in zip(expected, found, strict=True):
        assert (cohort, name) == (f"added at epoch {epoch}", ("trained", "held out")[part])
        member = (raw.first_epoch_active == epoch) & (raw.split == part)
        assert count == f"{member.sum():,}"
        for estimate, means in zip(estimates, (raw.mean_curvature, raw.mean_loss), strict=True):
            values = np.sort(means[member])
            # The largest number of samples to leave out on either side.
            out = int(binom.ppf(0.025, len(values), 0.5)) - 1
            low, high = values[out], values[-1 - out]
            assert estimate == f"{np.median(values):#.3g} ({low:#.3g} to {high:#.3g})"


def test_the_sampling_error_of_each_cohort_is_its_median_over_epochs(made, raw):
    _, *found = rows(made[1].read_text(), "Sampling error")
    curvature = raw.curvature.astype(np.float64)
    error = np.sqrt(np.maximum(raw.curvature_sq - curvature**2, 0) / 9)
    relative = np.where(raw.trained & (curvature > 0), error / curvature, np.nan)
    for epoch, (cohort, median, half) in zip((0, 6), found, strict=True):
        own = relative[epoch + 1 :, raw.first_epoch_active == epoch]
        low, middle, high = np.median(np.nanquantile(own, (0.25, 0.5, 0.75), axis=1), axis=1)
        assert cohort == f"added at epoch {epoch}"
        assert float(median.rstrip("%")) == pytest.approx(100 * middle, abs=0.051)
        ends = [float(end.rstrip("%")) for end in half.split(" to ")]
        assert ends == pytest.approx([100 * low, 100 * high], abs=0.051)


def test_the_galleries_show_the_most_and_the_least_curved_images(made, raw):
    store, page, _ = made
    dataset = open_results(store).load()
    order = np.argsort(raw.mean_curvature)
    text = page.read_text()
    galleries = text[text.index("<h2>Images</h2>") :]
    numbers = [int(n) for n in re.findall(r'alt="sample (\d+)', galleries)]
    cohorts = [order[raw.first_epoch_active[order] == epoch] for epoch in (0, 6)]
    most = [sample for own in cohorts for sample in own[::-1][: OVERALL // 2]]
    least = [sample for own in cohorts for sample in own[: OVERALL // 2]]
    expected = [*most, *least]
    for some in (most, least):
        held_out = (raw.split[some] == 1).sum()
        half = OVERALL // 2
        parts = f"{half} added at epoch 0, {half} added at epoch 6; {held_out} of them held out."
        assert parts in galleries
    for place in range(10):
        own = order[dataset.class_position.values[order] == place]
        expected += [*own[::-1][:PER_CLASS], *own[:PER_CLASS]]
    np.testing.assert_array_equal(numbers, expected)
    for sample in expected[: 2 * OVERALL]:
        held_out = ", held out" if raw.split[sample] else ""
        name = f"sample {sample}, {dataset.class_name.values[sample]}{held_out}"
        assert f"{name}<br>{raw.mean_curvature[sample]:.3g}<" in galleries


def test_the_figures_are_also_files(made):
    _, page, figures = made
    assert {p.name for p in figures.iterdir()} == {
        f"{name}.{kind}" for name in (*FIGURES, PICTURE) for kind in ("png", "svg")
    }
    text = page.read_text()
    for name in (*FIGURES, PICTURE):
        picture = imread(figures / f"{name}.png")
        assert picture.shape[1] == 1800
        assert picture[..., :3].std() > 0.02, "the picture is blank"
        vector = (figures / f"{name}.svg").read_bytes()
        assert ElementTree.fromstring(vector).tag.endswith("svg")
        assert (base64.b64encode(vector).decode() in text) == (name in FIGURES)


def test_chosen_samples_go_from_the_least_to_the_most_curved_of_their_cohort():
    values = np.array([3.0, np.nan, 1.0, 5.0, 4.0, 2.0, 7.0, 6.0, 9.0, 8.0, 0.5, 10.0])
    curvature = xr.DataArray(values, dims="sample", coords={"sample": np.arange(12)})
    alone = np.zeros(12, int)
    # Every second of the ranks from 0 to 10.
    assert choose(curvature, alone) == [10, 5, 4, 7, 9, 11]
    assert choose(curvature[:1], alone[:1]) == [0]
    # Of a cohort that is a hundred times as curved, samples have the ranks they have within it.
    two = xr.concat([curvature, 100 * curvature.assign_coords(sample=np.arange(12, 24))], "sample")
    assert choose(two, np.repeat([0, 1], 12)) == [10, 5, 4, 12 + 7, 12 + 9, 12 + 11]


def test_of_many_epochs_some_are_drawn_and_all_boundaries_among_them(monkeypatch):
    task = np.repeat(np.arange(20), 200).astype(np.int16)
    shown = gathering._shown(task)
    assert len(shown) <= gathering.MOST_EPOCHS + 2 * 19
    assert {*range(199, 3999, 200), *range(200, 4000, 200), 0, 3999} <= {*shown.tolist()}
    np.testing.assert_array_equal(gathering._shown(task[:300]), np.arange(300))


def discard(store: ResultsStore, *blocks: int) -> None:
    for row in range(4):
        store.set_epoch(row, complete=False)
        for block in blocks:
            store.discard_block(row, block)


def test_an_unfinished_store_is_reported_on_as_far_as_it_is(small, tmp_path):
    discard(small, 2)
    out = tmp_path / "report.html"
    assert main(["report", str(small.path), "-o", str(out)]) == 0
    text = out.read_text()
    assert "4, of which 0 are complete" in text
    assert "No images: name the data set" in text
    found = gather(small.path)
    # The last classes have no weights that were trained on them.
    known = (np.arange(60) < 20) | (np.arange(60) >= 30)
    known &= small.read("first_epoch_active") < 4
    np.testing.assert_array_equal(np.isfinite(found.curvature), known)
    assert found.not_comparable == 0


def test_samples_of_a_half_finished_epoch_are_not_compared_with_the_others(small, tmp_path):
    row = small.rows[2]
    small.set_epoch(row, complete=False)
    small.discard_block(row, 2)
    found = gather(small.path)
    first = small.read("first_epoch_active")
    lost = (np.arange(60) >= 20) & (np.arange(60) < 30) & (first == 0)
    np.testing.assert_array_equal(np.isfinite(found.curvature), (first < 4) & ~lost)
    assert found.not_comparable == lost.sum() > 0
    out = tmp_path / "report.html"
    assert main(["report", str(small.path), "-o", str(out)]) == 0
    assert f"{lost.sum()} samples lack results at epochs at which others" in out.read_text()


def test_the_page_and_the_analysis_mention_results_that_are_not_finite(small, tmp_path, capsys):
    for epoch, block in ((2, 0), (4, 0)):
        row, first = small.rows[epoch], small.read("first_epoch_active")[:10]
        names = [name for name in small.files if name != "label" and small.files[name].of_blocks]
        values = {name: small.read(name, row)[:10] for name in names}
        active = np.flatnonzero((first >= 0) & (first <= epoch))
        values["curvature"][active[: 1 + (epoch == 4)]] = np.inf
        small.write_block(row, block, values)
    note_epochs(small, [2, 4])
    out = tmp_path / "report.html"
    assert main(["report", str(small.path), "-o", str(out)]) == 0
    assert "3 results are not finite numbers, at epochs 2 (1), 4 (2)." in out.read_text()
    capsys.readouterr()
    assert main(["analyze", str(small.path), str(tmp_path / "analyses")]) == 0
    assert "3 results are not finite numbers, at epochs 2 (1), 4 (2);" in capsys.readouterr().err
    # Epochs that are left out are not mentioned.
    assert main(["report", str(small.path), "-o", str(out), "--start_epoch", "4"]) == 0
    assert "2 results are not finite numbers, at epochs 4 (2)." in out.read_text()


def test_the_page_says_which_blocks_are_left_out_because_they_lost_a_file(small, tmp_path):
    chunk(small, "loss", small.rows[2], 1).unlink()
    chunk(small, "status", small.rows[2], 1).unlink()
    chunk(small, "loss", small.rows[4], 5).unlink()
    out = tmp_path / "report.html"
    assert main(["report", str(small.path), "-o", str(out)]) == 2
    assert main(["report", str(small.path), "-o", str(out), "--leave_out_missing"]) == 0
    assert (
        "2 blocks have lost a file and are left out: epoch 2 block 1; epoch 4 block 5."
        in out.read_text()
    )


def test_a_store_of_untrained_weights_alone_is_reported_on_with_a_warning(
    small, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(gathering, "select", lambda *_: open_results(small.path).sel(epoch=[0]))
    out = tmp_path / "report.html"
    for asked in ([], ["--include-untrained"]):
        assert main(["report", str(small.path), "-o", str(out), *asked]) == 0
        warned = "only results of weights that had not been trained" in capsys.readouterr().err
        assert warned == (not asked)
        assert "they are included" in out.read_text()
    with pytest.raises(StoreError, match="include_untrained"):
        gather(small.path)


def test_what_npy_files_do_not_say_is_not_known(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import_npy", str(launched.tree), "imported.zarr", "--multiply_by", "2"]) == 0
    data = ("--data_path", str(launched.data))
    assert main(["report", "imported.zarr", "-o", "report.html", *data]) == 0
    text = Path("report.html").read_text()
    run = dict(rows(text, "What was run"))
    unknown = ("network", "estimator", "loss over", "classes", "data set", "class order")
    assert {name: run[name] for name in (*unknown, "written by")} == dict.fromkeys(
        (*unknown, "written by"), "not known"
    )
    assert run["imported"] == "from npy files, gradients multiplied by 2"
    assert "throughput" not in run
    assert "n_probes" not in text
    assert not re.search(r"\d+ probes", text)
    assert "how their curvature was computed is not known" in text
    assert "When the classes were trained is not known" in text
    assert "Not in this store: mean curvature of each sample against its mean loss." in text
    assert "Not in this store: curvature of samples trained on and of those held out." in text
    assert "Not in this store: standard error of the curvature relative to it." in text
    assert "Which data set the results are of is not known" in text
    assert "held out." not in text[text.index("<h3>Most curved</h3>") :]
    assert 'id="trajectories"' in text
    assert "Hollow" not in text
    galleries = text[text.index("<h3>Most curved</h3>") : text.index("<h3>By class")]
    numbers = re.findall(r'alt="sample (\d+)', galleries)
    assert len({*numbers}) == len(numbers), "none is both most and least curved"


def test_images_of_other_labels_than_an_imports_are_refused(launched, tmp_path, capsys):
    assert main(["import_npy", str(launched.tree), str(tmp_path / "imported.zarr")]) == 0
    write_cifar(tmp_path / "other", seed=1)
    out = str(tmp_path / "report.html")
    arguments = ["report", str(tmp_path / "imported.zarr"), "-o", out]
    assert main([*arguments, "--data_path", str(tmp_path / "other")]) == 2
    assert "is another data set than" in capsys.readouterr().err


def test_a_zeroth_order_curvature_is_defined_as_what_it_is(tmp_path):
    found = gather(Made(tmp_path / "made.zarr", method="zeroth-order").path)
    assert "mean over pairs of random directions u, v of h·|q|" in definition(found)
    other = gather(Made(tmp_path / "other.zarr").path)
    assert "mean over random directions v of ‖∇L(x + hv) − ∇L(x)‖" in definition(other)


def test_an_output_that_cannot_be_written_is_refused_before_results_are_read(
    small, tmp_path, capsys, monkeypatch
):
    def read(*_: Any, **__: Any) -> None:
        raise AssertionError("results were read")

    monkeypatch.setattr(gathering, "open_results", read)
    for where in (["-o", "no/report.html"], ["-o", "report.html", "--figures", "file/figures"]):
        (tmp_path / "file").write_text("")
        assert main(["report", str(small.path), *where]) == 2
        assert f"cannot write {where[-1]}: " in capsys.readouterr().err
    assert not Path("report.html").exists()


def test_what_cannot_be_reported_on_is_refused(small, tmp_path, capsys):
    out = tmp_path / "report.html"

    def refusal(*arguments: str, output: Path = out) -> str:
        capsys.readouterr()
        assert main(["report", str(small.path), "-o", str(output), *arguments]) == 2
        error: str = capsys.readouterr().err
        assert "Traceback" not in error
        return error

    assert "no epoch from 5 on" in refusal("--start_epoch", "5")
    assert "samples has 60; expected numbers from 0 to 59" in refusal("--samples", "3,60")
    assert "samples is 'a'; expected numbers such as 8,1234" in refusal("--samples", "a")
    assert "nowhere" in refusal("--data_path", "nowhere")
    other = Project(tmp_path / "other")
    write_cifar(other.data, num_samples=50)
    assert "is another data set than" in refusal("--data_path", str(other.data))
    discard(small, *range(6))
    assert "nothing is computed yet" in refusal()
    assert not out.exists()
