"""What is stored, for xarray to hold and read when a value is needed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr
from numpy.typing import NDArray
from xarray.backends import BackendArray
from xarray.core import indexing

from daskcurv.storage.chunks import Key
from daskcurv.storage.stored import Stored


class Lazy(BackendArray):
    """Something for xarray to hold and index, computed from what is stored.

    Parameters
    ----------
    like : Stored
        Of the same shape.
    dtype : numpy dtype
    read : callable
        Maps an orthogonal selection to values. It has to be picklable, as the dataset is handed to
        other processes with it.
    """

    def __init__(self, like: Stored, dtype: Any, read: Callable[[Key], NDArray[Any]]):
        self.shape = like.shape
        self.dtype = np.dtype(dtype)
        self._read = read

    def __getitem__(self, key: indexing.ExplicitIndexer) -> Any:
        return indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.OUTER, self._read
        )


def lazy_variable(
    like: Stored, dtype: Any, read: Callable[[Key], NDArray[Any]], attrs: dict[str, Any]
) -> xr.Variable:
    """Return a variable of xarray with dimensions (epoch, sample) that is read when needed."""
    data = indexing.LazilyIndexedArray(Lazy(like, dtype, read))
    return xr.Variable(("epoch", "sample"), data, attrs)
