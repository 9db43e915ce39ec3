"""The table of active classes by epoch, and checks of the class order."""

from __future__ import annotations

import numpy as np

from daskcurv.experiment.class_order import find_class_order
from daskcurv.experiment.curriculum import Schedule, class_order_of
from daskcurv.runs.options import LaunchOptions

DOCUMENTED_START = (8, 44, 23, 58, 49, 80, 64, 86, 30, 92, 38, 5, 25, 52, 6, 74, 14, 40, 37, 45)
"""The first classes of experiment index 0 in the documentation of the training run."""

SHOWN = 5
"""Classes shown at each end of a long list."""


def verify_class_partitioning(options: LaunchOptions, num_classes: int = 100) -> bool:
    """Print the table of active classes and check the class order.

    Parameters
    ----------
    options : LaunchOptions
        Path of the class order, and the schedule.
    num_classes : int

    Returns
    -------
    bool
        Whether all checks passed.

    Raises
    ------
    DataError
        If the class order file is not a permutation of all classes.
    """
    order, source = find_class_order(
        options.class_order, options.model_dir, options.experiment_index, num_classes
    )
    schedule = options.schedule
    first_active = schedule.first_epoch_active(num_classes)
    print(f"class order: {source}")
    print(f"schedule: {_description(schedule)}")
    print(f"{'Epoch':>5}  {'Task':>4}  {'#Classes':>8}  Active Classes (cumulative, shortened)")
    for epoch in np.unique(first_active).tolist():
        active = schedule.num_active(epoch, num_classes)
        task = schedule.task(epoch, num_classes)
        print(f"{epoch:>5}  {task:>4}  {active:>8}  {_shortened(order[:active].tolist())}")

    expected = class_order_of(options.experiment_index, num_classes)
    epochs = np.arange(first_active.max() + schedule.class_frequency + 1)
    counted = (first_active <= epochs[:, None]).sum(axis=1)
    tabled = [schedule.num_active(int(epoch), num_classes) for epoch in epochs]
    checks = {
        f"every class 0 … {num_classes - 1} appears exactly once": bool(
            np.array_equal(np.sort(order), np.arange(num_classes))
        ),
        "at every epoch, as many classes are active as the schedule gives": bool(
            np.array_equal(counted, tabled)
        ),
        f"the class order is the one of experiment index {options.experiment_index}": bool(
            np.array_equal(order, expected)
        ),
    }
    if options.experiment_index == 0 and num_classes == 100:
        count = len(DOCUMENTED_START)
        checks[f"the first {count} classes are the documented ones"] = bool(
            np.array_equal(order[:count], DOCUMENTED_START)
        )
    for check, passed in checks.items():
        print(f"{'ok  ' if passed else 'FAIL'}  {check}")
    verdict = all(checks.values())
    print(
        f"verdict: class partitioning {'verified' if verdict else 'not verified: see FAIL above'}"
    )
    return verdict


def _description(schedule: Schedule) -> str:
    when = {
        "entering": "active from the epoch at which they are added",
        "trained": "active from the first epoch that was trained on them",
    }[schedule.class_partition]
    return (
        f"{schedule.initial_classes} classes at epoch 0, {schedule.class_increment} more every "
        f"{schedule.class_frequency} epochs, {when} ({schedule.class_partition})"
    )


def _shortened(classes: list[int]) -> str:
    shown = list(map(str, classes))
    if len(shown) > 2 * SHOWN:
        shown[SHOWN:-SHOWN] = ["…"]
    return ", ".join(shown)
