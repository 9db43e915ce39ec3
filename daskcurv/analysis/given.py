"""What is known of samples from elsewhere, read from npy and CSV files: flags and scores.

A file that fits in no way, or in more than one, is refused: read wrongly, it would give a result
all the same.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from daskcurv.errors import DataError


def read_flags(path: Path, num_samples: int) -> NDArray[np.bool_]:
    """Read which samples are flagged.

    The file has either 1 or 0 for each sample, in data-set order, or the numbers of those flagged,
    each once.

    Returns
    -------
    ndarray of bool, shape (num_samples,)
        Some are true, and some are false.

    Raises
    ------
    DataError
        If the file cannot be read, does not fit, or flags no sample or all of them.
    """
    expected = f"({num_samples},) of 1 and 0, or the numbers of the flagged samples, each once"
    values = _read_numbers(path, expected)
    if values.ndim != 1:
        raise DataError(f"{path} has shape {values.shape}; expected {expected}")
    binary = bool(np.isin(values, (0, 1)).all())
    if binary and len(values) == num_samples:
        flagged = np.asarray(values == 1)
    elif values.dtype == bool:
        raise DataError(f"{path} is a mask of {len(values)} samples; expected {expected}")
    else:
        flagged = np.zeros(num_samples, bool)
        flagged[_numbers_of_samples(path, values, num_samples, binary)] = True
    if not flagged.any():
        raise DataError(f"{path} flags no sample; expected {expected}")
    if flagged.all():
        raise DataError(
            f"{path} flags all {num_samples} samples; expected some to tell apart from the others"
        )
    return flagged


def read_scores(path: Path, num_samples: int) -> NDArray[np.float64]:
    """Read one number per sample, in data-set order.

    A CSV file has one number per line, or ``sample,number``, and perhaps a line of names first.
    Samples that it does not list are NaN.

    Returns
    -------
    ndarray of float64, shape (num_samples,)
        NaN where there is no score; at least two differ.

    Raises
    ------
    DataError
        If the file cannot be read, does not fit, or says nothing about the order of samples.
    """
    values = _read_numbers(path, f"({num_samples},), or lines of sample,number").astype(np.float64)
    if values.ndim == 2 and values.shape[1] == 2:
        numbers = values[:, 1]
        places = _numbers_of_samples(path, values[:, 0], num_samples)
        values = np.full(num_samples, np.nan)
        values[places] = numbers
    if values.shape != (num_samples,):
        raise DataError(
            f"{path} has shape {values.shape}; expected ({num_samples},), one number per sample in "
            "data-set order"
        )
    if infinite := np.flatnonzero(np.isinf(values)).tolist():
        raise DataError(
            f"{path} has an infinite score for sample {infinite[0]}; expected finite numbers, or "
            "nan where there is none"
        )
    if len(np.unique(values[~np.isnan(values)])) < 2:
        raise DataError(
            f"{path} has no two different scores; expected numbers by which samples can be ranked"
        )
    return values


def _numbers_of_samples(
    path: Path, values: NDArray[Any], num_samples: int, binary: bool = False
) -> NDArray[np.int64]:
    strange = values[~np.isin(values, np.arange(num_samples))]
    if len(strange):
        raise DataError(
            f"{path} has {strange[0]:g} among the numbers of samples; expected integers from 0 to "
            f"{num_samples - 1}"
        )
    found, count = np.unique(values, return_counts=True)
    if (count > 1).any():
        mask = f"; a mask of 1 and 0 has {num_samples} of them" if binary else ""
        raise DataError(
            f"{path} has {len(values)} numbers, sample {found[count > 1][0]:g} more than once; "
            f"expected each sample once{mask}"
        )
    return values.astype(np.int64)


def _read_numbers(path: Path, expected: str) -> NDArray[Any]:
    """Return the numbers of a file: booleans as they are, all others as float64."""
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
            return values if values.dtype == bool else np.asarray(values, np.float64)
        rows = [line.split(",") for line in path.read_text().splitlines() if line.strip()]
        if rows and not any(_is_number(field) for field in rows[0]):
            rows = rows[1:]  # names
        if not rows:
            raise ValueError("it has no numbers")
        table = np.array(rows, np.float64)
    except (OSError, TypeError, ValueError) as error:
        raise DataError(f"{path} cannot be read ({error}); expected numbers: {expected}") from error
    return table[:, 0] if table.shape[1] == 1 else table


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
