"""A training run's weight files: each read through, checked and described, all listed if not good.

`daskcurv.experiment.naming` finds them, `daskcurv.experiment.weight_files` reads one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from daskcurv.errors import CheckpointError
from daskcurv.experiment.networks import Network
from daskcurv.experiment.payload import BARE, Payload
from daskcurv.experiment.weight_files import READERS, read_state_dict, unreadable
from daskcurv.logs import counted
from daskcurv.places import listed

_NEVER_NEGATIVE = ("running_var", "num_batches_tracked")
"""What every normalisation layer of PyTorch calls its variances, and the count behind them."""

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file whose contents have been checked.

    Attributes
    ----------
    epoch : int
    path : Path
    sha256 : str
        Hex digest of the file.
    size : int
        Bytes.
    mtime_ns : int
        Modification time in nanoseconds. If it or the size has changed, the file is read again.
    """

    epoch: int
    path: Path
    sha256: str
    size: int
    mtime_ns: int

    COLUMNS: ClassVar = (
        "checkpoint", "checkpoint_sha256", "checkpoint_size", "checkpoint_mtime_ns"
    )  # fmt: skip

    def columns(self) -> dict[str, Any]:
        """Return what a store records of the file."""
        values = (self.path.name, self.sha256, self.size, self.mtime_ns)
        return dict(zip(self.COLUMNS, values, strict=True))


def check_weights(
    expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], path: Path
) -> None:
    """Check that a state dict has the expected keys, shapes and dtypes, and valid values.

    Values are valid if they are finite, and neither variances nor counts are negative.

    Raises
    ------
    CheckpointError
        Naming the keys, shapes or dtypes that differ, or the weights whose values are invalid.
    """
    problems = []
    # Files from before PyTorch 0.4.1 have no counts of batches, which nothing here depends on.
    counts = {key for key in expected if key.endswith(".num_batches_tracked")}
    if missing := [key for key in expected if key not in state_dict and key not in counts]:
        problems.append(f"missing {listed(missing)}")
    if unexpected := [key for key in state_dict if key not in expected]:
        problems.append(f"unexpected {listed(unexpected)}")
    # Loading would convert another dtype without a word, and so change the weights.
    for what, describe in (("shape", _shape), ("dtype", _dtype)):
        different = [
            f"{key} has {what} {describe(state_dict[key])} instead of {describe(value)}"
            for key, value in expected.items()
            if key in state_dict and describe(state_dict[key]) != describe(value)
        ]
        if different:
            problems.append(listed(different))
    if problems:
        raise CheckpointError(f"checkpoint {path} does not fit the network: {'; '.join(problems)}")
    broken = [
        key
        for key, value in state_dict.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise CheckpointError(
            f"checkpoint {path} holds NaN or infinite weights in {listed(broken)}; the training "
            "run diverged or the file is damaged. Exclude this epoch with --epochs"
        )
    negative = [
        key
        for key, value in state_dict.items()
        if key.rpartition(".")[2] in _NEVER_NEGATIVE and (value < 0).any()
    ]
    if negative:
        raise CheckpointError(
            f"checkpoint {path} holds negative values in {listed(negative)}, which must not be "
            "negative; the file is damaged, or its statistics do not come from training. "
            "Write it again from the training run, or exclude this epoch with --epochs"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def check_all(
    paths: Mapping[int, Path],
    network: Network,
    known: Mapping[int, Checkpoint],
    on_done: Callable[[int], None] = lambda count: None,
    payload: Payload = BARE,
    completed: Callable[[int, Weights, Weights], Weights] = lambda epoch, weights, expected: (
        weights
    ),
) -> list[Checkpoint]:
    """Read every checkpoint once: digest, keys, shapes, finite weights.

    Parameters
    ----------
    paths : mapping
        File by epoch.
    network : Network
        The one they must fit.
    known : mapping
        Checkpoints that were checked before. Files whose size and modification time are the same
        are not read again, unless other files of `paths` have that size and time too: where
        times are normalised, they identify no file.
    on_done : callable
        Called with the number of files checked so far.
    payload : Payload
        Where the weights are in each file.
    completed : callable
        Returns the weights of an epoch with what the network expects and they need not have; see
        `daskcurv.experiment.experiment.Experiment.with_all_outputs`.

    Returns
    -------
    list of Checkpoint
        In the order of `paths`.

    Raises
    ------
    CheckpointError
        Listing every file that cannot be used.
    """
    expected = network.build().state_dict()

    def look_at(epoch: int) -> tuple[int, int] | None:
        try:
            status = paths[epoch].stat()
        except OSError:
            return None  # reading says why
        return status.st_size, status.st_mtime_ns

    def check(epoch: int) -> Checkpoint | CheckpointError:
        path, before, seen = paths[epoch], known.get(epoch), looks[epoch]
        if before and seen == (before.size, before.mtime_ns) and times[seen] == 1:
            return Checkpoint(epoch, path, before.sha256, before.size, before.mtime_ns)
        try:
            status = path.stat()
            state_dict, sha256 = read_state_dict(path, payload)
            check_weights(expected, completed(epoch, state_dict, expected), path)
        except CheckpointError as error:
            return error
        except OSError as error:
            return unreadable(path, error)
        return Checkpoint(epoch, path, sha256, status.st_size, status.st_mtime_ns)

    checked: list[Checkpoint] = []
    errors: dict[Path, CheckpointError] = {}
    with ThreadPoolExecutor(READERS) as pool:
        looks = dict(zip(paths, pool.map(look_at, paths), strict=True))
        times = Counter(looks.values())
        for epoch, result in zip(paths, pool.map(check, paths), strict=True):
            if isinstance(result, CheckpointError):
                errors[paths[epoch]] = result
            else:
                checked.append(result)
            on_done(len(checked) + len(errors))
    if errors:
        raise CheckpointError(_joined(errors))
    return checked


def _joined(errors: Mapping[Path, CheckpointError]) -> str:
    """Return all messages; once, if that of several files is the same but for their names."""
    alike: dict[str, list[Path]] = {}
    for path, error in errors.items():
        alike.setdefault(str(error).replace(str(path), ""), []).append(path)
    texts = []
    for first, *more in alike.values():
        names = ", ".join(map(str, more))
        others = f" (and {counted(len(more), 'other file')} alike: {names})" if more else ""
        texts.append(f"{errors[first]}{others}")
    if len(texts) == 1:
        return texts[0]
    return f"{len(errors)} checkpoints cannot be used:\n  " + "\n  ".join(texts)
