"""What is in files that somebody has: weights of a training run, data sets.

Weight files are those that `torch.save` or safetensors wrote, by their names or their first bytes.
Files whose names differ only in numbers are one group, which is described by its first, middle and
last file. `daskcurv.audit.inspection_text` says it all, with the launch that fits.
"""

from __future__ import annotations

import os
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from daskcurv.audit.inspection_names import FileNames, names_of_files
from daskcurv.errors import CheckpointError, ConfigError, DataError
from daskcurv.experiment.data import FORMATS, Format, folders, recognised
from daskcurv.experiment.data.preprocessing import Preprocessing
from daskcurv.experiment.payload import COUNTS, Payload, find_payload, numbers_in, weights_in
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.experiment.weight_files import SAFETENSORS, read_content
from daskcurv.places import exists, leads_nowhere, listed, names_in
from daskcurv.spread import evenly

SUFFIXES = (".pt", ".pth", ".th", ".ckpt", ".bin", ".tar", ".t7", SAFETENSORS)
"""How the names of weight files usually end."""

READ = 3
"""Files of a group that are read."""

_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."
"""What files of ``torch.save`` begin with that are not zip archives."""

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_UNKNOWN_SIZE = 32


@dataclass(frozen=True)
class WeightFile:
    """What a weight file holds.

    Attributes
    ----------
    path : Path
    problem : str
        Why it cannot be read; nothing else is known then.
    no_weights : str
        Why no weights were found in it, though it can be read.
    payload : Payload
        Where the weights are.
    shared : str
        What all names of the weights begin with, after what `payload` leaves out.
    shapes : mapping
        Of each tensor, by its name.
    dtypes : tuple of str
    beside : mapping
        What else is there: the value of a plain number by its name, else nothing.
    stated : mapping
        Epoch and step, as the file states them, by the key.
    spec : ModelSpec, optional
        The documented network, if its names and shapes fit.
    not_finite : tuple of str
        Tensors with NaN or infinite values.
    """

    path: Path
    problem: str = ""
    no_weights: str = ""
    payload: Payload = field(default_factory=Payload)
    shared: str = ""
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: tuple[str, ...] = ()
    beside: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, int] = field(default_factory=dict)
    spec: ModelSpec | None = None
    not_finite: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        """Numbers in all tensors but the statistics of normalisation layers."""
        counted = (s for n, s in self.shapes.items() if n.rpartition(".")[2] not in _STATISTICS)
        return sum(int(np.prod(shape, dtype=np.int64)) for shape in counted)

    @property
    def head(self) -> str:
        """The last weight that is a matrix; empty if there is none, or no last one."""
        matrices = [n for n, s in self.shapes.items() if len(s) == 2 and n.endswith("weight")]
        if len(matrices) > 1 and not self.in_order:
            return ""
        return matrices[-1] if matrices else ""

    @property
    def in_order(self) -> bool:
        """Whether tensors are in the network's order, which safetensors does not keep."""
        return self.path.suffix != SAFETENSORS

    @property
    def outputs(self) -> int | None:
        """How many outputs the shapes suggest."""
        return self.shapes[self.head][0] if self.head else None


@dataclass(frozen=True)
class WeightGroup:
    """Weight files whose names differ only in numbers.

    Attributes
    ----------
    names : FileNames
    files : tuple of WeightFile
        Those that were read: the first, the middle and the last.
    """

    names: FileNames
    files: tuple[WeightFile, ...]

    @property
    def with_weights(self) -> list[WeightFile]:
        """Those files whose weights were found."""
        return [file for file in self.files if file.shapes]

    @property
    def count_stated(self) -> str:
        """The key under which all files that were read state another number; empty if none."""
        for key in COUNTS:
            numbers = [file.stated[key] for file in self.files if key in file.stated]
            if len(numbers) == len(self.files) == len(set(numbers)):
                return key
        return ""

    @property
    def grows(self) -> bool:
        """Whether the files that were read differ in nothing but how many outputs they have."""
        found = self.with_weights
        shapes = [
            {
                name: shape[1:] if shape and shape[0] == file.outputs else shape
                for name, shape in file.shapes.items()
            }
            for file in found
        ]
        outputs = [file.outputs or 0 for file in found]
        same = all(one == shapes[0] for one in shapes)
        return same and len(set(outputs)) > 1 and outputs == sorted(outputs)

    @property
    def has_documented_network(self) -> bool:
        """Whether the files that were read are all of the documented network."""
        found = self.with_weights
        return bool(found) and all(file.spec for file in found)


@dataclass(frozen=True)
class DataSet:
    """What a data set holds.

    Attributes
    ----------
    path : Path
    form : Format
    problem : str
        Why it cannot be read; nothing else is known then.
    shape : tuple of int
        Of all images: number, channels, height, width.
    dtype : str
    counts : mapping
        Number of images by label.
    class_names : tuple of str
    sizes_differ : bool
        Images are not of one size; `shape` has no height and width.
    """

    path: Path
    form: Format
    problem: str = ""
    shape: tuple[int, ...] = ()
    dtype: str = ""
    counts: Mapping[int, int] = field(default_factory=dict)
    class_names: tuple[str, ...] = ()
    sizes_differ: bool = False


@dataclass(frozen=True)
class Inspection:
    """All that was found; groups with the most files come first.

    Attributes
    ----------
    groups : tuple of WeightGroup
    datasets : tuple of DataSet
    remarks : tuple of str
        What was left out, and why.
    """

    groups: tuple[WeightGroup, ...]
    datasets: tuple[DataSet, ...]
    remarks: tuple[str, ...] = ()

    @property
    def all_read(self) -> bool:
        """Whether everything that was looked at could be read."""
        problems = [file.problem for group in self.groups for file in group.files]
        return not any([*problems, *(one.problem for one in self.datasets)])


def inspect(paths: Iterable[Path]) -> Inspection:
    """Look at files and directories.

    Raises
    ------
    ConfigError
        If a path does not exist, or holds nothing that is known here.
    """
    weights: dict[Path, None] = {}
    data: dict[Path, Format] = {}
    remarks: list[str] = []
    for path in paths:
        if not exists(path, "path"):
            where = leads_nowhere(path) or "it does not exist"
            raise ConfigError(f"{path} cannot be inspected: {where}. Correct the path")
        some, sets, remark = _recognised(path)
        if not some and not sets:
            raise ConfigError(_nothing(path))
        weights |= dict.fromkeys(some)
        data |= sets
        remarks += [remark] if remark else []
    names = sorted(names_of_files(weights), key=lambda one: -len(one.paths))
    groups = [WeightGroup(one, tuple(map(describe_weights, _some(one.paths)))) for one in names]
    datasets = [describe_data(path, form) for path, form in data.items()]
    return Inspection(tuple(groups), tuple(datasets), tuple(remarks))


def _some(paths: tuple[Path, ...]) -> list[Path]:
    return [paths[place] for place in evenly(len(paths), READ)]


def _nothing(path: Path) -> str:
    formats = "; ".join(form.description for form in FORMATS)
    if path.is_dir():
        there = f"the directory has {listed(names_in(path)) or 'nothing'}"
    else:
        there = f"it is a file of {path.stat().st_size:,} bytes"
    return (
        f"{path} has nothing that is recognised: {there}. Expected weight files "
        f"({', '.join(SUFFIXES)}) or a data set: {formats}"
    )


def _recognised(path: Path) -> tuple[list[Path], dict[Path, Format], str]:
    """Return the weight files and data sets that a path stands for, and what was left out."""
    if not path.is_dir():
        if _is_weights(path, by_name=True):
            return [path], {}, ""
        return [], _sets([path]), ""
    weights = sorted(_weights_below(path))
    found = _sets([path])
    if weights and found and found[path].read is folders.read:
        # Training code also keeps pictures in directories beside the weights.
        return (
            weights,
            {},
            f"images in directories of {path} are not taken for a data set, as weight files are "
            "there too; if they are one, name its own directory",
        )
    if not found:
        below = [path / name for name in names_in(path) if not _is_passed_over(path / name)]
        # Class folders within a directory would be found in any collection of pictures.
        found = {p: form for p, form in _sets(below).items() if form.read is not folders.read}
    return weights, found, ""


def _sets(paths: Iterable[Path]) -> dict[Path, Format]:
    found: dict[Path, Format] = {}
    for path in paths:
        if path.is_file() and _is_weights(path, by_name=True):
            continue
        if form := recognised(path):
            found[path] = form
    return found


def _weights_below(directory: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise ConfigError(
            f"{error.filename} cannot be listed: {error.strerror}. Change its permissions, or "
            "name other paths"
        ) from error

    for parent, below, files in os.walk(directory, onerror=fail):
        below[:] = [name for name in below if not _is_passed_over(Path(parent, name))]
        for name in files:
            path = Path(parent, name)
            # Of other names only those without a usual ending are looked into.
            plain = path.suffix in ("", ".pkl") or path.suffix[1:].isdigit()
            if not name.startswith(".") and _is_weights(path, by_name=not plain, by_bytes=plain):
                yield path


def _is_passed_over(path: Path) -> bool:
    """Return whether a path is hidden, or a results store, which has very many files."""
    return path.name.startswith(".") or path.suffix == ".zarr" or (path / "zarr.json").exists()


def _is_weights(path: Path, *, by_name: bool, by_bytes: bool = True) -> bool:
    if by_name and path.suffix.lower() in SUFFIXES:
        return True
    if not by_bytes:
        return False
    try:
        with open(path, "rb") as file:
            start = file.read(len(_LEGACY))
        if not start.startswith(b"PK"):
            return start == _LEGACY
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, ValueError):
        return False


def describe_weights(path: Path) -> WeightFile:
    """Read a weight file, as a launch does, and return what it holds."""
    try:
        content, _ = read_content(path)
    except CheckpointError as error:
        return WeightFile(path, problem=str(error))
    try:
        payload, weights, spec = _weights(content, path)
    except CheckpointError as error:
        return WeightFile(
            path, no_weights=str(error), beside=_beside(content, ""), stated=numbers_in(content)
        )
    return WeightFile(
        path,
        payload=payload,
        shared="" if spec else _shared(list(weights)),
        no_weights="" if weights else f"checkpoint {path} is empty",
        shapes={name: tuple(tensor.shape) for name, tensor in weights.items()},
        dtypes=tuple(dict.fromkeys(_dtype(tensor) for tensor in weights.values())),
        beside=_beside(content, payload.key) if payload.key else {},
        stated=numbers_in(content),
        spec=spec,
        not_finite=tuple(n for n, t in weights.items() if not _is_finite(t)),
    )


def _weights(content: Any, path: Path) -> tuple[Payload, dict[str, Tensor], ModelSpec | None]:
    """Return where the weights are, what they are, and the documented network if they fit it."""
    with torch.device("meta"):
        names = ModelSpec().build().state_dict().keys()
    payload = find_payload(content, path, names)
    weights = weights_in(content, payload, path)
    spec = ModelSpec.infer(weights)
    with torch.device("meta"):
        expected = spec.build().state_dict()
    needed = {n: t.shape for n, t in expected.items() if not n.endswith(_STATISTICS[-1])}
    there = {n: t.shape for n, t in weights.items() if not n.endswith(_STATISTICS[-1])}
    if needed == there:
        return payload, weights, spec
    # It is another network: only what wrappers add to names is certain to be too much.
    payload = find_payload(content, path)
    return payload, weights_in(content, payload, path), None


def _shared(names: list[str]) -> str:
    """Return the parts that all names begin with, with the dot behind them."""
    parts = zip(*(name.split(".")[:-1] for name in names), strict=False)
    return "".join(f"{part[0]}." for part in takewhile(lambda one: len(set(one)) == 1, parts))


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _is_finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _beside(content: Any, key: str) -> dict[str, str]:
    """Return what a file holds beside its weights: values of plain numbers, else only names."""
    if not isinstance(content, Mapping):
        return {}
    own = {key, key.partition(".")[0]}
    return {str(name): _number(value) for name, value in content.items() if name not in own}


def _number(value: Any) -> str:
    if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
        value = value.item()
    if isinstance(value, (int, float, np.integer, np.floating)):
        return f"{value:g}" if isinstance(value, (float, np.floating)) else str(value)
    return ""


def describe_data(path: Path, form: Format) -> DataSet:
    """Read a data set, as a launch does, and return what it holds."""
    # The values are of no consequence, as nothing is normalised here.
    mean, std = form.mean or (0.0,), form.std or (1.0,)
    differ = False
    try:
        try:
            dataset = form.read(path, Preprocessing(mean, std))
        except DataError as error:
            if "Give --image_size" not in str(error):
                raise
            differ = True
            dataset = form.read(path, Preprocessing(mean, std, _UNKNOWN_SIZE))
    except DataError as error:
        return DataSet(path, form, problem=str(error))
    counts = Counter(dataset.labels.tolist())
    shape = (len(dataset), *(dataset.image_shape[:1] if differ else dataset.image_shape))
    return DataSet(
        path,
        form,
        shape=shape,
        dtype="uint8",
        counts=dict(sorted(counts.items())),
        class_names=dataset.class_names,
        sizes_differ=differ,
    )
