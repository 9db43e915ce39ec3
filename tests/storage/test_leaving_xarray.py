"""Opened results go where any dataset of xarray goes: to other processes, and to files."""

from __future__ import annotations

import copy
import json
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from dask.base import compute

from daskcurv.storage import ResultsStore
from daskcurv.storage.attributes import identity_of
from daskcurv.storage.compact import compact
from daskcurv.storage.read import open_results
from tests.support.stores import IDENTITY, scheduled


@pytest.fixture(scope="module")
def stores(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished store whose epochs are not in order, and a compact one made of it."""
    directory = tmp_path_factory.mktemp("stores")
    path = scheduled(directory / "working.zarr", 200, 0, 100)
    compact(ResultsStore.open(path), directory / "compact.zarr")
    return {"working": path, "compact": directory / "compact.zarr"}


@pytest.fixture(params=["working", "compact"])
def path(request: pytest.FixtureRequest, stores: dict[str, Path]) -> Path:
    return stores[request.param]


@pytest.fixture(params=[None, {}, {"sample": 7}, "auto", 5], ids=repr)
def results(request: pytest.FixtureRequest, path: Path) -> xr.Dataset:
    return open_results(path, chunks=request.param)


def test_it_is_pickled_and_copied_without_being_read(results, path):
    expected = open_results(path).load()
    for copied in (pickle.loads(pickle.dumps(results)), copy.deepcopy(results)):
        assert not copied.loss.variable._in_memory
        xr.testing.assert_identical(copied.load(), expected)


@pytest.mark.parametrize("engine", ["scipy", "h5netcdf"])
def test_it_is_written_as_netcdf(results, path, tmp_path, engine):
    results.to_netcdf(tmp_path / "o.nc", engine=engine)
    with xr.open_dataset(tmp_path / "o.nc", engine=engine) as written:
        xr.testing.assert_equal(written.load(), open_results(path).load())
        assert json.loads(written.attrs["identity"])["estimator"] == IDENTITY["estimator"]
        assert identity_of(written) == ResultsStore.open(path).identity


@pytest.mark.parametrize("zarr_format", [2, 3])
def test_it_is_written_as_zarr(results, path, tmp_path, zarr_format):
    options: dict[str, Any] = {"zarr_format": zarr_format, "consolidated": False}
    results.to_zarr(tmp_path / "o.zarr", **options)
    written = xr.open_zarr(tmp_path / "o.zarr", consolidated=False).load()
    xr.testing.assert_identical(written, open_results(path).load())


def test_selections_are_written_and_put_together_again(results, path, tmp_path):
    expected = open_results(path).load()
    parts = [results.isel(epoch=[0]), results.isel(epoch=[1, 2])]
    xr.testing.assert_identical(xr.concat(parts, "epoch").load(), expected)
    merged = xr.merge([results[["loss"]], results[["curvature"]]])
    assert merged.loss.equals(expected.loss)
    few = results.sel(epoch=[0, 200], sample=results.label == 3)
    few.to_zarr(tmp_path / "few.zarr", zarr_format=2, consolidated=False)
    written = xr.open_zarr(tmp_path / "few.zarr", consolidated=False)
    np.testing.assert_array_equal(written.loss, expected.loss.values[[0, 2]][:, [3, 8]])


def loss_of(results: xr.Dataset, epoch: int) -> list[float]:
    values: list[float] = results.loss.sel(epoch=epoch).values.tolist()
    return values


def test_other_processes_read_from_it(path):
    results = open_results(path)
    expected = [loss_of(results, epoch) for epoch in (0, 200)]
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        found = [pool.submit(loss_of, results, epoch).result() for epoch in (0, 200)]
    np.testing.assert_array_equal(found, expected)
    lazy = open_results(path, chunks={"epoch": 1}).curvature.mean("epoch")
    (mean,) = compute(lazy, scheduler="processes", num_workers=1)  # type: ignore[no-untyped-call]
    np.testing.assert_allclose(mean, results.curvature.mean("epoch"), rtol=1e-6)
