"""One file of weights: read, hashed, compared with its checksums, and loaded without running it.

Files of ``torch.save`` are read with ``weights_only=True``, which refuses any pickled class that is
no tensor container; plain data beside the weights are read too (`daskcurv.experiment.plain_data`).
Each record of the file is compared with its CRC-32, which loading does not do. Files of safetensors
have neither classes nor checksums.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
import re
import threading
import zipfile
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from daskcurv.errors import CheckpointError
from daskcurv.experiment.payload import BARE, Payload, weights_in
from daskcurv.experiment.plain_data import STAND_INS
from daskcurv.places import leads_nowhere

SAFETENSORS = ".safetensors"
"""How the names of safetensors files end."""

READERS = 4
"""Files that are read at the same time."""

_one_at_a_time = threading.Lock()
"""What PyTorch may load is one list of the whole process."""


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
        raise unreadable(path, error) from error


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
        if path.suffix == SAFETENSORS:
            safetensors.torch.load(data)
        else:
            check_records(data)
    except Exception as error:
        # A damaged directory of the archive can make zipfile fail in any way.
        return hashlib.sha256(data).hexdigest(), str(error) or repr(error)
    return hashlib.sha256(data).hexdigest(), ""


def read_state_dict(path: Path, payload: Payload = BARE) -> tuple[dict[str, Tensor], str]:
    """Read a checkpoint file once, for its weights and its digest.

    Parameters
    ----------
    path : Path
    payload : Payload
        Where the weights are in it; by default it is a bare state dict.

    Returns
    -------
    state_dict : dict of Tensor
    sha256 : str

    Raises
    ------
    CheckpointError
        If the file cannot be read, is damaged, or has no state dict of dense tensors there.
    """
    content, sha256 = read_content(path)
    return weights_in(content, payload, path), sha256


def look_into(path: Path) -> Any:
    """Return all that a checkpoint file holds, without reading the tensors where that can be.

    Damage of tensors is not found: their values are read when they are used, from the file as it is
    then.

    Raises
    ------
    CheckpointError
        If the file cannot be read, or has more than tensors and plain data.
    """
    try:
        if path.suffix == SAFETENSORS:
            return safetensors.torch.load_file(path)
        return _loaded(path)
    except Exception:
        # Files from before PyTorch 1.6 cannot be mapped; of others, reading says what is wrong.
        return read_content(path)[0]


def read_content(path: Path) -> tuple[Any, str]:
    """Read a checkpoint file once, for all that it holds and its digest.

    Raises
    ------
    CheckpointError
        If the file cannot be read, is damaged, or has more than tensors and plain data.
    """
    data = read_file(path)
    try:
        if path.suffix == SAFETENSORS:
            content: Any = safetensors.torch.load(data)
        else:
            check_records(data)
            content = _loaded(io.BytesIO(data))
    except Exception as error:
        # Damaged files fail inside zipfile, pickle or the storage reader, each in its own way.
        text = str(error).strip() or repr(error)
        # The exception's first lines advise to load the file unsafely; what matters comes later.
        foreign = re.search(r"GLOBAL (\S+)", text)
        is_code = foreign or "TorchScript" in text
        if is_code and (conversion := _conversion(data, path)):
            raise CheckpointError(
                f"checkpoint {path} holds a pickled network, which is code to run, not a state "
                "dict. If you trust the file, convert it where the network's class is defined: "
                f"{conversion}"
            ) from error
        reason = text.splitlines()[0]
        if foreign:
            reason = (
                f"it tries to import {foreign[1]}; if the file is whole, save the network's state "
                "dict alone"
            )
        raise CheckpointError(
            f"checkpoint {path} ({len(data)} bytes) is cut short, damaged, or "
            f"{'no safetensors file' if path.suffix == SAFETENSORS else 'not a bare state dict'}; "
            f"copy it again from the original ({reason})"
        ) from error
    return content, hashlib.sha256(data).hexdigest()


def _loaded(file: io.BytesIO | Path) -> Any:
    """Return what a file of ``torch.save`` holds: tensors and plain data, never anything run.

    The tensors of a path are mapped, those of bytes are read.
    """
    mapped = isinstance(file, Path)

    def load() -> Any:
        if isinstance(file, io.BytesIO):
            file.seek(0)
        return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)

    try:
        return load()
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+)", str(error))
        if foreign and foreign[1] not in STAND_INS:
            raise
    with _one_at_a_time:
        held = torch.serialization.get_safe_globals()
        # What the program around this one allows stays allowed, but for the same names.
        others = [one for one in held if _name(one) not in STAND_INS]
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(
            [*others, *((call, name) for name, call in STAND_INS.items())]
        )
        try:
            return load()
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(held)


def _name(allowed: Any) -> str:
    """Return the name in files for something that PyTorch may load."""
    if isinstance(allowed, tuple):
        return str(allowed[1])
    return f"{allowed.__module__}.{allowed.__qualname__}"


def _conversion(data: bytes, path: Path) -> str:
    """Return the line that makes a state dict of a saved network, or nothing if it is none."""
    new = path.with_name(f"{path.stem}-weights.pt").name
    try:
        pickled, names = _pickle_in(data)
        if any(name.endswith("/constants.pkl") for name in names):
            return f'torch.save(torch.jit.load("{path}").state_dict(), "{new}")'
        operations = pickletools.genops(pickled)
        first = next(str(name or op.name) for op, name, _ in operations if op.name != "PROTO")
    except Exception:
        # Of damage, the error of loading says enough.
        return ""
    # What every torch.nn.Module is pickled with.
    if not all(word in pickled for word in (b"_parameters", b"_buffers", b"_modules")):
        return ""
    nested = first.startswith(("EMPTY_", "collections"))
    where = '["KEY OF THE NETWORK"]' if nested else ""
    return f'torch.save(torch.load("{path}", weights_only=False){where}.state_dict(), "{new}")'


def _pickle_in(data: bytes) -> tuple[bytes, list[str]]:
    """Return the pickle of what was saved in a file, and the names of its records; load nothing."""
    if data.startswith(b"PK"):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            names = archive.namelist()
            return archive.read(next(name for name in names if name.endswith("/data.pkl"))), names
    file = io.BytesIO(data)
    for _ in range(3):  # a magic number, the version and the machine come first
        for _ in pickletools.genops(file):
            pass
    return data[file.tell() :], []


def unreadable(path: Path, error: OSError) -> CheckpointError:
    """Return the error for a file that cannot be read."""
    reason = leads_nowhere(path) or error.strerror
    return CheckpointError(f"checkpoint {path} cannot be read: {reason}")
