"""Data sets in CIFAR-100's format: read exactly, refused safely, copied once for the workers."""

from __future__ import annotations

import builtins
import collections
import datetime
import errno
import functools
import os
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any, ClassVar
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision

from daskcurv.errors import DataError, StoreWriteError
from daskcurv.experiment.data import cifar as dataset
from daskcurv.experiment.data.cifar import (
    Cifar,
    download,
    read_cifar,
)
from daskcurv.experiment.data.prepared import prepare
from tests.support.builders import write_cifar


class Python2Pickler(pickle._Pickler):
    """Writes text and bytes alike as Python 2's `str`, as the published files have them."""

    dispatch: ClassVar = dict(pickle._Pickler.dispatch)

    def save_string(self: Any, value: str | bytes) -> None:
        raw = value.encode("latin1") if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(raw)) + raw)
        self.memoize(value)

    dispatch[str] = dispatch[bytes] = save_string


def python2_pickle(content: Any, path: Path) -> None:
    with open(path, "wb") as file:
        Python2Pickler(file, protocol=2).dump(content)
    # The name that NumPy had for its C module before version 2.
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core."))


class Calls:
    """Pickles as a call that is made when the pickle is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    directory = tmp_path / "cifar-100-python"
    write_cifar(directory, num_samples=12)
    return directory


def pixels(count: int = 3) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (count, 3072), dtype=np.uint8)


def write_train(directory: Path, content: Any, protocol: int = 4) -> Path:
    path = directory / "train"
    path.write_bytes(pickle.dumps(content, protocol))
    return path


def test_a_python_3_pickle_is_read_exactly(tmp_path):
    images, labels = write_cifar(tmp_path, num_samples=12)
    read = read_cifar(tmp_path)
    np.testing.assert_array_equal(read.images, images)
    np.testing.assert_array_equal(read.labels, labels)
    assert read.images.dtype == np.uint8
    assert read.images.shape == (12, 3, 32, 32)
    assert read.labels.dtype == np.int64
    assert read.class_names == tuple(f"class {label}" for label in range(10))
    assert len(read) == 12


def test_a_python_2_pickle_is_read_exactly(tmp_path):
    data, labels = pixels(), [7, 0, 99]
    names = ["apple", "mañana"]
    python2_pickle(
        {
            "filenames": ["bos_taurus_s_000507.png"] * 3,
            "batch_label": "training batch 1 of 1",
            "fine_labels": labels,
            "coarse_labels": [1, 2, 3],
            "data": data,
        },
        tmp_path / "train",
    )
    python2_pickle({"fine_label_names": names}, tmp_path / "meta")
    read = read_cifar(tmp_path)
    np.testing.assert_array_equal(read.images, data.reshape(3, 3, 32, 32))
    assert read.labels.tolist() == labels
    assert read.class_names == tuple(names)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_keys_may_be_bytes_and_the_protocol_any(tmp_path, protocol):
    data = pixels()
    write_train(tmp_path, {b"data": data, b"fine_labels": [1, 0, 2]}, protocol)
    read = read_cifar(tmp_path)
    np.testing.assert_array_equal(read.images.reshape(3, -1), data)
    assert read.labels.tolist() == [1, 0, 2]
    assert read.class_names == ()


@pytest.mark.parametrize(
    "labels",
    [
        np.array([4, 0, 2]),
        np.array([4, 0, 2], np.uint8),
        [np.int64(4), np.int64(0), np.int64(2)],
        (4, 0, 2),
    ],
    ids=["int64 array", "uint8 array", "list of NumPy scalars", "tuple"],
)
def test_labels_may_be_any_sequence_of_integers(tmp_path, labels):
    write_train(tmp_path, {"data": pixels(), "fine_labels": labels})
    assert read_cifar(tmp_path).labels.tolist() == [4, 0, 2]


def test_an_empty_byte_string_beside_the_data_does_no_harm(tmp_path):
    # Python 3 writes b"" as a call of bytes() under the protocols that Python 2 can read.
    write_train(tmp_path, {"data": pixels(), "fine_labels": [1, 0, 2], "batch_label": b""}, 2)
    assert read_cifar(tmp_path).labels.tolist() == [1, 0, 2]


def test_a_relabelled_subset_loads_and_does_not_count_as_published(tmp_path, monkeypatch):
    write_train(tmp_path, {"data": pixels(), "fine_labels": [1, 0, 2]})
    published = (tmp_path / "train").read_bytes()
    monkeypatch.setattr(dataset, "_PUBLISHED_TRAIN_MD5", md5(published).hexdigest())
    assert read_cifar(tmp_path).published

    write_train(tmp_path, {"data": pixels(), "fine_labels": [1, 2, 2]})
    relabelled = read_cifar(tmp_path)
    assert relabelled.labels.tolist() == [1, 2, 2]
    assert not relabelled.published

    write_train(tmp_path, {"data": pixels()[:2], "fine_labels": [1, 0]})
    assert len(read_cifar(tmp_path)) == 2
    assert not read_cifar(tmp_path).published


@pytest.mark.parametrize("file", ["train", "meta"])
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_imports_os_is_refused_and_not_run(cifar, tmp_path, file, protocol):
    marker = tmp_path / "marker"
    content = {
        "data": pixels(),
        "fine_labels": [1, 0, 2],
        "more": Calls(os.system, f"touch {marker}"),
    }
    (cifar / file).write_bytes(pickle.dumps(content, protocol))
    with pytest.raises(DataError) as refusal:
        read_cifar(cifar)
    assert "posix.system" in str(refusal.value)
    assert str(cifar / file) in str(refusal.value)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "imported"),
    [
        (Calls(builtins.eval, "1 + 1"), builtins.eval),
        (Calls(builtins.getattr, 1, "real"), builtins.getattr),
        (Calls(subprocess.check_call, ["true"]), subprocess.check_call),
        (torch.zeros(2), torch._utils._rebuild_tensor_v2),
        (collections.OrderedDict(a=1), collections.OrderedDict),
        (datetime.date(2020, 1, 1), datetime.date),
        (functools.partial(int, "3"), functools.partial),
        (Path("x"), type(Path("x"))),
        (np.load, np.load),
    ],
    ids=["eval", "getattr", "subprocess", "torch", "OrderedDict", "date", "partial", "Path", "np"],
)
def test_a_class_that_no_data_set_needs_is_refused(tmp_path, value, imported):
    write_train(tmp_path, {"data": pixels(), "fine_labels": [1, 0, 2], "more": value})
    with pytest.raises(DataError) as refusal:
        read_cifar(tmp_path)
    assert f"{imported.__module__}.{imported.__qualname__}" in str(refusal.value)
    assert str(tmp_path / "train") in str(refusal.value)


def test_an_attribute_of_an_allowed_class_is_refused(tmp_path):
    path = tmp_path / "train"
    path.write_bytes(b"\x80\x04\x8c\x05numpy\x8c\x0endarray.tofile\x93.")
    with pytest.raises(DataError, match=r"numpy\.ndarray\.tofile"):
        read_cifar(tmp_path)


FROM_BUFFER = np._core.numeric._frombuffer  # type: ignore[attr-defined]


class DtypeOfPointers:
    """Pickles as a dtype with a field of objects that claims to have none."""

    def __reduce__(self) -> tuple[Any, ...]:
        fields = {"a": (np.dtype(object), 0)}
        return np.dtype, ("V8", False, True), (3, "|", None, ("a",), fields, 8, 1, 0)


@pytest.mark.parametrize("file", ["train", "meta"])
@pytest.mark.parametrize(
    "pointers",
    [
        Calls(np.ndarray, (1,), np.dtype(object), b"\x41" * 8),
        Calls(FROM_BUFFER, b"\x41" * 8, DtypeOfPointers(), (1,), "C"),
    ],
    ids=["ndarray", "dtype"],
)
def test_a_pickle_cannot_make_an_array_of_pointers_out_of_bytes(cifar, file, pointers):
    # NumPy takes the bytes for addresses of objects. Read in a process of its own, which dies of
    # it if the array is made.
    content = {"data": pixels(1), "fine_labels": [pointers], "fine_label_names": pointers}
    (cifar / file).write_bytes(pickle.dumps(content))
    code = f"""
from pathlib import Path
from daskcurv.experiment.data.cifar import read_cifar
from daskcurv.errors import DataError
try:
    read_cifar(Path({str(cifar)!r}))
except DataError as error:
    print("refused:", error)
"""
    read = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert read.returncode == 0, f"the process died with {read.returncode}: {read.stderr}"
    assert read.stdout.startswith("refused:")
    assert str(cifar / file) in read.stdout


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"data": pixels(), "labels": [1, 0, 2]}, "'fine_labels'"),
        ({"fine_labels": [1, 0, 2]}, "'data'"),
        ({"data": pixels()[:, :100], "fine_labels": [1, 0, 2]}, r"shape \(3, 100\)"),
        ({"data": pixels()[0], "fine_labels": [1]}, r"shape \(3072,\)"),
        ({"data": pixels().astype(float), "fine_labels": [1, 0, 2]}, "float64"),
        ({"data": None, "fine_labels": [1, 0, 2]}, "'data'"),
        ({"data": [[1], [1, 2]], "fine_labels": [1, 0]}, "'data'"),
        ({"data": pixels(), "fine_labels": [1, 0]}, "'fine_labels'"),
        ({"data": pixels(), "fine_labels": [1, -4, 2]}, "'fine_labels'"),
        ({"data": pixels(), "fine_labels": [1, 0.5, 2]}, "float64"),
        ({"data": pixels(), "fine_labels": ["a", "b", "c"]}, "'fine_labels'"),
        ({"data": pixels(), "fine_labels": [1, None, 2]}, "object"),
        ({"data": pixels(), "fine_labels": [[1], [0], [2]]}, r"shape \(3, 1\)"),
        ({"data": pixels(), "fine_labels": [[1], [0, 1], [2]]}, "'fine_labels'"),
        ({"data": pixels(0), "fine_labels": []}, "no samples"),
        ({"data": pixels(0), "fine_labels": np.zeros(0, int)}, "no samples"),
        ([pixels(), [1, 0, 2]], "list"),
    ],
    ids=[
        "no labels",
        "no data",
        "wrong shape",
        "one dimension",
        "float pixels",
        "data is None",
        "ragged data",
        "too few labels",
        "negative label",
        "float label",
        "text labels",
        "missing label",
        "labels in two dimensions",
        "ragged labels",
        "empty",
        "empty, labels as an array",
        "not a dictionary",
    ],
)
def test_contents_that_do_not_fit_are_a_data_error_naming_the_file(tmp_path, content, expected):
    path = write_train(tmp_path, content)
    with pytest.raises(DataError, match=expected) as refusal:
        read_cifar(tmp_path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("names", [None, 5], ids=["None", "a number"])
def test_class_names_that_are_none_are_a_data_error_naming_the_file(cifar, names):
    (cifar / "meta").write_bytes(pickle.dumps({"fine_label_names": names}))
    with pytest.raises(DataError) as refusal:
        read_cifar(cifar)
    assert str(cifar / "meta") in str(refusal.value)


def test_a_key_that_is_not_text_is_a_data_error_naming_the_file(tmp_path):
    path = write_train(tmp_path, {b"\xff": 1, "data": pixels(), "labels": [1, 0, 2]})
    with pytest.raises(DataError) as refusal:
        read_cifar(tmp_path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize("file", ["train", "meta"])
@pytest.mark.parametrize("kept", [0, 1, 20, -1], ids=["none", "1 byte", "20 bytes", "all but 1"])
def test_a_truncated_pickle_is_a_data_error_naming_the_file(cifar, file, kept):
    path = cifar / file
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DataError) as refusal:
        read_cifar(cifar)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "content", [b"<html>404 not found</html>", b"\x1f\x8b\x08" + bytes(range(200)), bytes(500)]
)
def test_a_file_that_is_no_pickle_is_a_data_error_naming_the_file(cifar, content):
    (cifar / "train").write_bytes(content)
    with pytest.raises(DataError) as refusal:
        read_cifar(cifar)
    assert str(cifar / "train") in str(refusal.value)


def test_a_missing_directory_is_a_data_error_that_says_what_was_expected(tmp_path):
    with pytest.raises(DataError) as refusal:
        read_cifar(tmp_path / "nowhere")
    assert str(tmp_path / "nowhere" / "train") in str(refusal.value)
    assert "--data_path" in str(refusal.value)
    assert "--download" in str(refusal.value)


def test_a_directory_in_the_place_of_a_file_is_a_data_error(tmp_path):
    (tmp_path / "train").mkdir()
    with pytest.raises(DataError) as refusal:
        read_cifar(tmp_path)
    assert str(tmp_path / "train") in str(refusal.value)


def small_set() -> Cifar:
    return Cifar(pixels(4).reshape(-1, 3, 32, 32), np.array([3, 0, 3, 1]))


def test_the_digest_changes_with_a_label_a_pixel_and_the_order():
    original = small_set()
    relabelled = original.labels.copy()
    relabelled[2] = 2
    repainted = original.images.copy()
    repainted[3, 2, 31, 31] ^= 1
    swapped = [1, 0, 2, 3]
    digests = {
        original.digest(),
        Cifar(original.images, relabelled).digest(),
        Cifar(repainted, original.labels).digest(),
        Cifar(original.images[swapped], original.labels[swapped]).digest(),
        Cifar(original.images[:3], original.labels[:3]).digest(),
    }
    assert len(digests) == 5


def test_the_digest_does_not_depend_on_how_the_set_is_stored(tmp_path):
    original = small_set()
    data, labels = original.images.reshape(4, -1), original.labels
    digests = {original.digest()}
    for protocol in range(6):
        write_train(tmp_path, {"data": data, "fine_labels": labels.tolist()}, protocol)
        digests.add(read_cifar(tmp_path).digest())
    write_train(tmp_path, {"fine_labels": labels.astype(np.uint8), "data": np.asfortranarray(data)})
    digests.add(read_cifar(tmp_path).digest())
    python2_pickle({"data": data, "fine_labels": labels.tolist()}, tmp_path / "train")
    digests.add(read_cifar(tmp_path).digest())
    assert len(digests) == 1


def test_the_workers_copy_is_written_once_and_can_be_mapped(tmp_path):
    original = small_set()
    first = prepare(original, tmp_path / "store.inputs")
    written = {path.name: path.stat() for path in first.directory.iterdir()}
    assert prepare(original, tmp_path / "store.inputs") == first
    for path in first.directory.iterdir():
        assert path.stat().st_ino == written[path.name].st_ino
        assert path.stat().st_mtime_ns == written[path.name].st_mtime_ns

    images, labels = first.images, first.labels
    assert isinstance(images, np.memmap)
    assert not images.flags.writeable
    np.testing.assert_array_equal(images, original.images)
    np.testing.assert_array_equal(labels, original.labels)
    assert labels.dtype == np.int64
    assert list((tmp_path / "store.inputs").iterdir()) == [first.directory]


def test_another_data_set_gets_a_copy_of_its_own(tmp_path):
    original = small_set()
    relabelled = Cifar(original.images, original.labels + 1)
    copies = {prepare(original, tmp_path), prepare(relabelled, tmp_path)}
    assert len(copies) == 2
    for copy, labels in zip(
        (prepare(original, tmp_path), prepare(relabelled, tmp_path)),
        (original.labels, relabelled.labels),
        strict=True,
    ):
        np.testing.assert_array_equal(copy.labels, labels)


@pytest.mark.parametrize("failing", [1, 2], ids=["images", "labels"])
def test_a_full_disk_leaves_no_part_of_the_workers_copy(
    tmp_path, monkeypatch, disk_full_at, failing
):
    disk_full_at(failing)
    with pytest.raises(StoreWriteError, match="No space left on device") as refusal:
        prepare(small_set(), tmp_path / "inputs")
    assert str(tmp_path / "inputs") in str(refusal.value)
    assert list((tmp_path / "inputs").iterdir()) == []

    monkeypatch.undo()
    np.testing.assert_array_equal(
        prepare(small_set(), tmp_path / "inputs").images, small_set().images
    )


@pytest.mark.parametrize("name", ["images.npy", "labels.npy"])
@pytest.mark.parametrize("damage", ["emptied", "cut", "removed", "one bit"])
def test_a_damaged_copy_is_refused_to_workers_and_written_again(tmp_path, name, damage):
    prepared = prepare(small_set(), tmp_path)
    copy = prepared.directory
    whole = (copy / name).read_bytes()
    if damage == "removed":
        (copy / name).unlink()
    else:
        flipped = whole[:-1] + bytes([whole[-1] ^ 1])
        damaged = {"emptied": b"", "cut": whole[: len(whole) // 2], "one bit": flipped}
        (copy / name).write_bytes(damaged[damage])
    with pytest.raises(DataError) as refusal:
        len(replace(prepared))
    assert str(copy) in str(refusal.value)
    assert prepare(small_set(), tmp_path) == prepared
    assert (copy / name).read_bytes() == whole
    assert list(tmp_path.iterdir()) == [copy]


def test_a_place_that_cannot_be_written_is_a_store_write_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreWriteError) as refusal:
        prepare(small_set(), tmp_path / "file" / "inputs")
    assert str(tmp_path / "file" / "inputs") in str(refusal.value)


def test_normalise_agrees_with_plain_float64_numpy():
    ramp = np.arange(256, dtype=np.uint8).repeat(12).reshape(1, 3, 32, 32)
    images = np.concatenate([ramp, ramp[:, ::-1], small_set().images])
    normalised = small_set().normalise(images)
    assert normalised.dtype == torch.float32
    mean = np.array([0.5071, 0.4865, 0.4409]).reshape(3, 1, 1)
    std = np.array([0.2673, 0.2564, 0.2762]).reshape(3, 1, 1)
    expected = (images.astype(np.float64) / 255 - mean) / std
    np.testing.assert_allclose(normalised.numpy(), expected, rtol=0, atol=5e-7)


def test_normalise_takes_a_read_only_map_and_leaves_it_alone(tmp_path):
    original, copy = small_set(), prepare(small_set(), tmp_path)
    images = copy.images
    expected = original.normalise(original.images)
    torch.testing.assert_close(copy.normalise(images), expected, rtol=0, atol=0)
    np.testing.assert_array_equal(images, small_set().images)


@pytest.fixture
def downloads(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, dict[str, Any]]]:
    """Calls of torchvision's data set, which downloads nothing."""
    calls: list[tuple[Path, dict[str, Any]]] = []

    def cifar100(root: Path, **options: Any) -> None:
        calls.append((root, options))

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", cifar100)
    return calls


def test_downloading_asks_torchvision_for_the_directory_above(tmp_path, downloads):
    download(tmp_path / "cifar-100-python")
    assert [root for root, _ in downloads] == [tmp_path]
    assert downloads[0][1]["download"] is True


def test_nothing_is_downloaded_when_the_data_are_there(tmp_path, downloads):
    write_cifar(tmp_path / "other name")
    download(tmp_path / "other name")
    assert downloads == []


def test_downloading_into_a_directory_of_another_name_is_refused(tmp_path, downloads):
    with pytest.raises(DataError) as refusal:
        download(tmp_path / "cifar")
    assert f"--data_path {tmp_path / 'cifar' / 'cifar-100-python'}" in str(refusal.value)
    assert downloads == []


@pytest.mark.parametrize(
    "failure",
    [
        URLError("Name or service not known"),
        RuntimeError("File not found or corrupted."),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["no network", "wrong checksum", "disk full"],
)
def test_a_failing_download_is_a_data_error_that_names_the_place(tmp_path, monkeypatch, failure):
    def fail(*args: Any, **options: Any) -> None:
        raise failure

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(DataError) as refusal:
        download(tmp_path / "cifar-100-python")
    assert str(tmp_path) in str(refusal.value)
    assert str(failure) in str(refusal.value)
