"""Class orders, schedules and the held-out split follow the training run's published table.

The order of experiment 0 and the formulas of the table are written out here; everything else is
checked against definitions evaluated one class, sample or epoch at a time.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from daskcurv.errors import ConfigError, DataError
from daskcurv.experiment.curriculum import (
    TRAIN,
    VALIDATION,
    Curriculum,
    Schedule,
    class_order_of,
    held_out_split,
    read_class_order,
)

FIRST_TWENTY = [8, 44, 23, 58, 49, 80, 64, 86, 30, 92, 38, 5, 25, 52, 6, 74, 14, 40, 37, 45]


def test_experiment_0_has_the_documented_class_order():
    order = class_order_of(0)
    assert order[:20].tolist() == FIRST_TWENTY
    assert order.dtype == np.int64


def mersenne_twister(seed: int) -> random.Random:
    """Return the generator that PyTorch and NumPy have for a seed, from its published recurrence.

    Python's own constructor would fill the state in another way.
    """
    state = [seed]
    for place in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + place) & 0xFFFFFFFF)
    generator = random.Random()
    generator.setstate((3, (*state, 624), None))
    return generator


@pytest.fixture(scope="module")
def seeds() -> list[int]:
    """The seeds of all experiments: 0 … 99,999, shuffled from the front."""
    generator, shuffled = mersenne_twister(42), list(range(100_000))
    for place in range(99_999):
        other = place + generator.getrandbits(32) % (100_000 - place)
        shuffled[place], shuffled[other] = shuffled[other], shuffled[place]
    return shuffled


@pytest.mark.parametrize(
    ("index", "begins"),
    [
        (0, FIRST_TWENTY[:6]),
        (1, [20, 33, 63, 56, 0, 94]),
        (2, [38, 78, 14, 57, 85, 39]),
        (99_999, [86, 69, 27, 41, 26, 72]),
    ],
)
@pytest.mark.parametrize("num_classes", [100, 10])
def test_class_orders_are_those_of_the_published_generators(seeds, index, begins, num_classes):
    generator, order = mersenne_twister(seeds[index]), list(range(num_classes))
    for place in range(num_classes - 1, 0, -1):  # shuffled from the back
        mask = (1 << place.bit_length()) - 1
        while (other := generator.getrandbits(32) & mask) > place:
            pass
        order[place], order[other] = order[other], order[place]
    assert class_order_of(index, num_classes).tolist() == order
    assert num_classes < 100 or order[:6] == begins


def test_every_class_order_is_a_permutation_and_a_different_one():
    orders = [class_order_of(index).tolist() for index in (0, 1, 2, 50_000, 99_999)]
    assert all(sorted(order) == list(range(100)) for order in orders)
    assert len({tuple(order) for order in orders}) == len(orders)
    assert class_order_of(1).tolist() == orders[1]


def test_class_order_leaves_the_global_generators_alone():
    torch_state, (_, numpy_keys, numpy_position, *_) = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    class_order_of(3)
    assert torch.equal(torch.get_rng_state(), torch_state)
    _, keys, position, *_ = np.random.get_state()  # noqa: NPY002
    np.testing.assert_array_equal(keys, numpy_keys)
    assert position == numpy_position


def test_class_order_does_not_depend_on_the_global_generators():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        assert class_order_of(0)[:20].tolist() == FIRST_TWENTY


@pytest.mark.parametrize("index", [-1, 100_000])
def test_experiments_that_do_not_exist_are_refused(index):
    with pytest.raises(ConfigError, match="experiment_index"):
        class_order_of(index)


def test_entering_schedule_is_the_documented_table():
    schedule = Schedule()
    active = [schedule.num_active(epoch, 100) for epoch in range(4001)]
    assert active == [min(100, 5 + 5 * (epoch // 200)) for epoch in range(4001)]


def test_trained_schedule_is_one_epoch_later():
    schedule = Schedule(class_partition="trained")
    active = [schedule.num_active(epoch, 100) for epoch in range(4001)]
    expected = [min(100, 5 + 5 * ((epoch - 1) // 200)) for epoch in range(1, 4001)]
    assert active == [5, *expected]


@settings(deadline=None)
@given(
    schedule=st.builds(
        Schedule,
        initial_classes=st.integers(1, 30),
        class_increment=st.integers(1, 30),
        class_frequency=st.integers(1, 50),
        class_partition=st.sampled_from(["entering", "trained"]),
    ),
    num_classes=st.integers(1, 25),
)
def test_first_active_epoch_is_the_first_at_which_enough_classes_are_active(schedule, num_classes):
    first = schedule.first_epoch_active(num_classes)
    assert first.shape == (num_classes,)
    for position, epoch in enumerate(first.tolist()):
        assert schedule.num_active(epoch, num_classes) > position
        assert epoch == 0 or schedule.num_active(epoch - 1, num_classes) <= position
        assert schedule.first_epoch_trained(num_classes)[position] == max(
            1, epoch + (schedule.class_partition == "entering")
        )


def test_the_first_epochs_trained_are_by_the_training_runs_formula():
    def seen(epoch: int) -> int:
        return min(100, 5 + 5 * ((epoch - 1) // 200)) if epoch else 0

    for partition in ("entering", "trained"):
        first = Schedule(class_partition=partition).first_epoch_trained(100)
        expected = [next(e for e in range(4001) if seen(e) > place) for place in range(100)]
        assert first.tolist() == expected


def test_what_an_identity_does_not_record_is_not_known():
    classes = {"order": [1, 0, 2], **Schedule(1, 1, 10).to_dict()}
    positions = np.array([2, -1, 0, 1], np.int16)
    assert Curriculum.of(classes).first_epochs_trained(positions).tolist() == [21, -1, 1, 11]
    assert Curriculum.of({"order": [1, 0, 2]}).first_epochs_trained(positions).tolist() == [-1] * 4


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("initial_classes", 0),
        ("class_increment", 0),
        ("class_frequency", -1),
        ("class_partition", "later"),
    ],
)
def test_schedules_that_make_no_sense_are_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        Schedule(**{name: value})


@settings(deadline=None)
@given(labels=st.lists(st.integers(0, 4), max_size=40), per_class=st.integers(0, 6))
def test_the_first_samples_of_each_class_are_held_out(labels, per_class):
    seen = dict.fromkeys(range(5), 0)
    expected = []
    for label in labels:
        expected.append(VALIDATION if seen[label] < per_class else TRAIN)
        seen[label] += 1
    split = held_out_split(np.array(labels, dtype=np.int64), per_class)
    assert split.dtype == np.uint8
    assert split.tolist() == expected


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i4"])
def test_a_class_order_is_read_back(tmp_path, dtype):
    np.save(tmp_path / "order.npy", np.array([3, 1, 0, 2], dtype=dtype))
    order = read_class_order(tmp_path / "order.npy", 4)
    assert order.tolist() == [3, 1, 0, 2]
    assert order.dtype == np.int64


@pytest.mark.parametrize(
    "order",
    [
        pytest.param([0, 1, 2], id="too short"),
        pytest.param([0, 1, 2, 3, 4], id="too long"),
        pytest.param([[0, 1], [2, 3]], id="two-dimensional"),
        pytest.param([0, 1, 1, 3], id="repeated"),
        pytest.param([1, 2, 3, 4], id="out of range"),
        pytest.param([-1, 0, 1, 2], id="negative"),
        pytest.param([0, 1, 2, np.nan], id="not a number"),
        pytest.param(["0", "1", "2", "3"], id="strings"),
    ],
)
def test_what_is_not_a_permutation_is_refused_by_file_name(tmp_path, order):
    np.save(tmp_path / "order.npy", np.array(order))
    with pytest.raises(DataError, match=r"order\.npy"):
        read_class_order(tmp_path / "order.npy", 4)


def test_object_arrays_are_refused_unopened(tmp_path):
    np.save(tmp_path / "order.npy", np.array([0, 1, 2, None], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"order\.npy"):
        read_class_order(tmp_path / "order.npy", 4)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"0\n1\n2\n3\n", id="text"),
        pytest.param(b"\x93NUMPY\x01\x00v\x00{'descr'", id="cut in the header"),
        pytest.param(b"PK\x03\x04 is how a zip file begins", id="damaged zip"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, content):
    (tmp_path / "order.npy").write_bytes(content)
    with pytest.raises(DataError, match=r"order\.npy"):
        read_class_order(tmp_path / "order.npy", 4)


def test_archives_of_arrays_are_refused_by_name(tmp_path):
    np.savez(tmp_path / "order.npz", order=np.arange(4))
    with pytest.raises(DataError, match=r"order\.npz"):
        read_class_order(tmp_path / "order.npz", 4)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.npy"):
        read_class_order(tmp_path / "nowhere.npy", 4)
