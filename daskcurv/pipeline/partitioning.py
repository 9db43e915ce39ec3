"""Which classes are active when, as a table and a verdict."""

from __future__ import annotations

import numpy as np

from daskcurv.classes import class_order_of
from daskcurv.pipeline.class_order import find_class_order
from daskcurv.pipeline.options import LaunchOptions

DOCUMENTED_START = (8, 44, 23, 58, 49, 80, 64, 86, 30, 92, 38, 5, 25, 52, 6, 74, 14, 40, 37, 45)
"""The class order of experiment index 0 as the training run's documentation gives it."""


def verify_class_partitioning(options: LaunchOptions, num_classes: int = 100) -> bool:
    """Print the schedule of active classes and check the class order.

    Parameters
    ----------
    options : LaunchOptions
        Says where the class order is, and the schedule.
    num_classes : int

    Returns
    -------
    bool
        Whether the order is the one that the experiment index determines.

    Raises
    ------
    DataError
        If the class order file is not a permutation of all classes.
    """
    order, source = find_class_order(options, num_classes)
    schedule = options.schedule
    first_active = schedule.first_epoch_active(num_classes)
    print(f"class order: {source}")
    print(f"schedule: {schedule}")
    print(f"{'from epoch':>10}  {'active':>6}  classes added")
    for epoch in np.unique(first_active).tolist():
        added = order[first_active == epoch]
        active = schedule.num_active(epoch, num_classes)
        print(f"{epoch:>10}  {active:>6}  {' '.join(map(str, added))}")

    expected = class_order_of(options.experiment_index, num_classes)
    epochs = np.arange(first_active.max() + schedule.class_frequency + 1)
    counted = (first_active <= epochs[:, None]).sum(axis=1)
    tabled = [schedule.num_active(int(epoch), num_classes) for epoch in epochs]
    checks = {
        f"every class 0 … {num_classes - 1} appears exactly once": bool(
            np.array_equal(np.sort(order), np.arange(num_classes))
        ),
        "at every epoch, the classes added so far are as many as the schedule says": bool(
            np.array_equal(counted, tabled)
        ),
        f"the order is that of experiment index {options.experiment_index}": bool(
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
    print(f"verdict: class partitioning {'verified' if verdict else 'differs, see above'}")
    return verdict
