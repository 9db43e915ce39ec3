"""One table of measures: a row and a line are all that a further measure of the clean pass takes.

Whoever reads or writes a store goes by the store's own list, whatever the table says by then.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from distributed import LocalCluster
from pyarrow import parquet

from daskcurv import measures, score_samples
from daskcurv.cli import main
from daskcurv.errors import StoreError
from daskcurv.estimators import clean
from daskcurv.measures import FORMAT_1, MEASURES, Measure
from daskcurv.storage import ResultsStore
from daskcurv.storage.read import open_results
from tests.support.builders import make_model
from tests.support.stores import IDENTITY, block_values, make_store

DOCS = Path(__file__).parent.parent / "docs"

MARGIN = Measure("margin", "logit of the label less the largest other", "1")


def margin(found: clean.CleanPass) -> torch.Tensor:
    of_label = found.logits.gather(1, found.labels[:, None])[:, 0]
    return of_label - found.logits.scatter(1, found.labels[:, None], -torch.inf).amax(1)


@pytest.fixture
def with_margin(monkeypatch):
    """The table with one more measure, in this process."""
    monkeypatch.setattr(measures, "MEASURES", (*MEASURES, MARGIN))
    monkeypatch.setitem(clean.FORMULAS, "margin", margin)


@pytest.fixture
def here(monkeypatch):
    """A Dask worker in this process, as options of a launch."""
    threads = torch.get_num_threads()
    with LocalCluster(
        n_workers=1, threads_per_worker=1, processes=False, host="127.0.0.1", protocol="tcp://",
        dashboard_address=None,
    ) as cluster:  # fmt: skip
        address = cluster.scheduler_address
        yield ["--cluster", "connect", "--scheduler", address, "--device", "cpu"]
    torch.set_num_threads(threads)


def test_a_further_measure_goes_through_everything(project, with_margin, here, tmp_path):
    assert main(["launch", *project.launch_arguments("--block_size", "20", *here)]) == 0
    results = open_results(project.store).load()
    assert results.margin.attrs == {"long_name": MARGIN.long_name, "units": "1"}
    computed = results.status.values == 1
    values = results.margin.values[computed]
    assert len(values)
    assert np.isfinite(values).all()
    # A margin is negative exactly where another class is predicted.
    label = np.broadcast_to(results.label.values, computed.shape)[computed]
    assert ((values > 0) == (results.prediction.values[computed] == label)).all()
    assert np.isnan(results.margin.values[~computed]).all()

    store = str(project.store)
    assert main(["verify", store]) == 0
    assert main(["compact", store, str(tmp_path / "compact.zarr")]) == 0
    compacted = open_results(tmp_path / "compact.zarr")
    np.testing.assert_array_equal(compacted.margin, results.margin)
    assert main(["verify", str(tmp_path / "compact.zarr")]) == 0

    assert main(["export_npy", store, str(tmp_path / "npy"), "--extras"]) == 0
    for row, epoch in enumerate(results.epoch.values):
        exported = np.load(tmp_path / "npy" / f"epoch_{epoch:04d}" / "per_image_margin.npy")
        np.testing.assert_array_equal(exported, results.margin.values[row])
    assert main(["import_npy", str(tmp_path / "npy"), str(tmp_path / "imported.zarr")]) == 0
    np.testing.assert_array_equal(open_results(tmp_path / "imported.zarr").margin, results.margin)

    assert main(["export", store, str(tmp_path / "table.parquet")]) == 0
    table = parquet.read_table(tmp_path / "table.parquet")
    assert table.column_names[-1] == "margin"
    assert table.schema.field("margin").metadata[b"long_name"] == MARGIN.long_name.encode()
    np.testing.assert_array_equal(table["margin"].to_numpy(), values)

    report = tmp_path / "report.html"
    assert main(["report", store, "-o", str(report), "--data_path", str(project.data)]) == 0
    assert report.stat().st_size > 0


def test_scores_have_it_by_name(with_margin):
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = score_samples(make_model(), images, [0, 1, 2], n_probes=2)
    logits = make_model()(images).detach().double().numpy()
    rest = [np.delete(row, label).max() for label, row in enumerate(logits)]
    np.testing.assert_allclose(scores["margin"], np.diagonal(logits) - rest, rtol=1e-4, atol=1e-6)
    assert scores["loss"] is scores.loss
    with pytest.raises(KeyError, match="entropy"):
        scores["entropy"]


@pytest.mark.parametrize("method", ["difference-propagation", "finite-difference", "zeroth-order"])
def test_every_method_gives_every_measure_of_the_table(method):
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    scores = score_samples(make_model(), images, [0, 1], n_probes=2, method=method)
    for measure in MEASURES:
        values = scores[measure.name]
        assert values.dtype == ("int64" if measure.is_integer else "float64")
        unknown = method == "zeroth-order" and measure.needs_gradients
        assert (np.isnan(values) == unknown).all()


def test_a_measure_of_the_clean_pass_is_a_row_and_a_line():
    assert {m.name for m in MEASURES if m.computed_in == "clean"} == clean.FORMULAS.keys()


def test_a_measure_is_the_same_after_json():
    row = json.loads(json.dumps(MARGIN.to_json(), allow_nan=False))
    again = Measure.from_json({**row, "of a later version": 1})
    assert np.isnan(again.fill)
    assert again.to_json() == MARGIN.to_json()


def test_a_store_goes_by_its_own_list_not_by_the_table(tmp_path):
    listed = (MARGIN, *reversed(MEASURES))
    store = make_store(tmp_path / "s.zarr", 0, measures=listed)
    store.write_block(0, 1, block_values(store, 1))
    again = ResultsStore.open(store.path)
    assert [measure.name for measure in again.measures] == [measure.name for measure in listed]
    digests = again.read_block("integrity/block_digest", 0, 1)
    assert digests.shape == (1, len(listed) + 1)
    expected = [again.digest(v, 0, 1, again.read_block(v.name, 0, 1)) for v in again.per_sample]
    assert digests[0].tolist() == expected


def test_a_store_that_lacks_a_measure_says_so_by_name(tmp_path):
    store = make_store(tmp_path / "s.zarr", 0)
    with pytest.raises(StoreError, match=r"s\.zarr has no margin; its measures are curvature, "):
        store.read("margin")


def test_a_run_cannot_fill_a_store_with_a_measure_that_it_does_not_compute(tmp_path):
    make_store(tmp_path / "s.zarr", 0, measures=(*MEASURES, MARGIN))
    ResultsStore.open(tmp_path / "s.zarr")
    with pytest.raises(StoreError, match="holds margin, which this daskcurv does not compute"):
        ResultsStore.open(tmp_path / "s.zarr", identity=IDENTITY)


@pytest.mark.parametrize(
    ("damaged", "what"),
    [
        (None, "lacks measures"),
        ("curvature", "no list of measures"),
        ([{"long_name": "x", "dtype": "float32"}], "a measure has name None; expected text"),
        ([{"name": "x", "long_name": "x", "dtype": "float99"}], "measure x"),
        ([MARGIN.to_json(), MARGIN.to_json()], "listed twice"),
    ],
)
def test_a_damaged_list_is_named(tmp_path, damaged, what):
    make_store(tmp_path / "s.zarr", 0)
    path = tmp_path / "s.zarr" / "zarr.json"
    content = json.loads(path.read_bytes())
    content["attributes"]["measures"] = damaged
    if damaged is None:
        del content["attributes"]["measures"]
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match=r"s\.zarr is damaged: its zarr\.json .*" + what):
        ResultsStore.open(path.parent)


def rows_of(page: str, heading: str) -> dict[str, list[str]]:
    """Return the rows of the first table below a heading, by what is in their first cell."""
    text = (DOCS / page).read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in rows}


def test_docs_say_what_the_table_says():
    documented = rows_of("results.md", "Measures")
    assert documented == {
        m.name: [
            {"nat2": "nat²"}.get(m.units, m.units),
            m.dtype,
            "clean pass" if m.computed_in == "clean" else "mean over probes",
            m.long_name.split(";")[0],
        ]
        for m in MEASURES
    }
    exported = rows_of("results.md", "npy files")
    for measure in MEASURES:
        assert (f"per_image_{measure.name}.npy" in exported) == measure.documented
    page = " ".join((DOCS / "results.md").read_text().split())
    [columns] = re.findall(r"with the columns (.*?), one row", page)
    names = re.findall(r"`(\w+)`", columns)
    assert names[:3] == ["epoch", "sample", "label"]
    assert [n for n in names[3:] if n != "curvature_stderr"] == [
        m.name for m in MEASURES if m.name != "curvature_sq"
    ]
    keys = rows_of("store.md", "Formats")
    assert keys.keys() == MARGIN.to_json().keys()
    assert FORMAT_1 == MEASURES
