"""The training run's weight files: finding, hashing and safe loading.

A checkpoint is a bare state dict saved by ``torch.save``, one file per epoch. Files are read with
``weights_only=True``, which refuses any pickled class that is not a tensor container. Each record
of the file is compared with its CRC-32, which loading does not do.
"""

from __future__ import annotations

import hashlib
import io
import logging
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from daskcurv.errors import CheckpointError, ConfigError
from daskcurv.experiment.networks import Network
from daskcurv.places import leads_nowhere, listed, names_in

log = logging.getLogger(__name__)

_NEVER_NEGATIVE = ("running_var", "num_batches_tracked")
"""What every normalisation layer of PyTorch calls its variances, and the count behind them."""

READERS = 4
"""Files that are read at the same time."""


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


@dataclass(frozen=True)
class Naming:
    """How a training run names its weight files.

    Attributes
    ----------
    patterns : tuple of str
        Names with ``{epoch}``, and ``{experiment}`` if several runs share a directory.
    alike : str
        Regular expression that finds experiment and epoch in names that are spelled differently, or
        have something added; by default such names are not looked for.
    """

    patterns: tuple[str, ...]
    alike: str = "(?!)"

    def __post_init__(self) -> None:
        for pattern in self.patterns:
            if pattern.count("{epoch}") != 1 or pattern.count("{experiment}") > 1:
                raise ConfigError(
                    f"the name pattern {pattern!r} has to have {{epoch}} once, and {{experiment}} "
                    "at most once"
                )

    def example(self, experiment_index: int | str, epoch: int | str) -> str:
        """Return the name of a file."""
        name = self.patterns[0].replace("{experiment}", str(experiment_index))
        return name.replace("{epoch}", str(epoch))

    def parse(self, name: str, experiment_index: int) -> tuple[int, int] | None:
        """Return the experiment and the epoch that a name stands for, or None if for none.

        A name that does not say its experiment is of any.
        """
        for pattern in self.patterns:
            expression = re.escape(pattern).replace(r"\{epoch\}", r"(?P<epoch>\d{1,9})")
            expression = expression.replace(r"\{experiment\}", r"(?P<experiment>\d{1,9})")
            if match := re.fullmatch(expression, name):
                found = match.groupdict()
                return int(found.get("experiment", experiment_index)), int(found["epoch"])
        return None


INCREMENTAL_CIFAR = Naming(
    ("index-{experiment}_epoch-{epoch}.pt", "checkpoint_index-{experiment}_epoch-{epoch}.pt"),
    alike=r"(?i)index\D{0,3}(\d{1,9})\D{1,3}epoch\D{0,3}(\d{1,9})",
)
"""The older and the newer names of the training run that the documentation describes."""


def discover(
    model_dir: Path, experiment_index: int, naming: Naming = INCREMENTAL_CIFAR
) -> dict[int, Path]:
    """Find an experiment's checkpoints.

    Parameters
    ----------
    model_dir : Path
    experiment_index : int
    naming : Naming

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
        names = names_in(model_dir)
    except OSError as error:
        raise CheckpointError(
            f"model directory {model_dir} cannot be read ({error.strerror}); point --model_dir at "
            f"the directory that holds {naming.example('…', '…')}"
        ) from error
    found: dict[int, Path] = {}
    others = set()
    alike: dict[int, str] = {}
    for name in names:
        parsed = naming.parse(name, experiment_index)
        if parsed is None:
            if (other := re.search(naming.alike, name)) and int(other[1]) == experiment_index:
                alike[int(other[2])] = name
            continue
        index, epoch = parsed
        if index != experiment_index:
            others.add(index)
            continue
        if epoch in found:
            raise CheckpointError(
                f"{model_dir} has two files for epoch {epoch}: {found[epoch].name} and {name}; "
                "remove or move one"
            )
        found[epoch] = model_dir / name
    if unused := sorted(alike.keys() - found.keys()):
        log.warning(
            "%s has files that look like checkpoints of other epochs but are not named "
            "%s; they are not used: %s. Rename those that are checkpoints",
            model_dir,
            naming.example(experiment_index, "…"),
            listed([alike[epoch] for epoch in unused]),
        )
    if not found:
        hint = f"; it has index {', '.join(map(str, sorted(others)))}" if others else ""
        raise CheckpointError(
            f"{model_dir} has no checkpoint of experiment index {experiment_index}{hint}; expected "
            f"files like {naming.example(experiment_index, 0)}"
        )
    return dict(sorted(found.items()))


def read_file(path: Path) -> bytes:
    """Return the contents of a checkpoint file.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def check_records(data: bytes) -> None:
    """Compare each record of a checkpoint file with its CRC-32.

    Files of the format before PyTorch 1.6 have none. Files that were written with
    ``torch.serialization.set_crc32_options(False)`` have zeros for all of them; both pass.

    Parameters
    ----------
    data : bytes
        Contents of the file.

    Raises
    ------
    zipfile.BadZipFile
        Naming the first record that is damaged.
    """
    if not data.startswith(b"PK"):
        return
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if not any(record.CRC for record in archive.infolist()):
            return
        if damaged := archive.testzip():
            raise zipfile.BadZipFile(f"its record {damaged} does not have the recorded CRC-32")


def digest_and_damage(path: Path) -> tuple[str, str]:
    """Read a checkpoint file; return its digest and any damage that can be detected.

    Returns
    -------
    sha256 : str
    damage : str
        The problem of the file; empty if no damage is found.

    Raises
    ------
    CheckpointError
        If it cannot be read.
    """
    data = read_file(path)
    try:
        check_records(data)
    except Exception as error:
        # A damaged directory of the archive can make zipfile fail in any way.
        return hashlib.sha256(data).hexdigest(), str(error) or repr(error)
    return hashlib.sha256(data).hexdigest(), ""


def read_state_dict(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a checkpoint file once, for its contents and its digest.

    Returns
    -------
    state_dict : dict of Tensor
    sha256 : str

    Raises
    ------
    CheckpointError
        If the file cannot be read, is damaged, or is not a bare state dict of dense
        tensors.
    """
    data = read_file(path)
    try:
        check_records(data)
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        # Damaged files fail inside zipfile, pickle or the storage reader, each in its own way.
        text = str(error).strip() or repr(error)
        # The exception's first lines advise to load the file unsafely; what matters comes later.
        foreign = re.search(r"GLOBAL (\S+)", text)
        reason = f"it tries to import {foreign[1]}" if foreign else text.splitlines()[0]
        raise CheckpointError(
            f"checkpoint {path} ({len(data)} bytes) is cut short, damaged, or not a bare state "
            f"dict; copy it again from the original ({reason})"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in content.items()
    ):
        raise CheckpointError(
            f"checkpoint {path} is not a bare state dict (parameter names to tensors); use the "
            "files under model_parameters/, not the pickles of experiment_checkpoints/"
        )
    unusual = {key: kind for key, value in content.items() if (kind := _unusual(value))}
    if unusual:
        raise CheckpointError(
            f"checkpoint {path} has weights that are not dense tensors of numbers: "
            f"{listed([f'{key} is {kind}' for key, kind in unusual.items()])}. Save the state dict "
            "of the network on a real device, without sparse or quantized weights"
        )
    return dict(content), hashlib.sha256(data).hexdigest()


def _unusual(tensor: Tensor) -> str:
    """Return in which way a tensor has no values of its own for each entry, or nothing."""
    if tensor.is_meta:
        return "without values (device meta)"
    if tensor.is_quantized:
        return f"quantized ({_dtype(tensor)})"
    if tensor.is_nested:
        return "nested"
    if tensor.layout != torch.strided:
        return f"sparse ({str(tensor.layout).removeprefix('torch.')})"
    return ""


def _unreadable(path: Path, error: OSError) -> CheckpointError:
    reason = leads_nowhere(path) or error.strerror
    return CheckpointError(f"checkpoint {path} cannot be read: {reason}")


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
    if missing := [key for key in expected if key not in state_dict]:
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
            state_dict, sha256 = read_state_dict(path)
            check_weights(expected, state_dict, path)
        except CheckpointError as error:
            return error
        except OSError as error:
            return _unreadable(path, error)
        return Checkpoint(epoch, path, sha256, status.st_size, status.st_mtime_ns)

    checked: list[Checkpoint] = []
    errors: list[CheckpointError] = []
    with ThreadPoolExecutor(READERS) as pool:
        looks = dict(zip(paths, pool.map(look_at, paths), strict=True))
        times = Counter(looks.values())
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
