"""Which samples a training run held out, where a file says so."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import ConfigError, DataError
from daskcurv.places import leads_nowhere

FIRST = "first:"
"""Before a number in ``--held_out``: the first samples of each class."""


def first_of_each_class(text: str) -> int | None:
    """Return N of ``first:N``, or None if it is the name of a file.

    Raises
    ------
    ConfigError
        If there is no such number.
    """
    if not text.startswith(FIRST):
        return None
    number = text.removeprefix(FIRST)
    if not (number.isascii() and number.isdigit()):
        raise ConfigError(
            f"held_out is {text!r}; expected first:N with a number of samples per class, such as "
            "first:50, or an .npy file (write ./ before a file with such a name)"
        )
    return int(number)


def read_held_out(path: Path, num_samples: int) -> NDArray[np.bool_]:
    """Read which samples were held out.

    Parameters
    ----------
    path : Path
        An ``.npy`` file: bool of shape (N,), or the numbers of the samples as integers.
    num_samples : int
        N, the length of the data set.

    Returns
    -------
    ndarray of bool, shape (N,)
        At least one sample is not held out.

    Raises
    ------
    DataError
        If the file cannot be read or does not fit the data set.
    """
    expected = (
        f"bool of shape ({num_samples},), True for samples that were not trained on, or the "
        "numbers of these samples as integers"
    )
    try:
        with open(path, "rb") as file:
            values = np.lib.format.read_array(file, allow_pickle=False)
    except OSError as error:
        reason = leads_nowhere(path) or error.strerror
        raise DataError(
            f"held_out {path} cannot be read: {reason}; expected an .npy file: {expected}"
        ) from error
    except Exception as error:
        # A damaged header can fail in the tokenizer, the decoder or the reader.
        raise DataError(
            f"held_out {path} cannot be read as an .npy file: {error}; expected {expected}"
        ) from error
    if values.dtype.kind not in "biu" or values.ndim != 1:
        raise DataError(
            f"held_out {path} has shape {values.shape} and dtype {values.dtype}; expected "
            f"{expected}"
        )
    if values.dtype != bool:
        held_out = _mask(path, values, num_samples)
    elif len(values) == num_samples:
        held_out = values
    else:
        raise DataError(
            f"held_out {path} is a mask of {len(values)} samples; the data set has {num_samples}"
        )
    if held_out.all():
        raise DataError(
            f"held_out {path} holds out all {num_samples} samples; expected some that were trained "
            "on (True stands for a sample that was not)"
        )
    return held_out


def _mask(path: Path, numbers: NDArray[np.integer], num_samples: int) -> NDArray[np.bool_]:
    strange = numbers[(numbers < 0) | (numbers >= num_samples)]
    if len(strange):
        raise DataError(
            f"held_out {path} has sample {strange[0]}; expected numbers from 0 to {num_samples - 1}"
        )
    found, count = np.unique(numbers, return_counts=True)
    if (count > 1).any():
        of_flags = len(numbers) == num_samples and found.tolist() in ([0, 1], [0], [1])
        hint = "; a mask needs the dtype bool" if of_flags else ""
        raise DataError(
            f"held_out {path} has sample {found[count > 1][0]} more than once; expected each once"
            f"{hint}"
        )
    mask = np.zeros(num_samples, bool)
    mask[numbers.astype(np.int64)] = True
    return mask


def digest_of(held_out: NDArray[np.bool_]) -> str:
    """Return the sha256 (hex) of a mask, whichever way its file says it."""
    return hashlib.sha256(held_out.astype(np.uint8).tobytes()).hexdigest()
