"""A few of many."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def evenly(count: int, most: int) -> NDArray[np.intp]:
    """Return at most `most` of the places 0 … `count` − 1, evenly spread, the ends among them."""
    places: NDArray[np.intp] = np.unique(
        np.linspace(0, count - 1, min(most, count)).round().astype(np.intp)
    )
    return places
