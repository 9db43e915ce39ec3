"""The page of pictures, on the demo's store and on those with less in them."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import xarray as xr
from matplotlib.image import imread
from scipy.stats import spearmanr

from daskcurv import open_results
from daskcurv.cli import main
from daskcurv.demo import demo_options
from daskcurv.report import findings as gathering
from daskcurv.report.figures import FIGURES
from daskcurv.report.findings import LEVELS, choose, gather
from daskcurv.report.page import OVERALL, PER_CLASS
from daskcurv.storage import ResultsStore
from daskcurv.storage.attributes import identity_of
from tests.builders import write_checkpoints, write_cifar
from tests.conftest import Project
from tests.test_launch import assert_ok

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
         "--start_epoch", "1", "--samples", "8,1234"]
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


def test_the_page_says_what_was_run(made):
    store, page, _ = made
    text = page.read_text()
    dataset = open_results(store).sel(epoch=slice(1, None)).load()
    assert dataset.attrs["fingerprint"] in text
    assert identity_of(dataset)["dataset"]["sha256"] in text
    assert "12, of which 12 are complete" in text
    for epoch in (1, 12):
        assert f"index-0_epoch-{epoch}.pt (sha256 " in text
        assert dataset.checkpoint_sha256.sel(epoch=epoch).item() in text
    samples = int((dataset.status == 1).sum())
    assert f"1,797; {samples:,} values of samples at epochs" in text
    rate = samples / float(dataset.compute_seconds.sum())
    assert f"{rate:,.1f} samples/s per worker" in text
    curvature, loss = (dataset[name].mean("epoch").values for name in ("curvature", "loss"))
    assert f"rank correlation: {spearmanr(curvature, loss).statistic:.3f}" in text
    assert "Not in this store" not in text


def test_the_galleries_show_the_most_and_the_least_curved_images(made):
    store, page, _ = made
    dataset = open_results(store).sel(epoch=slice(1, None)).load()
    order = np.argsort(dataset.curvature.mean("epoch").values)
    text = page.read_text()
    galleries = text[text.index("<h2>Images</h2>") :]
    numbers = [int(n) for n in re.findall(r'alt="sample (\d+)', galleries)]
    np.testing.assert_array_equal(numbers[:OVERALL], order[::-1][:OVERALL])
    np.testing.assert_array_equal(numbers[OVERALL : 2 * OVERALL], order[:OVERALL])
    expected = []
    for place in range(10):
        own = order[dataset.class_position.values[order] == place]
        expected += [*own[::-1][:PER_CLASS], *own[:PER_CLASS]]
    np.testing.assert_array_equal(numbers[2 * OVERALL :], expected)
    label = dataset.class_name.values[order[-1]]
    assert f"sample {order[-1]}, {label}<br>" in galleries


def test_the_figures_are_also_files(made):
    _, page, figures = made
    assert {p.name for p in figures.iterdir()} == {
        f"{name}.{kind}" for name in FIGURES for kind in ("png", "svg")
    }
    text = page.read_text()
    for name in FIGURES:
        picture = imread(figures / f"{name}.png")
        assert picture.shape[1] == 1800
        assert picture[..., :3].std() > 0.02, "the picture is blank"
        vector = (figures / f"{name}.svg").read_bytes()
        assert ElementTree.fromstring(vector).tag.endswith("svg")
        assert base64.b64encode(vector).decode() in text


def test_the_numbers_are_those_of_the_store(made):
    store = made[0]
    found = gather(store, start_epoch=1, samples=[8, 1234])
    raw = open_results(store).load()
    np.testing.assert_array_equal(found.epochs, np.arange(1, 13))
    np.testing.assert_array_equal(found.boundaries, [6])
    np.testing.assert_array_equal(found.cohort_starts, [0, 6])
    groups: list[tuple[Any, Any]] = [
        *((found.cohorts[n], raw.first_epoch_active == s) for n, s in enumerate((0, 6))),
        *((found.parts[n], raw.split == n) for n in (0, 1)),
    ]
    for quantiles, member in groups:
        for place, epoch in enumerate(range(1, 13)):
            row = raw.curvature.sel(epoch=epoch).values[member.values]
            row = row[~np.isnan(row)].astype(np.float64)
            expected = np.quantile(row, LEVELS) if len(row) else np.full(len(LEVELS), np.nan)
            np.testing.assert_allclose(quantiles[place], expected, rtol=1e-12)
    relative = (raw.curvature_stderr / raw.curvature.astype(np.float64)).values[1:]
    np.testing.assert_allclose(
        found.relative_errors, np.nanquantile(relative, LEVELS, axis=1).T, rtol=1e-6
    )
    np.testing.assert_array_equal(
        found.trajectories.curvature, raw.curvature.values[1:, [8, 1234]].T
    )
    assert found.distributions.keys() == {1, 5, 8, 12}
    assert len(found.distributions[12]) == 1797


def test_chosen_samples_go_from_the_least_to_the_most_curved():
    values = np.array([3.0, np.nan, 1.0, 5.0, 4.0, 2.0, 7.0, 6.0, 9.0, 8.0, 0.5, 10.0])
    curvature = xr.DataArray(values, dims="sample", coords={"sample": np.arange(12)})
    # Every second of the ranks from 0 to 10.
    assert choose(curvature) == [10, 5, 4, 7, 9, 11]
    assert choose(curvature[:1]) == [0]


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
    assert "The images were not at hand" in text
    found = gather(small.path)
    assert np.isnan(found.curvature.values[20:30]).all()
    assert not np.isnan(found.curvature.values[:20]).all()


def test_a_store_of_npy_files_lacks_what_they_do_not_say(launched, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["import_npy", str(launched.tree), "imported.zarr"]) == 0
    assert main(["report", "imported.zarr", "-o", "report.html"]) == 0
    text = Path("report.html").read_text()
    assert "Not in this store: mean curvature of each sample against its mean loss." in text
    assert "Not in this store: curvature of samples trained on and of those held out." in text
    assert 'id="trajectories"' in text


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
    assert "cannot write" in refusal(output=tmp_path / "no" / "report.html")
    (tmp_path / "file").write_text("")
    assert "cannot create" in refusal("--figures", str(tmp_path / "file" / "figures"))
    out.unlink()
    discard(small, *range(6))
    assert "nothing is computed yet" in refusal()
    assert not out.exists()
