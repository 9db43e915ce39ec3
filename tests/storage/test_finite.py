"""Results that are not finite numbers are counted, recorded, said, and no success."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from daskcurv.cli import main
from daskcurv.config import EstimatorConfig
from daskcurv.errors import CheckpointChangedError
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.runs.accounts.store import StoreAccount
from daskcurv.runs.block import Worker
from daskcurv.runs.events import Done, Ended, SetAside
from daskcurv.runs.opening import _recorded
from daskcurv.runs.outcome import Conclusion, Outcome, State
from daskcurv.runs.status import describe, read_status
from daskcurv.runs.tasks import BlockResult, BlockTask
from daskcurv.storage import ResultsStore
from daskcurv.storage.finite import noted_epochs
from daskcurv.storage.integrity.verify import verify
from tests.support.builders import make_model
from tests.support.launches import make_store as make_launch_store
from tests.support.launches import run_context
from tests.support.stores import IDENTITY, block_values, chunk, finish, make_store

ACTIVE = np.ones(11, dtype=bool)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Two finished epochs, 0 and 200, of 11 samples in blocks of 4, 4 and 3."""
    return finish(make_store(tmp_path / "curvature.zarr", 0, 200))


def spoil(
    store: ResultsStore, row: int, block: int, name: str, value: float, count: int = 1
) -> None:
    """Write a block again, some of its active samples with another value."""
    active = store.read("first_epoch_active") <= store.epochs[row]
    values = block_values(store, block, row, active)
    here = np.flatnonzero(active[slice(*store.bounds(block))])[:count]
    assert len(here) == count
    values[name][here] = value
    store.write_block(row, block, values)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("curvature", np.nan),
        ("curvature_sq", np.inf),
        ("directional_eig", -np.inf),
        ("loss", np.inf),
        ("grad_norm", np.nan),
    ],
)
def test_verify_counts_them_and_says_at_which_epochs(store, capfd, name, value):
    assert verify(store).not_finite == {}
    spoil(store, 1, 0, name, value, count=2)
    spoil(store, 1, 1, name, value)
    found = verify(store)
    assert found.not_finite == {200: 3}
    assert found.damage == []
    assert main(["verify", str(store.path)]) == 1
    assert "3 results are not finite numbers, at epochs 200 (3)" in capfd.readouterr().err


def test_what_a_method_without_gradients_cannot_give_is_no_failure(tmp_path, capfd):
    estimator = {"method": "zeroth-order", "h": 0.001, "n_probes": 2}
    identity = {**IDENTITY, "estimator": estimator}
    store = finish(make_store(tmp_path / "s.zarr", 0, 200, identity=identity))
    for block in range(3):
        active = store.read("first_epoch_active") <= 200
        values = block_values(store, block, 1, active)
        for name in ("directional_eig", "grad_norm"):
            values[name][:] = np.nan
        store.write_block(1, block, values)
    assert verify(store).not_finite == {}
    assert main(["verify", str(store.path)]) == 0
    spoil(store, 1, 0, "curvature", np.nan)
    assert verify(store).not_finite == {200: 1}


def test_a_sample_with_several_such_measures_is_counted_once(store):
    spoil(store, 1, 0, "curvature", np.nan)
    values = block_values(store, 0, 1, store.read("first_epoch_active") <= 200)
    first = int(np.flatnonzero(values["status"] == 1)[0])
    for name in ("curvature", "loss", "grad_norm"):
        values[name][first] = np.nan
    store.write_block(1, 0, values)
    assert verify(store).not_finite == {200: 1}


def test_what_a_damaged_block_holds_is_not_counted(store):
    chunk(store, "loss", 1, 1).write_bytes(b"damaged")
    found = verify(store)
    assert found.not_finite == {}
    assert len(found.damage) == 1


def test_a_worker_counts_those_of_a_network_that_overflows(project):
    cifar = read_cifar(project.data)
    weights = make_model().state_dict()
    weights["fc.weight"] = torch.sign(weights["fc.weight"]) * 3e38
    path = project.models / "index-0_epoch-4.pt"
    torch.save(weights, path)
    store = make_launch_store(project.root / "store", cifar, block_size=20)
    estimator = EstimatorConfig(n_probes=1, method="finite-difference")
    context = run_context(store.path, cifar, project.root / "inputs", estimator, batch_size=8)
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    result = Worker(context).run(BlockTask(4, 0, 1, path, sha256, samples=20))
    loss = store.read("loss", 0)[20:40]
    assert result.not_finite == (~np.isfinite(loss)).sum() == 20


def conclude(account: StoreAccount, store: ResultsStore) -> Outcome:
    """End a run of which every block is done."""
    return Conclusion(dict.fromkeys(store.epochs, 0)).outcome(account.count_not_finite())


def task(store: ResultsStore, row: int, block: int) -> BlockTask:
    return BlockTask(store.epochs[row], row, block, Path("w.pt"), "", samples=4)


def result(not_finite: int) -> BlockResult:
    return BlockResult(True, 1.0, 0.1, "host:1", "cpu", 8, "finite-difference", not_finite)


def test_a_run_that_has_some_says_where_and_does_not_end_with_0(store, caplog):
    spoil(store, 1, 0, "loss", np.inf, count=2)
    account = StoreAccount(store)
    account(Done(task(store, 1, 0), result(2)))
    assert "epoch 200 block 0: 2 of 4 results are not finite" in caplog.text
    outcome = conclude(account, store)
    assert outcome == Outcome(not_finite=2)
    assert outcome.exit_code == 1
    assert outcome.complete
    assert outcome.state is State.NOT_FINITE
    assert "2 results are not finite numbers, at epochs 200 (2)" in caplog.text


def test_they_are_remembered_by_the_store_until_they_are_computed_again(store):
    before = (store.path / "zarr.json").read_bytes()
    spoil(store, 1, 0, "loss", np.inf)
    StoreAccount(store)(Done(task(store, 1, 0), result(1)))  # and the launcher is killed

    opened = ResultsStore.open(store.path)
    assert (opened.identity, opened.epochs) == (store.identity, store.epochs)
    assert noted_epochs(opened) == [200]
    assert conclude(StoreAccount(opened), opened).exit_code == 1
    status = read_status(store.path)
    assert status["store"]["epochs_not_finite"] == [200]
    assert "some results are not finite numbers at epochs 200;" in describe(status)

    store.write_block(1, 0, block_values(store, 0, 1, store.read("first_epoch_active") <= 200))
    opened = ResultsStore.open(store.path)
    assert conclude(StoreAccount(opened), opened) == Outcome()
    assert noted_epochs(ResultsStore.open(store.path)) == []
    assert "not finite" not in describe(read_status(store.path))
    assert (store.path / "zarr.json").read_bytes() == before


def test_a_run_without_any_leaves_the_stores_metadata_alone(store):
    before = (store.path / "zarr.json").read_bytes()
    assert conclude(StoreAccount(store), store) == Outcome()
    assert (store.path / "zarr.json").read_bytes() == before


def test_a_checkpoint_that_is_not_the_one_on_record_is_read_anew_by_the_next_launch(store):
    (file,) = [c for e, c in _recorded(store).items() if e == 200]
    assert file.size == 1200
    account = StoreAccount(store)
    error = CheckpointChangedError("w.pt is not the file on record")
    account(SetAside(task(store, 1, 0), str(error), error))
    account(Done(task(store, 0, 0), result(0)))
    account(Ended())
    recorded = _recorded(ResultsStore.open(store.path))
    assert (recorded[200].size, recorded[200].mtime_ns) == (-1, -1)
    assert recorded[200].sha256 == file.sha256
    assert recorded[0].size == 1000
