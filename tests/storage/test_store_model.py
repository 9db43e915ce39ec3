"""Any sequence of what can happen to a store, against a plain model of it in memory."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)

from daskcurv.measures import MEASURES, Measure
from daskcurv.storage import ResultsStore, export_epochs, schema
from daskcurv.storage.compact import compact
from daskcurv.storage.integrity.columns import restore_columns
from daskcurv.storage.integrity.verify import repair, verify
from daskcurv.storage.read import open_results
from tests.support.damage import KINDS, chunk_files, damage
from tests.support.stores import (
    LABELS,
    N,
    block_values,
    epoch_columns,
    make_store,
    sample_columns,
)

KILLED = 9
BLOCKS = 3
FIRST_ACTIVE = sample_columns()["first_epoch_active"]
EPOCHS = st.integers(0, 500)
MARGIN = Measure("margin", "logit of the label less the largest other")
LISTS = [MEASURES, (*MEASURES, MARGIN), (MARGIN, *reversed(MEASURES[3:]))]
"""What a store can hold: what new ones do, more, and neither curvature nor the usual order."""


def killed_at(operation: int, root: Path, work: Callable[[], Any]) -> bool:
    """Do some work in a process that dies before its n-th operation on files below `root`.

    Returns
    -------
    bool
        Whether it came to that; else the work was done.
    """
    child = os.fork()
    if child == 0:
        lock, left = threading.Lock(), [operation]

        def watch(event: str, arguments: tuple[Any, ...]) -> None:
            if event not in ("open", "os.rename", "os.remove", "os.mkdir"):
                return
            changes = event != "open" or (isinstance(arguments[2], int) and arguments[2] & 3)
            if changes and str(root) in str(arguments[0]):
                with lock:
                    left[0] -= 1
                    if left[0] < 0:
                        os._exit(KILLED)

        try:
            sys.addaudithook(watch)
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, KILLED)
    return code == KILLED


class StoreModel(RuleBasedStateMachine):
    """The model: which epochs there are, and the values of the blocks that are done."""

    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp())
        self.path = self.root / "s.zarr"
        self.epochs: list[int] = []
        self.blocks: dict[tuple[int, int], dict[str, np.ndarray]] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @initialize(
        epochs=st.lists(EPOCHS, max_size=3, unique=True),
        measures=st.sampled_from(LISTS),
        operation=st.integers(0, 60),
    )
    def create(self, epochs: list[int], measures: Sequence[Measure], operation: int) -> None:
        self.measures = measures
        make = partial(make_store, self.path, *epochs, measures=measures)
        killed = killed_at(operation, self.root, make)
        if killed and not self.path.exists():
            make()
        self.store = ResultsStore.open(self.path)
        self.epochs = epochs

    @rule()
    def reopen(self) -> None:
        self.store = ResultsStore.open(self.path)

    @rule(epoch=EPOCHS, operation=st.none() | st.integers(0, 60))
    def append(self, epoch: int, operation: int | None) -> None:
        if epoch in self.epochs:
            return
        columns = epoch_columns(epoch)
        if operation is None:
            self.store.add_epochs(columns)
            self.epochs = [*self.epochs, epoch]
            return
        killed_at(operation, self.root, lambda: self.store.add_epochs(columns))
        self.store = ResultsStore.open(self.path)
        assert self.store.epochs in (self.epochs, [*self.epochs, epoch])
        self.epochs = self.store.epochs

    def _values(self, row: int, block: int) -> dict[str, np.ndarray]:
        epoch = self.epochs[row]
        return block_values(self.store, block, epoch, epoch >= FIRST_ACTIVE)

    @precondition(lambda self: self.epochs)
    @rule(data=st.data(), operation=st.none() | st.integers(0, 40))
    def write(self, data: st.DataObject, operation: int | None) -> None:
        """Write a block, also one that is done, as a worker does that was thought dead."""
        row = data.draw(st.integers(0, len(self.epochs) - 1))
        block = data.draw(st.integers(0, BLOCKS - 1))
        values = self._values(row, block)
        if operation is None:
            self.store.write_block(row, block, values)
        else:
            killed_at(operation, self.root, lambda: self.store.write_block(row, block, values))
        if self.store.is_done(row, block):
            self.blocks[self.epochs[row], block] = values
        else:
            assert operation is not None
            assert (self.epochs[row], block) not in self.blocks

    @rule()
    def finish_what_is_missing(self) -> None:
        """What a launch does."""
        done = self.store.done_blocks()
        for row, epoch in enumerate(self.epochs):
            for block in range(BLOCKS):
                assert done[row, block] == ((epoch, block) in self.blocks)
                if not done[row, block]:
                    values = self._values(row, block)
                    self.store.write_block(row, block, values)
                    self.blocks[epoch, block] = values
            self.store.set_epoch(row, complete=True)

    @rule()
    def check(self) -> None:
        found = verify(self.store)
        assert found.damage == []
        assert found.blocks == len(self.blocks)
        assert found.missing == BLOCKS * len(self.epochs) - len(self.blocks)

    @precondition(lambda self: self.blocks)
    @rule(generator=st.randoms(use_true_random=False), kind=st.sampled_from(KINDS))
    def damage_and_mend(self, generator: Any, kind: str) -> None:
        files = [path for path in chunk_files(self.path) if self._matters(path)]
        damage(kind, files, generator)
        found = verify(ResultsStore.open(self.path)).damage
        # An unfinished epoch's block that is not there is one that is not done yet.
        assert found or self.store.done_blocks().sum() == len(self.blocks) - 1
        repair(self.store, found)
        self.store = ResultsStore.open(self.path)
        restore_columns(self.store, sample_columns(), epoch_columns(*self.epochs))
        done = self.store.done_blocks()
        rows = self.store.rows
        self.blocks = {
            (epoch, block): values
            for (epoch, block), values in self.blocks.items()
            if done[rows[epoch], block]
        }

    def _matters(self, path: Path) -> bool:
        """Return whether a file is a column's, or of a block that is done."""
        name, place = path.relative_to(self.path).as_posix().split("/c/")
        if path.suffix == ".partial":
            return False
        if name in schema.COLUMN:
            return True
        row, block = map(int, place.split("/")[:2])
        return (self.epochs[row], block) in self.blocks if row < len(self.epochs) else False

    @rule()
    def export(self) -> None:
        finished = [
            epoch for epoch in self.epochs if all((epoch, b) in self.blocks for b in range(BLOCKS))
        ]
        out = self.root / "tree"
        list(export_epochs(self.store, out, finished, extras=True))
        for epoch in finished:
            for name in (measure.name for measure in self.measures):
                values = np.load(out / f"epoch_{epoch:04d}" / f"per_image_{name}.npy")
                np.testing.assert_array_equal(values, self._expected(name, epoch))
        shutil.rmtree(out, ignore_errors=True)

    @rule(operation=st.none() | st.integers(0, 120))
    def compact(self, operation: int | None) -> None:
        if len(self.blocks) < BLOCKS * len(self.epochs) or not self.epochs:
            return
        out = self.root / "compact.zarr"
        if operation is not None:
            killed_at(operation, self.root, lambda: compact(self.store, out))
        if not out.exists():
            compact(self.store, out)
        assert verify(ResultsStore.open(out)).damage == []
        self._agrees(out)
        shutil.rmtree(out)

    @invariant()
    def what_is_read_is_what_was_written(self) -> None:
        self._agrees(self.path)

    def _agrees(self, path: Path) -> None:
        results = open_results(path).load()
        assert results.epoch.values.tolist() == sorted(self.epochs)
        np.testing.assert_array_equal(results.label, LABELS)
        for name in (*(measure.name for measure in self.measures), "status"):
            for epoch in self.epochs:
                expected = self._expected(name, epoch)
                np.testing.assert_array_equal(results[name].sel(epoch=epoch), expected)

    def _expected(self, name: str, epoch: int) -> np.ndarray:
        variable = next(v for v in self.store.per_sample if v.name == name)
        values = np.full(N, variable.fill, variable.dtype)
        for block in range(BLOCKS):
            if found := self.blocks.get((epoch, block)):
                values[slice(*self.store.bounds(block))] = found[name]
        return values


# A process with threads is forked; zarr sees to its own.
TestStoreModel = pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")(StoreModel.TestCase)
TestStoreModel.settings = settings(
    max_examples=10,
    stateful_step_count=20,
    deadline=None,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # shrinking would take minutes
)
