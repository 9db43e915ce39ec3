"""The training run's weight files: find them, digest them, load them safely.

A checkpoint is a bare state dict saved by ``torch.save``, one file per epoch. Files are read with
``weights_only=True``, which refuses any pickled class that is not a tensor container.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from daskcurv.errors import CheckpointError
from daskcurv.models import ModelSpec

log = logging.getLogger(__name__)

_NAME = re.compile(r"(?:checkpoint_)?index-(\d{1,9})_epoch-(\d{1,9})\.pt")
_SHOWN = 5
_READERS = 4


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
        Modification time in nanoseconds; together with the size it tells whether a file that was
        digested before has to be read again.
    """

    epoch: int
    path: Path
    sha256: str
    size: int
    mtime_ns: int


def discover(model_dir: Path, experiment_index: int) -> dict[int, Path]:
    """Find an experiment's checkpoints, by either naming scheme.

    Parameters
    ----------
    model_dir : Path
        Holds ``index-{i}_epoch-{e}.pt`` or ``checkpoint_index-{i}_epoch-{e}.pt``.
    experiment_index : int

    Returns
    -------
    dict
        File by epoch, in the order of epochs.

    Raises
    ------
    CheckpointError
        If the directory cannot be read or two files claim one epoch.
    """
    try:
        names = sorted(entry.name for entry in model_dir.iterdir())
    except OSError as error:
        raise CheckpointError(
            f"model directory {model_dir} cannot be read ({error.strerror}); point --model_dir at "
            "the directory that holds index-…_epoch-….pt"
        ) from error
    found: dict[int, Path] = {}
    others = set()
    for name in names:
        match = _NAME.fullmatch(name)
        if match is None:
            continue
        index, epoch = map(int, match.groups())
        if index != experiment_index:
            others.add(index)
            continue
        if epoch in found:
            raise CheckpointError(
                f"{model_dir} has two files for epoch {epoch}: {found[epoch].name} and {name}; "
                "remove or move one"
            )
        found[epoch] = model_dir / name
    if not found:
        hint = f"; it has index {', '.join(map(str, sorted(others)))}" if others else ""
        raise CheckpointError(
            f"{model_dir} has no checkpoint of experiment index {experiment_index}{hint}; expected "
            f"files like index-{experiment_index}_epoch-0.pt"
        )
    return dict(sorted(found.items()))


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a checkpoint file once, for its contents and its digest.

    Returns
    -------
    state_dict : dict of Tensor
    sha256 : str

    Raises
    ------
    CheckpointError
        If the file cannot be read, is damaged, or is anything but a bare state dict.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files fail inside zipfile, pickle or the storage reader, each in its own way.
        text = str(error).strip() or repr(error)
        # The exception's first lines advise to load the file unsafely; what matters comes later.
        foreign = re.search(r"GLOBAL (\S+)", text)
        reason = f"it tries to import {foreign[1]}" if foreign else text.splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path} ({len(data)} bytes) is cut short, damaged, or not a bare state "
            f"dict; copy it again from where it was written ({reason})"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(
            f"checkpoint {path} is not a bare state dict (parameter names to tensors); use the "
            "files under model_parameters/, not the pickles of experiment_checkpoints/"
        )
    return dict(content), hashlib.sha256(data).hexdigest()


def check_weights(
    expected: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], path: Path
) -> None:
    """Check that a state dict has exactly the expected keys, shapes and dtypes, all finite.

    Raises
    ------
    CheckpointError
        Naming the keys, shapes or dtypes that differ, or the parameters that are not finite.
    """
    problems = []
    if missing := [key for key in expected if key not in state_dict]:
        problems.append(f"missing {_listed(missing)}")
    if unexpected := [key for key in state_dict if key not in expected]:
        problems.append(f"unexpected {_listed(unexpected)}")
    # Loading would convert another dtype without a word, and so change the weights.
    for what, describe in (("shape", _shape), ("dtype", _dtype)):
        different = [
            f"{key} has {what} {describe(state_dict[key])} instead of {describe(value)}"
            for key, value in expected.items()
            if key in state_dict and describe(state_dict[key]) != describe(value)
        ]
        if different:
            problems.append(_listed(different))
    if problems:
        raise CheckpointError(f"checkpoint {path} does not fit the network: {'; '.join(problems)}")
    broken = [
        key
        for key, value in state_dict.items()
        if value.is_floating_point() and not torch.isfinite(value).all()
    ]
    if broken:
        raise CheckpointError(
            f"checkpoint {path} holds NaN or infinite weights in {_listed(broken)}; the training "
            "run diverged or the file is damaged. Leave this epoch out with --epochs"
        )


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _listed(items: list[str]) -> str:
    more = f" and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    return ", ".join(items[:_SHOWN]) + more


def check_all(
    paths: Mapping[int, Path],
    spec: ModelSpec,
    known: Mapping[int, Checkpoint],
    on_done: Callable[[int], None] = lambda count: None,
) -> list[Checkpoint]:
    """Read every checkpoint once: digest, keys, shapes, finite weights.

    Parameters
    ----------
    paths : mapping
        File by epoch.
    spec : ModelSpec
        The network they must fit.
    known : mapping
        Checkpoints that were checked before; those whose size and modification time are the same
        are not read again.
    on_done : callable
        Called with the number of files checked so far.

    Returns
    -------
    list of Checkpoint
        In the order of `paths`.

    Raises
    ------
    CheckpointError
        Listing every file that cannot be used.
    """
    expected = spec.build().state_dict()

    def check(epoch: int) -> Checkpoint | CheckpointError:
        path = paths[epoch]
        try:
            status = path.stat()
            before = known.get(epoch)
            if before and (before.size, before.mtime_ns) == (status.st_size, status.st_mtime_ns):
                return Checkpoint(epoch, path, before.sha256, before.size, before.mtime_ns)
            state_dict, sha256 = read_state_dict(path)
            check_weights(expected, state_dict, path)
        except CheckpointError as error:
            return error
        except OSError as error:
            return CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}")
        return Checkpoint(epoch, path, sha256, status.st_size, status.st_mtime_ns)

    checked: list[Checkpoint] = []
    errors: list[CheckpointError] = []
    with ThreadPoolExecutor(_READERS) as pool:
        for result in pool.map(check, paths):
            if isinstance(result, CheckpointError):
                errors.append(result)
            else:
                checked.append(result)
            on_done(len(checked) + len(errors))
    if errors:
        raise CheckpointError(_joined(errors))
    return checked


def _joined(errors: Iterable[CheckpointError]) -> str:
    texts = [str(error) for error in errors]
    if len(texts) == 1:
        return texts[0]
    return f"{len(texts)} checkpoints cannot be used:\n  " + "\n  ".join(texts)
