"""Class schedules of any steps, against loops over epochs and positions."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from daskcurv.errors import ConfigError, DataError
from daskcurv.experiment.curriculum import Curriculum, Schedule
from daskcurv.experiment.schedules import Steps, of_tasks, read_steps

LAST = 60


@st.composite
def schedules(draw: st.DrawFn) -> Steps:
    sizes = draw(st.lists(st.integers(1, 5), min_size=1, max_size=5))
    gaps = draw(st.lists(st.integers(1, 9), min_size=len(sizes) - 1, max_size=len(sizes) - 1))
    epochs = (0, *np.cumsum(gaps).tolist()) if gaps else (0,)
    partition = draw(st.sampled_from(["entering", "trained"]))
    return Steps(epochs, tuple(np.cumsum(sizes).tolist()), partition, draw(st.integers(0, 1)))


@given(schedules())
def test_all_that_a_schedule_says_follows_from_its_steps(steps):
    total = steps.counts[-1]
    active, trained = [], []
    for number in range(LAST):
        finished = number + steps.ahead
        begun = finished if steps.class_partition == "entering" else max(finished - 1, 0)
        rows = [k for k, start in enumerate(steps.epochs) if start <= begun]
        assert steps.task(number, total) == rows[-1]
        assert steps.num_active(number, total) == steps.counts[rows[-1]]
        active.append(steps.counts[rows[-1]])
        # Weights have been trained on what was added before they were.
        seen = [steps.counts[k] for k, start in enumerate(steps.epochs) if start < finished]
        trained.append(max(seen, default=0))
    for position in range(total):
        first = next(number for number in range(LAST) if active[number] > position)
        assert steps.first_epoch_active(total)[position] == first
        first = next(number for number in range(LAST) if trained[number] > position)
        assert steps.first_epoch_trained(total)[position] == first
    order = tuple(range(total))
    assert Curriculum.of(Curriculum(order, steps).to_dict()) == Curriculum(order, steps)


@pytest.mark.parametrize("partition", ["entering", "trained"])
def test_equal_increments_are_steps_too(partition):
    schedule = Schedule(5, 3, 7, partition)
    steps = schedule.steps(12, ahead=0)
    assert steps.counts == (5, 8, 11, 12)
    for epoch in range(50):
        assert steps.task(epoch, 12) == schedule.task(epoch, 12)
        assert steps.num_active(epoch, 12) == schedule.num_active(epoch, 12)
    np.testing.assert_array_equal(steps.first_epoch_active(12), schedule.first_epoch_active(12))
    np.testing.assert_array_equal(steps.first_epoch_trained(12), schedule.first_epoch_trained(12))


def test_tasks_of_unequal_sizes():
    steps = of_tasks((50, 10, 10), 70, "entering")
    assert (steps.epochs, steps.counts) == ((0, 70, 140), (50, 60, 70))
    with pytest.raises(ConfigError, match="task_sizes 50, 0 with 70 epochs each"):
        of_tasks((50, 0), 70, "entering")


def test_a_csv_file_of_epochs_and_classes(tmp_path):
    path = tmp_path / "schedule.csv"
    path.write_text("epoch,classes\n0,50\n70,60\n")
    assert read_steps(path, "trained") == Steps((0, 70), (50, 60), "trained")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch,classes\n5,50\n", "begins at epoch 5; expected a row for epoch 0"),
        ("epoch,classes\n0,50\n70,50\n", "classes of the class schedule are 50, 50; expected incr"),
        ("epoch,classes\n0,x\n", "Expected a CSV file whose first line is epoch,classes"),
        ("epoch,count\n0,5\n", "Expected a CSV file whose first line is epoch,classes"),
        ("", "increasing numbers from 0"),
    ],
)
def test_a_file_that_is_no_schedule_is_refused(tmp_path, text, said):
    (tmp_path / "s.csv").write_text(text)
    with pytest.raises((ConfigError, DataError), match=said):
        read_steps(tmp_path / "s.csv", "entering")
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_steps(tmp_path / "none.csv", "entering")


def test_a_schedule_without_room_for_all_outputs_is_refused():
    with pytest.raises(ConfigError, match="ends with 4 classes, but the network has 6 outputs"):
        Steps((0,), (4,)).first_epoch_active(6)
