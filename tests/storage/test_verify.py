"""Damage of any kind is noticed, named, and mended by the next launch."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from daskcurv.cli import main
from daskcurv.storage import ResultsStore, schema
from daskcurv.storage.integrity.columns import discard_column, restore_columns
from daskcurv.storage.integrity.verify import repair, verify
from tests.support.damage import KINDS, campaign, contents, same
from tests.support.project import Project
from tests.support.stores import (
    PER_SAMPLE,
    block_values,
    chunk,
    epoch_columns,
    fill_row,
    finish,
    make_store,
    sample_columns,
)


@pytest.fixture
def store(tmp_path: Path) -> ResultsStore:
    """Two finished epochs; which samples are active is as their coordinates say."""
    return finish(make_store(tmp_path / "curvature.zarr", 0, 200))


def test_a_store_in_order_has_no_damage(store):
    found = verify(store)
    assert (found.blocks, found.missing, found.leftovers, found.damage) == (6, 0, 0, [])


def test_blocks_that_were_never_computed_are_no_damage(tmp_path):
    found = verify(make_store(tmp_path / "s", 0, 200))
    assert (found.blocks, found.missing, found.damage) == (0, 6, [])


def test_a_block_in_the_place_of_another_is_named(store):
    one, other = chunk(store, "loss", 0, 1), chunk(store, "loss", 1, 1)
    one_content, other_content = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_content)
    other.write_bytes(one_content)
    found = verify(store).damage
    assert [damage.where for damage in found] == ["epoch 0 block 1", "epoch 200 block 1"]
    assert {damage.what for damage in found} == {"loss is not what was written there"}


@pytest.mark.parametrize("other", [(0, 1), (1, 0)], ids=["of its epoch", "of another epoch"])
def test_whole_blocks_that_changed_places_with_their_digests_are_noticed(tmp_path, other):
    store = make_store(tmp_path / "s.zarr", 0, 200)
    for row in (0, 1):
        fill_row(store, row, np.ones(11, bool))
    for name in (*PER_SAMPLE, schema.DIGEST.name):
        here, there = store.chunk_path(name, 0, 0), store.chunk_path(name, *other)
        content = here.read_bytes()
        here.write_bytes(there.read_bytes())
        there.write_bytes(content)
    damaged = {(one.row, one.block): one.what for one in verify(store).damage}
    assert damaged.keys() >= {(0, 0), other}
    assert "curvature is not what was written there" in damaged[0, 0]


def test_variables_of_a_block_that_changed_places_with_their_digests_are_noticed(store):
    one, other = chunk(store, "loss", 0, 1), chunk(store, "grad_norm", 0, 1)
    one_content, other_content = one.read_bytes(), other.read_bytes()
    one.write_bytes(other_content)
    other.write_bytes(one_content)
    digests = store.array(schema.DIGEST.name)
    names = [variable.name for variable in store.per_sample]
    places = [names.index(name) for name in ("loss", "grad_norm")]
    of_block = digests[0, 1]
    of_block[places] = of_block[places[::-1]]
    digests[0, 1] = of_block
    (damage,) = verify(store).damage
    assert damage.where == "epoch 0 block 1"
    assert damage.what == "; ".join(
        f"{name} is not what was written there" for name in ("loss", "grad_norm")
    )


def test_values_of_samples_that_are_not_active_are_noticed(store):
    active = sample_columns()["first_epoch_active"] <= 0
    values = block_values(store, 0, active=active)
    values["loss"][:] = 1
    store.write_block(0, 0, values)
    (damage,) = verify(store).damage
    assert damage.where == "epoch 0 block 0"
    assert damage.what == "loss has values where no sample is active"


def test_values_changed_from_outside_are_noticed(store):
    array = store._group["curvature"]
    array[0, 5] = 3.0
    (damage,) = verify(store).damage
    assert (damage.row, damage.block) == (0, 1)
    assert damage.what == "curvature is not what was written there"


def test_a_lost_status_of_a_finished_epoch_is_noticed(store):
    chunk(store, "status", 1, 2).unlink()
    (damage,) = verify(store).damage
    assert damage.where == "epoch 200 block 2"
    assert damage.what == "status is lost"


def test_a_changed_identity_is_noticed_and_cannot_be_repaired(store):
    path = store.path / "zarr.json"
    path.write_text(path.read_text().replace('"h": 0.001', '"h": 0.002'))
    (damage,) = verify(ResultsStore.open(store.path)).damage
    assert "its identity does not have its fingerprint" in damage.what
    assert not damage.can_be_repaired


def test_metadata_of_an_array_are_written_anew(store):
    path = store.path / "loss" / "zarr.json"
    before = path.read_text()
    path.write_text(before.replace("nat", "bat"))
    (damage,) = verify(store).damage
    repair(store, [damage])
    assert verify(store).damage == []


def test_an_interrupted_addition_of_epochs_is_no_damage(store):
    path = store.path / "loss" / "zarr.json"
    before = json.loads(path.read_text())
    for rows, wrong in ((3, []), (1, ["loss/zarr.json"])):
        path.write_text(json.dumps({**before, "shape": [rows, 11]}))
        found = verify(ResultsStore.open(store.path)).damage
        assert [damage.where for damage in found] == wrong


def test_repairing_leaves_blocks_missing_and_nothing_else_touched(store):
    expected = contents(store.path)
    chunk(store, "loss", 0, 1).write_bytes(b"nonsense")
    (store.path / "loss" / "c" / "0" / "1.0123.partial").write_bytes(b"half")
    found = verify(store)
    assert found.leftovers == 1
    repair(store, found.damage)
    assert store.done_blocks().tolist() == [[True, False, True], [True, True, True]]
    again = verify(store)
    assert (again.missing, again.leftovers, again.damage) == (1, 0, [])
    assert store.read("complete").tolist() == [False, True]
    active = sample_columns()["first_epoch_active"]
    fill_row(store, 0, active <= 0)
    store.set_epoch(0, complete=True)
    assert same(contents(store.path), expected)


def test_the_command_names_what_is_damaged(store, capfd):
    assert main(["verify", str(store.path)]) == 0
    assert "6 blocks checked, 0 not computed yet, 0 damaged" in capfd.readouterr().err
    chunk(store, "loss", 0, 1).write_bytes(b"nonsense")
    assert main(["verify", str(store.path)]) == 1
    output = capfd.readouterr().err
    assert "epoch 0 block 1: loss cannot be read" in output
    assert "add --repair" in output
    assert main(["verify", str(store.path), "--repair"]) == 0
    assert "the next launch" in capfd.readouterr().err
    assert main(["verify", str(store.path)]) == 0


def test_damage_of_any_kind_is_noticed_and_mended_by_a_launch(project: Project):
    def launch() -> None:
        run = project.launch("--block_size", "20", "--no_export")
        assert run.returncode == 0, run.stdout

    launch()
    result = campaign(project.store, launch, cases=20, batch=10)
    assert result["unnoticed"] == []
    assert result["cases"] == dict.fromkeys(KINDS, 4)


@pytest.mark.parametrize("lost", [[], ["label"], ["epoch"], ["complete"], ["checkpoint_sha256"]])
def test_columns_are_restored_from_what_the_launcher_knows(store, lost):
    expected = contents(store.path)
    for name in lost:
        discard_column(store, schema.COLUMN[name])
    assert [damage.column for damage in verify(store).damage] == lost
    restore_columns(store, sample_columns(), epoch_columns(0, 200))
    assert verify(store).damage == []
    assert same(contents(store.path), expected)
