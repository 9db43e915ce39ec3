"""Results out as tables: the same numbers, as rows."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import csv, parquet

from daskcurv.cli import main
from daskcurv.errors import ConfigError, ExportError
from daskcurv.storage import ResultsStore
from daskcurv.storage.compact import compact
from daskcurv.storage.read import open_results
from daskcurv.storage.tables import export_table
from tests.support.disks import enlarge, mounted
from tests.support.stores import block_values, epoch_columns, fill_row, finish, make_store

FORMATS = ("parquet", "csv")


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Epochs 200 and 0, and one that is not finished, 400."""
    store = finish(make_store(tmp_path / "curvature.zarr", 200, 0))
    store.add_epochs(epoch_columns(400))
    return store


@pytest.fixture
def finished(tmp_path: Path) -> ResultsStore:
    return finish(make_store(tmp_path / "finished.zarr", 200, 0))


def read(path: Path) -> pa.Table:
    return parquet.read_table(path) if path.suffix == ".parquet" else csv.read_csv(path)


def assert_says_the_same(table: pa.Table, store: Path, epochs: list[int]) -> None:
    results = open_results(store).sel(epoch=epochs).load()
    status = results.status.values
    expected_epoch, expected_sample = np.nonzero(status == 1)
    assert table["epoch"].to_pylist() == results.epoch.values[expected_epoch].tolist()
    assert table["sample"].to_pylist() == expected_sample.tolist()
    for name in table.column_names[2:]:
        values = results[name].values
        if values.ndim == 1:
            values = np.broadcast_to(values, status.shape)
        found = table[name].to_numpy(zero_copy_only=False).astype(values.dtype)
        np.testing.assert_array_equal(found, values[status == 1], err_msg=name)


@pytest.mark.parametrize("format", FORMATS)
def test_a_table_has_the_same_numbers_bit_by_bit(finished, tmp_path, format):
    out = tmp_path / f"results.{format}"
    export_table(finished, out, format=format)
    table = read(out)
    assert table.column_names == [
        "epoch", "sample", "label", "curvature", "curvature_stderr", "directional_eig", "loss",
        "grad_norm", "prediction",
    ]  # fmt: skip
    assert_says_the_same(table, finished.path, [0, 200])


@pytest.mark.parametrize("format", FORMATS)
def test_each_epoch_can_have_a_file(finished, tmp_path, format):
    export_table(finished, tmp_path / "tables", format=format, by_epoch=True)
    files = sorted(path.name for path in (tmp_path / "tables").iterdir())
    assert files == [f"epoch_0000.{format}", f"epoch_0200.{format}"]
    for name, epoch in zip(files, (0, 200), strict=True):
        assert_says_the_same(read(tmp_path / "tables" / name), finished.path, [epoch])


def test_a_compact_store_gives_the_same_table(finished, tmp_path):
    compact(finished, tmp_path / "compact.zarr")
    for name in ("finished", "compact"):
        export_table(ResultsStore.open(tmp_path / f"{name}.zarr"), tmp_path / f"{name}.parquet")
    assert parquet.read_table(tmp_path / "finished.parquet").equals(
        parquet.read_table(tmp_path / "compact.parquet")
    )


def test_fields_say_what_they_are(finished, tmp_path):
    export_table(finished, tmp_path / "t.parquet")
    file = parquet.ParquetFile(tmp_path / "t.parquet")
    assert file.num_row_groups == 2
    fields = {field.name: field for field in file.schema_arrow}
    assert fields["curvature"].type == pa.float32()
    assert fields["prediction"].type == pa.int16()
    assert fields["curvature"].metadata[b"units"] == b"nat"
    assert fields["curvature_stderr"].metadata[b"long_name"].startswith(b"standard error")


@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_a_number_has_no_value(tmp_path, format):
    identity = {"estimator": {"method": "finite-difference", "n_probes": 1}}
    store = make_store(tmp_path / "s.zarr", 0, identity=identity)
    fill_row(store, 0)
    out = tmp_path / f"t.{format}"
    export_table(store, out, format=format)
    assert read(out)["curvature_stderr"].null_count == 8
    if format == "csv":
        first = out.read_text().splitlines()[1].split(",")
        assert first[4] == ""


def test_epochs_are_chosen_and_unfinished_ones_refused(store, tmp_path, capfd):
    arguments = ["export", str(store.path), str(tmp_path / "t.csv"), "--format", "csv"]
    assert main(arguments) == 2
    assert "epochs [400]" in capfd.readouterr().err
    assert main([*arguments, "--epochs", "0,7"]) == 2
    assert "has no epochs [7]" in capfd.readouterr().err
    assert main([*arguments, "--epochs", "200"]) == 0
    assert_says_the_same(read(tmp_path / "t.csv"), store.path, [200])
    assert main([*arguments, "--epochs", "200"]) == 2
    assert "t.csv exists" in capfd.readouterr().err


def test_the_name_of_the_file_decides_its_format(finished, tmp_path, capfd):
    assert main(["export", str(finished.path), str(tmp_path / "r.csv")]) == 0
    assert (tmp_path / "r.csv").read_text().startswith('"epoch","sample","label"')
    assert main(["export", str(finished.path), str(tmp_path / "r.parquet")]) == 0
    assert parquet.read_table(tmp_path / "r.parquet").num_rows
    for name, options in (("r.xlsx", []), ("s.csv", ["--format", "parquet"])):
        capfd.readouterr()
        assert main(["export", str(finished.path), str(tmp_path / name), *options]) == 2
        assert f"{name} has the suffix {Path(name).suffix}" in capfd.readouterr().err
        assert not (tmp_path / name).exists()


def test_every_column_has_the_store_s_numbers_at_each_row(finished, tmp_path):
    export_table(finished, tmp_path / "t.csv")
    lines = [line.split(",") for line in (tmp_path / "t.csv").read_text().splitlines()]
    rows = {(int(row[0]), int(row[1])): row for row in lines[1:]}
    names = [name.strip('"') for name in lines[0]]
    for position, epoch in enumerate((200, 0)):
        active = np.arange(11) % 5 * 100 <= epoch
        for block in range(3):
            written = block_values(finished, block, position, active)
            for place in np.flatnonzero(written["status"] == 1).tolist():
                sample = 4 * block + place
                row = dict(zip(names, rows.pop((epoch, sample)), strict=True))
                assert int(row["label"]) == sample % 5
                assert int(row["prediction"]) == written["prediction"][place]
                for name in ("curvature", "directional_eig", "loss", "grad_norm"):
                    assert np.float32(row[name]) == written[name][place], name
                mean, square = (
                    float(written[name][place]) for name in ("curvature", "curvature_sq")
                )
                error = np.sqrt(max(square - mean**2, 0) / 9)
                assert float(row["curvature_stderr"]) == pytest.approx(error, rel=1e-5)
    assert not rows


def test_a_format_that_is_unknown_is_refused(finished, tmp_path):
    with pytest.raises(ConfigError, match="format is 'xlsx'"):
        export_table(finished, tmp_path / "t", format="xlsx")


def test_nothing_is_left_of_an_export_that_fails(finished, tmp_path, monkeypatch):
    (finished.path / "loss" / "c" / "0" / "1").write_bytes(b"nonsense")
    before = {path.name for path in tmp_path.iterdir()}
    for by_epoch in (False, True):
        with pytest.raises(Exception, match="epoch 200 block 1: loss"):
            export_table(finished, tmp_path / "t", by_epoch=by_epoch)
        assert {path.name for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("options", [[], ["--by_epoch"]])
def test_a_full_disk_ends_it_with_a_message_and_a_rerun_completes_it(
    finished, tmp_path, capfd, options
):
    with mounted(tmp_path / "disk", "4k") as disk:
        arguments = ["export", str(finished.path), str(disk / "t"), *options]
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert "No space left on device" in said
        assert "results store is not affected" in said
        assert list(disk.iterdir()) == []
        enlarge(disk)
        assert main(arguments) == 0


def test_an_export_of_a_finished_export_is_refused(finished, tmp_path):
    (tmp_path / "t").mkdir()
    with pytest.raises(ExportError, match="t exists"):
        export_table(finished, tmp_path / "t", by_epoch=True)
