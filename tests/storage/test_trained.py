"""Which weights had been trained on which samples' classes: what a store's reader is told."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import xarray as xr

from daskcurv.storage.read import open_results
from tests.support.stores import N, finish, make_store, sample_columns, scheduled

EPOCHS = (200, 0, 99, 100, 101, 300, 1, 201)
FIRST = {0: 1, 1: 1, 2: 101, 3: 101, 4: 201}
"""By position in the class order: two classes at first, two more after epoch 100, the last after
epoch 200, each trained on from the epoch after."""


@pytest.mark.parametrize("partition", ["entering", "trained"])
@pytest.mark.parametrize("chunks", [None, {}], ids=["numpy", "dask"])
def test_weights_had_been_trained_on_a_class_from_the_epoch_after_its_addition(
    tmp_path, partition, chunks
):
    path = scheduled(tmp_path / "s.zarr", *EPOCHS, partition=partition)
    data = open_results(path, chunks=chunks)
    first = [FIRST[position] for position in sample_columns()["class_position"].tolist()]
    assert data.first_epoch_trained.dtype == np.int64
    assert data.first_epoch_trained.values.tolist() == first
    assert data.trained.dims == ("epoch", "sample")
    assert data.trained.dtype == bool
    for epoch in EPOCHS:
        expected = [epoch >= one for one in first]
        assert data.trained.sel(epoch=epoch).values.tolist() == expected, epoch
    assert not data.trained.sel(epoch=0).any()
    few = data.trained.sel(sample=[7, 2], epoch=[101, 200])
    assert few.values.tolist() == [[first[7] <= 101, first[2] <= 101], [True, first[2] <= 200]]
    assert pickle.loads(pickle.dumps(data.trained)).equals(data.trained.compute())


def test_it_is_not_known_where_no_schedule_is_recorded(tmp_path):
    data = open_results(finish(make_store(tmp_path / "s.zarr", 0, 100)).path)
    assert data.first_epoch_trained.values.tolist() == [-1] * N
    assert data.trained.values.all()


def test_it_is_worked_out_only_where_it_is_looked_at(tmp_path):
    data = open_results(scheduled(tmp_path / "s.zarr", 0, 100, 101))
    assert not data.trained.variable._in_memory
    assert "trained" in data.coords
    jump = data.loss.sel(epoch=101) - data.curvature.sel(epoch=101)
    assert jump.coords["trained"].dims == ("sample",)
    assert not data.trained.variable._in_memory
    series = data.loss.sel(epoch=100).to_series()
    assert series.index.names == ["sample"]


def test_the_store_itself_does_not_hold_it(tmp_path):
    path = scheduled(tmp_path / "s.zarr", 0, 100)
    assert not {"trained", "first_epoch_trained"} & {*xr.open_zarr(path).variables}
