"""Training sets: one module a format.

A format is two functions: one that recognises it, and one that reads it as a `Dataset`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from daskcurv.experiment.data import cifar
from daskcurv.experiment.data.dataset import Arrays, Dataset


@dataclass(frozen=True)
class Format:
    """A way in which training sets are stored.

    Attributes
    ----------
    recognises : callable
        Whether a path holds a training set of this format.
    read : callable
        Reads it; raises `DataError` if it is damaged, or not as documented.
    """

    recognises: Callable[[Path], bool]
    read: Callable[[Path], Dataset]


FORMATS = [Format(cifar.recognises, cifar.read_cifar)]


def read_dataset(path: Path) -> Dataset:
    """Read a training set in any of the formats.

    Raises
    ------
    DataError
        If it is in none of them: what the first format expects.
    """
    recognised = (one for one in FORMATS if one.recognises(path))
    return next(recognised, FORMATS[0]).read(path)


__all__ = ["FORMATS", "Arrays", "Dataset", "Format", "read_dataset"]
