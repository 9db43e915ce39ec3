"""A run from Python, on workers that the caller has started or on ones of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from distributed import Client, LocalCluster

import daskcurv
from daskcurv.config import EstimatorConfig
from daskcurv.errors import ClusterError, DaskcurvError
from daskcurv.experiment.curriculum import Curriculum, Schedule, class_order_of
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.experiment.search import discover
from daskcurv.measures import MEASURES
from daskcurv.storage.attributes import identity_of
from tests.support.builders import TINY
from tests.support.project import Project


@pytest.fixture
def experiment(project: Project) -> daskcurv.Experiment:
    return daskcurv.Experiment(
        dataset=read_cifar(project.data),
        checkpoints=discover(project.models, 0),
        network=TINY,
        curriculum=Curriculum(tuple(class_order_of(0, 10).tolist()), Schedule(4, 4, 2)),
        estimator=EstimatorConfig(n_probes=2, method="finite-difference", precision="float32"),
    )


@pytest.fixture
def client() -> Iterator[Client]:
    """As in a notebook."""
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        yield client


def test_workers_of_the_caller_give_the_same_and_are_left_running(project, experiment, client):
    environment = dict(os.environ)
    theirs = daskcurv.compute(experiment, project.store, client, batch_size=8, block_size=20)
    assert client.submit(lambda: 3).result() == 3
    assert len(client.scheduler_info()["workers"]) == 2
    ours = daskcurv.compute(
        experiment, project.root / "ours.zarr", workers=1, device="cpu", batch_size=8,
        block_size=20, export_to=project.tree,
    )  # fmt: skip
    assert dict(os.environ) == environment
    assert theirs.complete.all()
    for measure in MEASURES:
        np.testing.assert_array_equal(theirs[measure.name].values, ours[measure.name].values)
    assert len(list(project.tree.iterdir())) == 4
    # Complete as it is, it computes nothing.
    again = daskcurv.compute(experiment, project.store, client)
    assert again.sizes == theirs.sizes


def test_what_cannot_be_computed_is_an_error_and_the_rest_is_kept(project, experiment, client):
    (project.models / "index-0_epoch-2.pt").write_bytes(b"no weights")
    with pytest.raises(DaskcurvError, match=r"index-0_epoch-2\.pt"):
        daskcurv.compute(experiment, project.store, client)
    with pytest.raises(ClusterError, match="leave it out with a client"):
        daskcurv.compute(experiment, project.store, client, workers=2)


def test_method_and_precision_are_chosen_and_recorded_as_by_a_launch(project, experiment):
    chosen = replace(experiment, estimator=EstimatorConfig(n_probes=2))
    daskcurv.compute(chosen, project.root / "ours.zarr", workers=1, device="cpu", batch_size=8)
    project.launch()
    ours, theirs = (
        identity_of(daskcurv.open_results(path))
        for path in (project.root / "ours.zarr", project.store)
    )
    assert "auto" not in ours["estimator"].values()
    assert ours["estimator"] == theirs["estimator"]
