"""Checkpoints: found by name, read without running anything, refused with the reason."""

from __future__ import annotations

import hashlib
import os
import pickle
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from daskcurv.errors import CheckpointError
from daskcurv.experiment.checkpoints import (
    Checkpoint,
    check_all,
    check_weights,
)
from daskcurv.experiment.resnet18 import ModelSpec
from daskcurv.experiment.weight_files import read_state_dict
from tests.support.builders import TINY, make_model, write_checkpoints


class Calls:
    """Pickles as a call that is made when the pickle is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def weights(**changes: Tensor) -> dict[str, Tensor]:
    return {**make_model().state_dict(), **changes}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def test_a_link_that_leads_nowhere_is_refused_with_where_it_leads(tmp_path):
    paths = write_checkpoints(tmp_path, [0])
    paths[0].unlink()
    paths[0].symlink_to("/not/mounted/weights.pt")
    for refused in (lambda: check_all(paths, TINY, {}), lambda: read_state_dict(paths[0])):
        with pytest.raises(CheckpointError, match="a link to /not/mounted/") as refusal:
            refused()
        assert str(paths[0]) in str(refusal.value)


@pytest.mark.parametrize("zipped", [True, False], ids=["current format", "legacy format"])
def test_a_state_dict_is_read_with_the_digest_of_its_file(tmp_path, zipped):
    expected = weights()
    path = saved(tmp_path / "w.pt", expected, _use_new_zipfile_serialization=zipped)
    state_dict, sha256 = read_state_dict(path)
    assert state_dict.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state_dict[key], value)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_a_parameter_with_gradients_is_read_as_a_tensor_on_the_cpu(tmp_path):
    parameter = torch.nn.Parameter(torch.ones(2))
    state_dict, _ = read_state_dict(saved(tmp_path / "w.pt", {"a": parameter}))
    assert state_dict["a"].device.type == "cpu"
    assert torch.equal(state_dict["a"].detach(), torch.ones(2))


@pytest.mark.parametrize("zipped", [True, False], ids=["current format", "legacy format"])
@pytest.mark.parametrize("kept", [1, 100, 0.5, 0.999])
def test_a_truncated_file_is_a_checkpoint_error_naming_it(tmp_path, zipped, kept):
    path = saved(tmp_path / "w.pt", weights(), _use_new_zipfile_serialization=zipped)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept >= 1 else int(kept * len(content))])
    with pytest.raises(CheckpointError) as refusal:
        read_state_dict(path)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"hello, this is no checkpoint\n", b"<html>404</html>", bytes(1000)],
    ids=["empty", "text", "html", "zeros"],
)
def test_a_file_of_another_kind_is_a_checkpoint_error_naming_it(tmp_path, content):
    path = tmp_path / "w.pt"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        read_state_dict(path)
    assert str(path) in str(refusal.value)
    assert f"{len(content)} bytes" in str(refusal.value)


def record_bounds(path: Path, name: str) -> tuple[int, int]:
    """Where the contents of a record lie in a zip archive, by the format's description."""
    with zipfile.ZipFile(path) as archive:
        (info,) = [one for one in archive.infolist() if one.filename.endswith(name)]
    header = path.read_bytes()[info.header_offset : info.header_offset + 30]
    lengths = (int.from_bytes(header[place : place + 2], "little") for place in (26, 28))
    start = info.header_offset + 30 + sum(lengths)
    return start, start + info.file_size


@pytest.mark.parametrize("record", ["data.pkl", "data/0", "data/60", "version"])
@pytest.mark.parametrize("damage", ["a flipped bit", "a page of zeros"])
def test_a_damaged_record_is_a_checkpoint_error_naming_file_and_record(tmp_path, record, damage):
    path = saved(tmp_path / "w.pt", weights())
    start, stop = record_bounds(path, f"/{record}")
    content = bytearray(path.read_bytes())
    if damage == "a flipped bit":
        content[(start + stop) // 2] ^= 0x02
    else:
        content[start : min(stop, start + 4096)] = bytes(min(stop - start, 4096))
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refusal:
        read_state_dict(path)
    assert str(path) in str(refusal.value)
    assert f"/{record} " in str(refusal.value)
    assert "copy it again" in str(refusal.value)


def test_a_compressed_archive_is_compared_with_its_checksums_too(tmp_path):
    stored = saved(tmp_path / "stored.pt", weights())
    path = tmp_path / "w.pt"
    with zipfile.ZipFile(stored) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    torch.testing.assert_close(read_state_dict(path)[0], weights(), rtol=0, atol=0)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x02
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged"):
        read_state_dict(path)


def test_a_file_written_without_checksums_is_read(tmp_path):
    torch.serialization.set_crc32_options(False)
    try:
        path = saved(tmp_path / "w.pt", weights())
    finally:
        torch.serialization.set_crc32_options(True)
    torch.testing.assert_close(read_state_dict(path)[0], weights(), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["meta", "sparse", "quantized", "nested"])
def test_weights_that_are_no_dense_tensors_are_refused_and_named(tmp_path, kind):
    dense = torch.ones(10, 32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nested tensors are a prototype, quantized ones deprecated
        make: dict[str, Callable[[], Tensor]] = {
            "meta": lambda: torch.empty_like(dense, device="meta"),
            "sparse": dense.to_sparse,
            "quantized": lambda: torch.quantize_per_tensor(dense, 0.1, 0, torch.qint8),
            "nested": lambda: torch.nested.nested_tensor([dense, dense]),
        }
        value = make[kind]()
        path = saved(tmp_path / "w.pt", weights(**{"fc.weight": value}))
        with pytest.raises(CheckpointError) as refusal:
            read_state_dict(path)
    assert str(path) in str(refusal.value)
    if kind != "nested":  # which loading refuses by itself
        assert f"fc.weight is {'without values' if kind == 'meta' else kind}" in str(refusal.value)


def test_a_missing_file_or_a_directory_is_a_checkpoint_error_naming_it(tmp_path):
    (tmp_path / "directory.pt").mkdir()
    for name in ("missing.pt", "directory.pt"):
        with pytest.raises(CheckpointError) as refusal:
            read_state_dict(tmp_path / name)
        assert str(tmp_path / name) in str(refusal.value)


@pytest.mark.parametrize("how", ["current format", "legacy format", "plain pickle"])
def test_a_checkpoint_that_imports_os_is_refused_and_not_run(tmp_path, how):
    marker, path = tmp_path / "marker", tmp_path / "w.pt"
    content = {**weights(), "more": Calls(os.system, f"touch {marker}")}
    if how == "plain pickle":
        path.write_bytes(pickle.dumps(content["more"], protocol=2))
    else:
        saved(path, content, _use_new_zipfile_serialization=how == "current format")
    with pytest.raises(CheckpointError) as refusal:
        read_state_dict(path)
    assert str(path) in str(refusal.value)
    assert not marker.exists()


def test_the_refusal_of_a_hostile_checkpoint_says_what_it_imports_and_not_how_to_run_it(tmp_path):
    path = saved(tmp_path / "w.pt", {"a": Calls(os.system, "true")})
    with pytest.raises(CheckpointError) as refusal:
        read_state_dict(path)
    assert "posix.system" in str(refusal.value)
    assert "weights_only" not in str(refusal.value)
    assert "can still be loaded" not in str(refusal.value)


@pytest.mark.parametrize(
    "content",
    [
        {"model_state": weights()},
        torch.zeros(3),
        [torch.zeros(3)],
        {"epoch": 3, "weight": torch.zeros(3)},
        {0: torch.zeros(3)},
        None,
    ],
    ids=["nested", "a tensor", "a list", "a number beside", "numbered", "None"],
)
def test_anything_but_a_bare_state_dict_is_refused_and_named(tmp_path, content):
    path = saved(tmp_path / "w.pt", content)
    with pytest.raises(CheckpointError, match="not a bare state dict") as refusal:
        read_state_dict(path)
    assert str(path) in str(refusal.value)


def test_a_pickled_network_is_refused_and_named(tmp_path):
    path = saved(tmp_path / "w.pt", make_model())
    with pytest.raises(CheckpointError) as refusal:
        read_state_dict(path)
    assert str(path) in str(refusal.value)


def test_weights_that_fit_pass():
    check_weights(TINY.build().state_dict(), weights(), Path("w.pt"))


def test_missing_unexpected_and_reshaped_weights_are_all_named(tmp_path):
    path = tmp_path / "w.pt"
    foreign = weights(**{"encoder.weight": torch.zeros(2), "fc.weight": torch.zeros(12, 32)})
    del foreign["layer1.0.conv1.bias"]
    with pytest.raises(CheckpointError) as refusal:
        check_weights(weights(), foreign, path)
    message = str(refusal.value)
    assert str(path) in message
    assert "missing layer1.0.conv1.bias" in message
    assert "unexpected encoder.weight" in message
    assert "fc.weight has shape (12, 32) instead of (10, 32)" in message


def test_a_foreign_network_is_described_in_a_few_names(tmp_path):
    foreign = {f"transformer.{i}": torch.zeros(1) for i in range(1000)}
    with pytest.raises(CheckpointError) as refusal:
        check_weights(weights(), foreign, tmp_path / "w.pt")
    assert "transformer.0" in str(refusal.value)
    assert "995 more" in str(refusal.value)
    assert len(str(refusal.value)) < 1000


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_named(tmp_path, value):
    broken = weights()["layer2.0.conv1.weight"].clone()
    broken[1, 2, 0, 1] = value
    changes = {"layer2.0.conv1.weight": broken, "bn1.running_var": torch.full((4,), value)}
    with pytest.raises(CheckpointError) as refusal:
        check_weights(weights(), weights(**changes), tmp_path / "w.pt")
    message = str(refusal.value)
    assert str(tmp_path / "w.pt") in message
    assert "layer2.0.conv1.weight" in message
    assert "bn1.running_var" in message
    assert "bn1.weight" not in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bn1.running_var", torch.tensor([1.0, 1.0, -1e-6, 1.0])),
        ("layer2.0.downsample.1.running_var", torch.full((8,), -0.5)),
        ("layer4.1.bn2.num_batches_tracked", torch.tensor(-1)),
    ],
)
def test_negative_variances_and_counts_are_refused_and_named(tmp_path, key, value):
    with pytest.raises(CheckpointError) as refusal:
        check_weights(weights(), weights(**{key: value}), tmp_path / "w.pt")
    assert str(tmp_path / "w.pt") in str(refusal.value)
    assert f"negative values in {key}, which must not be" in str(refusal.value)


def test_a_variance_of_zero_is_that_of_a_channel_that_is_never_active():
    check_weights(weights(), weights(**{"bn1.running_var": torch.zeros(4)}), Path("w.pt"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64, torch.complex64])
def test_weights_of_another_type_are_refused_and_named(tmp_path, dtype):
    expected = make_model().state_dict()
    changed = {**expected, "conv1.weight": expected["conv1.weight"].to(dtype)}
    with pytest.raises(CheckpointError) as refusal:
        check_weights(expected, changed, tmp_path / "index-0_epoch-0.pt")
    name = str(dtype).removeprefix("torch.")
    assert f"conv1.weight has dtype {name} instead of float32" in str(refusal.value)


def test_a_network_that_cannot_be_inferred_does_not_fit_rather_than_crash(tmp_path):
    foreign = {"fc.weight": torch.tensor(1.0), "conv1.weight": torch.tensor(1.0)}
    with pytest.raises(CheckpointError):
        check_weights(ModelSpec.infer(foreign).build().state_dict(), foreign, tmp_path / "w.pt")


def test_good_checkpoints_are_described_by_digest_size_and_time(tmp_path):
    paths = write_checkpoints(tmp_path, [0, 1, 2])
    counts: list[int] = []
    checked = check_all(paths, TINY, {}, on_done=counts.append)
    assert checked == [
        Checkpoint(
            epoch,
            path,
            hashlib.sha256(path.read_bytes()).hexdigest(),
            path.stat().st_size,
            path.stat().st_mtime_ns,
        )
        for epoch, path in paths.items()
    ]
    assert counts == [1, 2, 3]


def test_all_bad_files_are_listed_in_one_error(tmp_path):
    paths = write_checkpoints(tmp_path, list(range(6)))
    paths[1].write_bytes(paths[1].read_bytes()[:5000])
    paths[2].write_bytes(b"")
    saved(paths[3], {"model_state": weights()})
    saved(paths[4], weights(**{"fc.bias": torch.full((10,), float("nan"))}))
    paths[5].unlink()
    counts: list[int] = []
    with pytest.raises(CheckpointError, match="5 checkpoints") as refusal:
        check_all(paths, TINY, {}, on_done=counts.append)
    lines = str(refusal.value).splitlines()[1:]
    assert len(lines) == 5
    for line, epoch in zip(lines, range(1, 6), strict=True):
        assert str(paths[epoch]) in line
    assert str(paths[0]) not in str(refusal.value)
    assert counts == [1, 2, 3, 4, 5, 6]


def test_one_bad_file_is_reported_without_a_list(tmp_path):
    paths = write_checkpoints(tmp_path, [0, 1])
    paths[1].write_bytes(b"")
    with pytest.raises(CheckpointError) as refusal:
        check_all(paths, TINY, {})
    assert str(refusal.value).startswith(f"checkpoint {paths[1]}")
    assert "\n" not in str(refusal.value)


def spoil(path: Path) -> os.stat_result:
    """Make the contents useless without changing size and time; return the former status."""
    before = path.stat()
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    return before


def test_a_file_of_known_size_and_time_is_not_read_again(tmp_path):
    paths = write_checkpoints(tmp_path, [0, 1])
    known = {checkpoint.epoch: checkpoint for checkpoint in check_all(paths, TINY, {})}
    spoil(paths[0])
    assert check_all(paths, TINY, known) == list(known.values())


def test_files_that_share_size_and_time_are_read_again(tmp_path):
    paths = write_checkpoints(tmp_path, [0, 1, 2])
    for path in paths.values():
        os.utime(path, ns=(0, 10**18))
    known = {checkpoint.epoch: checkpoint for checkpoint in check_all(paths, TINY, {})}
    paths[1].write_bytes(paths[2].read_bytes())
    os.utime(paths[1], ns=(0, 10**18))
    checked = {checkpoint.epoch: checkpoint for checkpoint in check_all(paths, TINY, known)}
    assert checked[0] == known[0]
    assert checked[1].sha256 == known[2].sha256 != known[1].sha256


def test_a_file_is_read_again_when_its_time_or_size_changed(tmp_path):
    paths = write_checkpoints(tmp_path, [0, 1])
    known = {checkpoint.epoch: checkpoint for checkpoint in check_all(paths, TINY, {})}
    before = spoil(paths[0])
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    with pytest.raises(CheckpointError) as refusal:
        check_all(paths, TINY, known)
    assert str(paths[0]) in str(refusal.value)

    paths[0].write_bytes(bytes(before.st_size - 1))
    os.utime(paths[0], ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(CheckpointError):
        check_all(paths, TINY, known)


def test_a_replaced_file_gets_its_new_digest(tmp_path):
    paths = write_checkpoints(tmp_path, [0])
    known = {checkpoint.epoch: checkpoint for checkpoint in check_all(paths, TINY, {})}
    saved(paths[0], weights(**{"fc.bias": torch.ones(10)}))
    os.utime(paths[0], ns=(0, known[0].mtime_ns + 1))
    (checked,) = check_all(paths, TINY, known)
    assert checked.sha256 == hashlib.sha256(paths[0].read_bytes()).hexdigest()
    assert checked.sha256 != known[0].sha256
