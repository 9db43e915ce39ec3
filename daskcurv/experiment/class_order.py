"""The source of a run's class order: a file, or the experiment's index.

A wrong order gives wrong results without any error. So the order is regenerated only if there is
nothing that may be the file: a link that leads nowhere, a file of almost the same name, or a
directory that cannot be read is refused.
"""

from __future__ import annotations

import logging
import re
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError
from daskcurv.experiment.curriculum import class_order_of, read_class_order
from daskcurv.places import exists, leads_nowhere, listed, names_in

log = logging.getLogger(__name__)

REGENERATE = Path("regenerate")
"""Asks for the order that the experiment's index determines, whatever files there are."""

REGENERATED = "regenerated from experiment_index"


def find_class_order(
    path: Path | None, model_dir: Path, experiment_index: int, num_classes: int
) -> tuple[NDArray[np.int64], str]:
    """Read the class order, or regenerate it if there is no file.

    Parameters
    ----------
    path : Path or None
        By default ``class_order/index-{i}.npy`` beside `model_dir`; `REGENERATE` to regenerate it
        whatever files there are.
    model_dir : Path
    experiment_index : int
    num_classes : int

    Returns
    -------
    order : ndarray of int64, shape (num_classes,)
    source : str
        The file, or how it was regenerated.

    Raises
    ------
    DataError
        If the file cannot be used, or there is none but something that may be it.
    """
    index = experiment_index
    expected = class_order_of(index, num_classes)
    if path == REGENERATE:
        log.info("class order regenerated from experiment index %d, as requested", index)
        return expected, f"{REGENERATED}, as requested"
    named = path is not None
    path = path or _beside(model_dir) / f"index-{index}.npy"
    if not named and not exists(path, "class order"):
        others = _refuse_what_may_be_it(path, index)
        log.warning(
            "class order %s does not exist; regenerated from experiment index %d%s",
            path,
            index,
            f" ({others})" if others else "",
        )
        return expected, f"{REGENERATED}; {others}" if others else REGENERATED
    if get_close_matches(str(path), [str(REGENERATE)]) and not exists(path, "class order"):
        raise DataError(f"class order {path} does not exist; did you mean {REGENERATE}?")
    order = read_class_order(path, num_classes)
    if not np.array_equal(order, expected):
        log.info(
            "class order %s is used; it differs from the one drawn for experiment index %d",
            path,
            index,
        )
    return order, str(path)


def _beside(models: Path) -> Path:
    if models.name in ("", ".."):  # spelled like "." or "../..", which have no parent by name
        models = models.resolve()
    return models.parent / "class_order"


def _refuse_what_may_be_it(path: Path, index: int) -> str:
    """Raise if something may be the file that is missing; else return what else is there."""
    advice = (
        "Name the file with --class_order, or use --class_order regenerate to draw the order from "
        f"experiment index {index}"
    )
    for link in (path, path.parent):
        if where := leads_nowhere(link):
            raise DataError(f"class order {path} cannot be read: {link}: {where}. {advice}")
    try:
        names = names_in(path.parent)
    except FileNotFoundError:
        if alike := _alike_directories(path.parent):
            raise DataError(
                f"class order {path} does not exist, but {path.parent.parent} has {listed(alike)}. "
                f"{advice}"
            ) from None
        return ""
    except OSError as error:
        raise DataError(f"{path.parent} cannot be read: {error.strerror}. {advice}") from error
    visible = [name for name in names if not name.startswith(".")]
    may_be_it = [name for name in visible if _may_be_of(index, name)]
    if may_be_it:
        raise DataError(
            f"class order {path} does not exist, but {path.parent} has {listed(may_be_it)}, which "
            f"may be the same file under another name. {advice}"
        )
    return f"{path.parent} has only {listed(visible)}" if visible else ""


def _may_be_of(index: int, name: str) -> bool:
    """Return whether a file may belong to an experiment: unless its name has other numbers only."""
    numbers = [int(number) for number in re.findall(r"\d+", name)]
    return index in numbers or not numbers


def _alike_directories(directory: Path) -> list[str]:
    """Return neighbours of a missing directory whose names differ in case, separator or plural."""
    try:
        names = names_in(directory.parent)
    except OSError:
        return []  # that it may not be listed says nothing about what is in it

    def core(name: str) -> str:
        return re.sub(r"[\W_]", "", name).casefold().removesuffix("s")

    return [name for name in names if core(name) == core(directory.name)]
