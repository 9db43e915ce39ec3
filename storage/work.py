"""Work on a whole store, in pieces that can be done at the same time."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from dask import compute, delayed  # type: ignore[attr-defined]
from dask.callbacks import Callback
from tqdm import tqdm

from daskcurv.errors import DaskcurvError
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
    """Call a function for each piece of work, in processes through Dask, showing progress.

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
    calls = [delayed(function, pure=False)(*piece) for piece in pieces]
    processes = min(at_once or len(os.sched_getaffinity(0)), len(calls))
    scheduler = "processes" if processes > 1 else "synchronous"
    with tqdm(total=len(calls), desc=description, disable=None) as bar:
        progress: Any = Callback(posttask=lambda *_: bar.update())  # type: ignore[no-untyped-call]
        try:
            with progress:
                results: tuple[Result, ...] = compute(  # type: ignore[no-untyped-call]
                    *calls,
                    scheduler=scheduler,
                    num_workers=processes,
                    chunksize=1,
                    optimize_graph=False,
                )
        except DaskcurvError as error:
            # Dask adds the other process's traceback to the text, which is for the user.
            raise getattr(error, "exception", error) from None
    return list(results)
