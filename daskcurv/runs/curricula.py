"""The classes of an experiment, and when they are active, as a run's options say it."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from daskcurv.errors import ConfigError
from daskcurv.experiment.class_order import find_class_order
from daskcurv.experiment.curriculum import Curriculum, Schedule, read_class_order
from daskcurv.experiment.schedules import Steps, of_tasks, read_steps
from daskcurv.runs.options import LaunchOptions

NONE = "none"
"""Of `LaunchOptions.class_schedule`: all classes from the start."""

NEVER = 10**9
"""An epoch that no training run comes to."""

BY_LABEL = "the order of the labels"


def curriculum_of(options: LaunchOptions, num_classes: int) -> tuple[Curriculum, str]:
    """Return the order of the classes with their schedule, and where the order comes from.

    Only the documented training run has an order and increments by default. Any other has all its
    classes from the start, unless the options say when they are added.

    Raises
    ------
    ConfigError, DataError
        If what the options name cannot be used.
    """
    schedule = _schedule(options, num_classes)
    if options.documented:
        order, source = find_class_order(
            options.class_order, options.model_dir, options.experiment_index, num_classes
        )
    elif options.class_order is not None:
        order, source = read_class_order(options.class_order, num_classes), str(options.class_order)
    else:
        if options.outputs == "class_order":
            raise ConfigError(
                "--outputs class_order needs the order of the classes; name its file with "
                "--class_order FILE.npy"
            )
        order, source = np.arange(num_classes), BY_LABEL
    return Curriculum(tuple(order.tolist()), schedule), source


def _schedule(options: LaunchOptions, num_classes: int) -> Schedule | Steps:
    schedule, partition = options.schedule, options.schedule.class_partition
    ahead = int(options.epoch_means == "last")
    steps: Steps | None = None
    if options.task is not None:
        count = schedule.num_active(options.task * schedule.class_frequency + 1, num_classes)
        # The others are never added.
        later = {NEVER: num_classes} if count < num_classes else {}
        return Steps((0, *later), (count, *later.values()), partition, ahead)
    if options.class_schedule == NONE:
        steps = Steps((0,), (num_classes,), partition)
    elif options.class_schedule is not None:
        steps = read_steps(Path(options.class_schedule), partition)
    elif options.task_sizes is not None and options.task_epochs is not None:
        steps = of_tasks(_sizes(options.task_sizes), options.task_epochs, partition)
    elif not options.documented and schedule == Schedule(class_partition=partition):
        steps = Steps((0,), (num_classes,), partition)
    if steps is not None:
        return Steps(steps.epochs, steps.counts, partition, ahead)
    return schedule.steps(num_classes, ahead) if ahead else schedule


def _sizes(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError:
        raise ConfigError(
            f"task_sizes is {text!r}; expected whole numbers such as 50,10,10"
        ) from None


def described(curriculum: Curriculum, source: str) -> str:
    """Return when classes become active, in words."""
    schedule = curriculum.schedule
    if isinstance(schedule, Steps) and len(schedule.counts) == 1:
        return f"all {len(curriculum.order)} classes are active from the start"
    return f"classes become active in {source}"
