"""What happens in a run, as data, and those who watch it.

The loop yields events; observers are told of each, in their order. An observer is any callable that
takes an event. Observers know nothing of each other, and the loop knows none of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Generic, TypeVar

from daskcurv.clusters.base import Workers
from daskcurv.runs.tasks import BlockResult, BlockTask

Task = TypeVar("Task")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Opened:
    """The store is open, and the experiment is one that it can hold.

    Attributes
    ----------
    store : Path
        Where it lies, links followed.
    """

    store: Path


@dataclass(frozen=True)
class Started:
    """The cluster is open, and blocks are about to be computed.

    Attributes
    ----------
    cluster : {"local", "slurm", "allocation", "connect"}
    dashboard : str
        How to open Dask's dashboard, empty if there is none.
    epochs, blocks, samples : int
        To be computed; of the epochs, those that lack any block.
    """

    cluster: str
    dashboard: str
    epochs: int
    blocks: int
    samples: int


@dataclass(frozen=True)
class Done(Generic[Task, Result]):
    """A task is done."""

    task: Task
    result: Result


@dataclass(frozen=True)
class Failed(Generic[Task]):
    """A task failed and will be tried again."""

    task: Task
    reason: str


@dataclass(frozen=True)
class SetAside(Generic[Task]):
    """A task failed repeatedly and will not be tried again in this run."""

    task: Task
    reason: str
    error: BaseException | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Polled:
    """The workers were counted; about once a second.

    Attributes
    ----------
    workers : Workers
    computing : int
        Tasks being computed.
    connected : frozenset of str
        Dask addresses of the connected workers.
    """

    workers: Workers
    computing: int
    connected: frozenset[str] = frozenset()


@dataclass(frozen=True)
class EpochComplete:
    """An epoch has all its blocks.

    Attributes
    ----------
    epoch : int
    row : int
        The epoch's row in the store.
    computed : bool
        Whether a block of it was computed in this run; False if it had all before.
    """

    epoch: int
    row: int
    computed: bool = True


@dataclass(frozen=True)
class Ended:
    """No more blocks are computed, for whatever reason; always follows `Started`."""


Event = (
    Opened
    | Started
    | Done[BlockTask, BlockResult]
    | Failed[BlockTask]
    | SetAside[BlockTask]
    | Polled
    | EpochComplete
    | Ended
)
Observer = Callable[[Event], None]


def tell(observers: Sequence[Observer], event: Event) -> None:
    """Tell all observers of an event, in their order; an error of one ends the run."""
    for observer in observers:
        observer(event)


@contextmanager
def watched(observers: Sequence[Observer]) -> Iterator[Observer]:
    """Provide a function that tells all observers of an event.

    When the context ends, in whatever way, each is told so, also if another raises.
    """
    with ExitStack() as stack:
        for observer in reversed(observers):
            stack.callback(observer, Ended())
        yield partial(tell, observers)
