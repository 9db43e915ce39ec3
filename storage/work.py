"""Work on a whole store, in pieces that can be done at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import starmap
from multiprocessing import get_context
from typing import Any, TypeVar

from tqdm import tqdm

from daskcurv.storage.working import ResultsStore

_AT_ONCE = 4
"""Processes, so that memory stays within 8 GB on machines of any size."""
_WORTH_PROCESSES = 2000

Result = TypeVar("Result")


def processes_for(store: ResultsStore) -> int:
    """Return how many processes save time on a store of this size."""
    return _AT_ONCE if len(store.epochs) * store.num_blocks > _WORTH_PROCESSES else 1


def do_all(
    function: Callable[..., Result],
    pieces: Iterable[tuple[Any, ...]],
    *,
    description: str,
    at_once: int | None = None,
) -> list[Result]:
    """Call a function for each piece of work, in processes, showing progress.

    Parameters
    ----------
    function : callable
        Of a module, so that other processes find it.
    pieces : iterable of tuple
        Arguments of each call.
    description : str
        Of the progress bar.
    at_once : int, optional
        Most processes; by default one per core. With one, or one piece, there are no others.

    Returns
    -------
    list
        Results in the order of `pieces`.
    """
    calls = list(pieces)
    processes = min(at_once or len(os.sched_getaffinity(0)), len(calls))
    bar = partial(tqdm, total=len(calls), desc=description, disable=None)
    if processes <= 1:
        return list(bar(starmap(function, calls)))
    # Spawned: a fork of a process with threads can deadlock.
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        return list(bar(pool.map(function, *zip(*calls, strict=True))))
