"""Weights in the files that other people's code writes: found, read bit for bit, or refused."""

from __future__ import annotations

import argparse
import logging
import os
import warnings
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from daskcurv.errors import CheckpointError
from daskcurv.experiment.checkpoints import check_all
from daskcurv.experiment.payload import Payload, find_payload, numbers_in, weights_in
from daskcurv.experiment.weight_files import digest_and_damage, read_content, read_state_dict
from tests.support.builders import TINY, make_model

scalar: Any = np.float64(1).__reduce__()[0]
"""What NumPy pickles numbers with."""

NAMES = list(make_model().state_dict())


class Calls:
    """Pickles as a call that is made when the pickle is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any):
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def weights() -> dict[str, Tensor]:
    return make_model().state_dict()


def prefixed(prefix: str) -> dict[str, Tensor]:
    return {prefix + name: value for name, value in weights().items()}


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].device.type == "cpu"
        assert found[name].numpy().tobytes() == value.numpy().tobytes()


def read(path: Path, expected: list[str] | None, **options: str) -> tuple[Payload, dict[str, Any]]:
    """Find the weights in a file, and read it again as a worker does."""
    payload = find_payload(read_content(path)[0], path, expected, **options)
    found, _ = read_state_dict(path, payload)
    return payload, found


def refusal_of(function: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError) as refusal:
        function(*arguments, **options)
    assert "\n" not in str(refusal.value)
    return str(refusal.value)


def optimizer_state() -> dict[str, Any]:
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model(torch.zeros(1, 3, 32, 32)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def test_a_bare_state_dict_is_found_as_it_is(tmp_path):
    path = saved(tmp_path / "w.pt", weights())
    for expected in (None, NAMES):
        payload, found = read(path, expected)
        assert payload == Payload()
        same(found, weights())


@pytest.mark.parametrize(
    "key", ["state_dict", "model_state_dict", "model", "net", "network", "module"]
)
@pytest.mark.parametrize("zipped", [True, False], ids=["current format", "legacy format"])
def test_weights_are_found_under_the_usual_keys_beside_plain_data(tmp_path, key, zipped):
    content = {
        "epoch": 3,
        key: weights(),
        "optimizer": optimizer_state(),
        "best_acc": np.float64(61.5),
        "losses": np.array([1.5, 0.25], np.float32),
        "args": argparse.Namespace(
            lr=0.1, seed=np.int64(4), name=np.array([{}, "a"]), out=Path("/a/b")
        ),
    }
    path = saved(tmp_path / "w.pt", content, _use_new_zipfile_serialization=zipped)
    payload, found = read(path, NAMES)
    assert payload == Payload(key)
    same(found, weights())
    allowed = torch.serialization.get_safe_globals()
    held, _ = read_content(path)
    assert isinstance(held["args"], argparse.Namespace)
    assert (held["args"].lr, held["args"].seed) == (0.1, 4)
    assert held["args"].out == PurePosixPath("/a/b")
    assert held["best_acc"] == 61.5
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


def test_what_the_program_around_allows_stays_allowed(tmp_path):
    content = {"model": weights(), "args": argparse.Namespace(lr=np.int8(1)), "t": Fraction(1, 3)}
    path = saved(tmp_path / "w.pt", content)
    assert refusal_of(read_content, path).endswith(
        "(it tries to import fractions.Fraction; if the file is whole, save the network's state "
        "dict alone)"
    )
    allowed: list[Any] = [np.dtype, argparse.Namespace, Fraction]
    with torch.serialization.safe_globals(allowed):
        held = read_content(path)[0]
        assert (held["args"].lr, held["t"]) == (1, Fraction(1, 3))
        assert set(allowed) <= set(torch.serialization.get_safe_globals())
    assert not set(allowed) & set(torch.serialization.get_safe_globals())


def test_names_of_numpy_1_are_read(tmp_path):
    path = saved(tmp_path / "w.pt", {"model": weights(), "acc": np.float32(0.5)})
    legacy = saved(
        tmp_path / "old.pt", {"model": weights(), "acc": np.float32(0.5)},
        _use_new_zipfile_serialization=False,
    )  # fmt: skip
    assert read_content(path)[0]["acc"] == np.float32(0.5)
    changed = legacy.read_bytes().replace(b"cnumpy._core.", b"cnumpy.core.")
    assert changed != legacy.read_bytes()
    legacy.write_bytes(changed)
    assert read_content(legacy)[0]["acc"] == np.float32(0.5)


def test_the_state_dict_of_a_data_parallel_network(tmp_path):
    path = saved(tmp_path / "w.pt", {"net": nn.DataParallel(make_model()).state_dict()})
    for expected in (None, NAMES):
        payload, found = read(path, expected)
        assert payload == Payload("net", "module.")
        same(found, weights())


def test_the_state_dict_of_a_compiled_network(tmp_path):
    compiled: Any = torch.compile(make_model())
    path = saved(tmp_path / "w.pt", compiled.state_dict())
    for expected in (None, NAMES):
        payload, found = read(path, expected)
        assert payload == Payload("", "_orig_mod.")
        same(found, weights())


@pytest.mark.parametrize(
    "prefix",
    ["module._orig_mod.", "_orig_mod.module.", "model.module.", "module.model.", "net.", "network.",
     "model._orig_mod.", "backbone.", "module.encoder."],
)  # fmt: skip
def test_whatever_all_names_begin_with_is_removed_if_the_network_is_known(tmp_path, prefix):
    path = saved(tmp_path / "w.pt", {"state_dict": prefixed(prefix)})
    payload, found = read(path, NAMES)
    assert payload == Payload("state_dict", prefix)
    same(found, weights())


@pytest.mark.parametrize(("prefix", "removed"), [
    ("model.", ""), ("module.model.", "module."), ("backbone.", ""),
    ("_orig_mod.module.", "_orig_mod.module."),
])  # fmt: skip
def test_only_wrappers_are_removed_if_the_network_is_not_known(tmp_path, prefix, removed):
    path = saved(tmp_path / "w.pt", prefixed(prefix))
    payload, found = read(path, None)
    assert payload == Payload("", removed)
    same(found, {name.removeprefix(removed): value for name, value in prefixed(prefix).items()})


def test_nothing_is_removed_from_names_that_are_the_networks_own(tmp_path):
    path = saved(tmp_path / "w.pt", prefixed("module.model."))
    expected = list(prefixed("module.model."))
    assert read(path, expected)[0] == Payload()
    assert read(path, list(prefixed("model.")))[0] == Payload("", "module.")
    twice = saved(tmp_path / "twice.pt", prefixed("module.module."))
    assert read(twice, list(prefixed("module.")))[0] == Payload("", "module.")
    assert read(twice, None)[0] == Payload("", "module.module.")


def test_a_lightning_checkpoint(tmp_path):
    content = {
        "epoch": 4,
        "global_step": 1955,
        "pytorch-lightning_version": "2.5.1",
        "state_dict": prefixed("model."),
        "loops": {"fit_loop": {"state_dict": {}, "epoch_progress": {"total": {"ready": 5}}}},
        "callbacks": {"ModelCheckpoint": {"best_model_score": torch.tensor(0.5)}},
        "optimizer_states": [optimizer_state()],
        "lr_schedulers": [{"last_epoch": 4, "_last_lr": [0.1]}],
        "hparams_name": "kwargs",
        "hyper_parameters": {"lr": 0.1},
    }
    path = saved(tmp_path / "epoch=4-step=1955.ckpt", content)
    payload, found = read(path, NAMES)
    assert payload == Payload("state_dict", "model.")
    assert numbers_in(content)["epoch"] == 4
    same(found, weights())


def test_averaged_weights_are_only_used_if_named(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    averaged = {name: value + 1 for name, value in weights().items()}
    content = {
        "epoch": 7, "arch": "resnet18", "state_dict": weights(), "optimizer": optimizer_state(),
        "version": 2, "args": argparse.Namespace(lr=0.1), "state_dict_ema": averaged, "metric": 0.5,
    }  # fmt: skip
    path = saved(tmp_path / "checkpoint-7.pth.tar", content)
    same(read(path, NAMES)[1], weights())
    assert "also has averaged weights under 'state_dict_ema'" in caplog.messages[0]
    same(read(path, NAMES, key="state_dict_ema")[1], averaged)
    del content["state_dict"]
    message = refusal_of(find_payload, content, path, NAMES)
    assert "seem to be under 'state_dict_ema': name where with --weights_key" in message


def test_wrapped_parts_inside_a_network(tmp_path):
    def network() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Sequential(nn.Linear(3, 4), nn.ReLU()), nn.Linear(4, 2))

    model = network()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    assert isinstance(model, nn.Sequential)
    compiled: Any = torch.compile(model[0])
    model[0] = nn.DataParallel(compiled)
    path = saved(tmp_path / "w.pt", nn.DataParallel(model).state_dict())
    for names in (None, list(expected)):
        payload, found = read(path, names)
        assert payload == Payload("", "module.", ("0.module.", "0.module._orig_mod."))
        same(found, expected)
    # A part of the network itself may be called so.
    own = {"a.module.x": torch.ones(1), "a.module.b.module.y": torch.ones(2)}
    assert find_payload(own, path, list(own)) == Payload()
    assert find_payload(own, path, ["a.module.x", "a.module.b.y"]) == Payload(
        "", "", ("a.module.b.module.",)
    )
    beside = {"a.module.x": torch.ones(1), "a.y": torch.ones(2)}
    assert find_payload(beside, path) == Payload()


def test_missing_names_do_not_hide_what_is_to_be_removed(tmp_path):
    old = {n: v for n, v in prefixed("module.").items() if "num_batches_tracked" not in n}
    path = saved(tmp_path / "w.pt", old)
    assert read(path, NAMES)[0] == Payload("", "module.")


@pytest.mark.parametrize("nested", ["a.b", "trainer.model.state_dict"])
def test_a_key_in_a_dictionary_in_another_one(tmp_path, nested):
    content: Any = prefixed("module.")
    for key in reversed(nested.split(".")):
        content = {key: content, "epoch": 3}
    path = saved(tmp_path / "w.pt", content)
    payload, found = read(path, NAMES, key=nested)
    assert payload == Payload(nested, "module.")
    same(found, weights())


def test_a_key_with_dots_of_its_own(tmp_path):
    path = saved(tmp_path / "w.pt", {"a.b": {"c.d": weights()}, "a": 3})
    same(read(path, NAMES, key="a.b.c.d")[1], weights())


def test_weights_saved_on_a_gpu_are_read_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    path = saved(tmp_path / "w.pt", {"model": weights()})
    monkeypatch.undo()
    assert b"cuda:0" in path.read_bytes()
    same(read(path, NAMES)[1], weights())


def test_a_safetensors_file(tmp_path):
    path = tmp_path / "checkpoint-500" / "model.safetensors"
    path.parent.mkdir()
    safetensors.torch.save_file(prefixed("model."), path, {"format": "pt"})
    payload, found = read(path, NAMES)
    assert payload == Payload("", "model.")
    same({name: found[name] for name in NAMES}, weights())  # the format orders by size
    assert digest_and_damage(path) == (read_content(path)[1], "")
    path.write_bytes(path.read_bytes()[:-100])
    assert "damaged, or no safetensors file; copy it again" in refusal_of(read_content, path)
    assert digest_and_damage(path)[1] != ""


def test_weights_under_two_keys_are_refused(tmp_path):
    path = saved(tmp_path / "w.pt", {"model": weights(), "net": weights()})
    message = refusal_of(read, path, NAMES)
    assert str(path) in message
    assert "under 'model', 'net'; name the one to use with --weights_key" in message
    same(read(path, NAMES, key="net")[1], weights())


@pytest.mark.parametrize(
    ("content", "key", "expected"),
    [
        ({"model": {}, "epoch": 3}, "net", "nothing under 'net'; it has 'model', 'epoch'"),
        ({"model": 3}, "model", "under 'model': there is an int"),
        ({"a": {"x": 3, "y": torch.ones(1)}}, "a", "under 'a': x is an int"),
        ({"model": {"x": None, "y": torch.ones(1)}}, "", "under 'model': x is a NoneType"),
        ({"a": {0: torch.ones(1)}}, "a", "under 'a': 0 is no name"),
        ({"x": torch.ones(1)}, "model", "is a bare state dict (parameter names to tensors): leave"),
        ([1], "model", "nothing under 'model'; it is a list"),
        ({"weights": {"x": torch.ones(1)}}, "", "seem to be under 'weights': name where"),
        ({"a": {"model": {"x": torch.ones(1)}}}, "", "seem to be under 'a.model': name where"),
        ({"a": {"model": {"x": torch.ones(1)}}}, "b", "seem to be under 'a.model': name where"),
        ({"epoch": 3}, "", "not a bare state dict"),
    ],
)
def test_a_key_with_no_weights_is_refused_with_where_they_may_be(tmp_path, content, key, expected):
    path = saved(tmp_path / "w.pt", content)
    message = refusal_of(read, path, None, key=key)
    assert str(path) in message
    assert expected in message


def test_a_file_that_is_not_bare_says_where_its_weights_seem_to_be(tmp_path):
    path = saved(tmp_path / "w.pt", {"epoch": 3, "model": weights(), "ema": weights()})
    message = refusal_of(read_state_dict, path)
    assert message.endswith(
        "not a bare state dict (parameter names to tensors); use the files under "
        "model_parameters/, not the pickles of experiment_checkpoints/. Weights seem to be under "
        "'model', 'ema': name where with --weights_key"
    )


def test_files_that_were_not_saved_alike_are_refused(tmp_path):
    payload = Payload("", "module.")
    path = saved(tmp_path / "w.pt", {**prefixed("module."), "n_averaged": torch.tensor(3)})
    assert "do not begin with 'module.', as those of the first file do: n_averaged" in refusal_of(
        read_state_dict, path, payload
    )
    content = {"a.module.x": torch.ones(1), "a.x": torch.ones(1)}
    message = refusal_of(weights_in, content, Payload("", "", ("a.module.",)), path)
    assert "names that are the same without 'a.module.'" in message


def test_all_files_of_a_run_are_read_from_the_same_place(tmp_path):
    paths = {e: saved(tmp_path / f"{e}.pt", {"net": prefixed("module.")}) for e in range(3)}
    checked = check_all(paths, TINY, {}, payload=Payload("net", "module."))
    assert [checkpoint.epoch for checkpoint in checked] == [0, 1, 2]


@pytest.mark.parametrize("zipped", [True, False], ids=["current format", "legacy format"])
@pytest.mark.parametrize(
    ("wrap", "where"), [(lambda m: m, ""), (lambda m: {"net": m}, '["KEY OF THE NETWORK"]')]
)
def test_a_pickled_network_is_refused_with_the_line_that_converts_it(
    tmp_path, monkeypatch, zipped, wrap, where
):
    path = saved(tmp_path / "w.pt", wrap(make_model()), _use_new_zipfile_serialization=zipped)
    message = refusal_of(read_content, path)
    assert "which is code to run, not a state dict. If you trust the file" in message
    line = (
        f'torch.save(torch.load("{path}", weights_only=False){where}.state_dict(), "w-weights.pt")'
    )
    assert message.endswith(f"convert it where the network's class is defined: {line}")
    monkeypatch.chdir(tmp_path)
    exec(line.replace("KEY OF THE NETWORK", "net"), {"torch": torch})
    same(read_state_dict(tmp_path / "w-weights.pt")[0], weights())


def test_a_damaged_file_with_a_pickled_network_is_damaged(tmp_path):
    path = saved(tmp_path / "w.pt", make_model())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x02
    path.write_bytes(content)
    message = refusal_of(read_content, path)
    assert "does not have the recorded CRC-32" in message
    assert "copy it again" in message


def test_a_torchscript_network_is_refused_with_the_line_that_converts_it(tmp_path, monkeypatch):
    path = tmp_path / "w.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        torch.jit.save(torch.jit.script(nn.Linear(2, 3)), path)
        message = refusal_of(read_content, path)
        line = f'torch.save(torch.jit.load("{path}").state_dict(), "w-weights.pt")'
        assert message.endswith(line)
        monkeypatch.chdir(tmp_path)
        exec(line, {"torch": torch})
    assert list(read_state_dict(tmp_path / "w-weights.pt")[0]) == ["weight", "bias"]


def test_files_with_plain_data_are_read_in_several_threads(tmp_path):
    args = argparse.Namespace(lr=np.float32(1))
    paths = {e: saved(tmp_path / f"{e}.pt", {"net": weights(), "args": args}) for e in range(12)}
    assert len(check_all(paths, TINY, {}, payload=Payload("net"))) == 12


@pytest.mark.parametrize(
    "number",
    [np.int64(-3), np.uint8(200), np.float16(0.5), np.float64(1 / 3), np.complex64(1j),
     np.bool_(True), np.array(7, ">i4")[()]],
)  # fmt: skip
def test_a_number_of_numpy_is_read_as_it_is(tmp_path, number):
    path = saved(tmp_path / "w.pt", {"net": weights(), "epoch": number})
    held = read_content(path)[0]["epoch"]
    assert held == number
    assert held.dtype == number.dtype


@pytest.mark.parametrize(
    "state",
    [
        Calls(np.dtype, "f8; import os"),
        Calls(np.dtype, ["x"]),
        Calls(np.dtype, 3),
        Calls(scalar, np.dtype("f8"), b"123"),
    ],
)
def test_what_numpy_would_not_have_written_is_refused(tmp_path, state):
    number = Calls(scalar, state, b"12345678")
    message = refusal_of(read_content, saved(tmp_path / "w.pt", {"net": weights(), "x": number}))
    assert "damaged" in message


@pytest.mark.parametrize("zipped", [True, False], ids=["current format", "legacy format"])
def test_code_hidden_beside_plain_data_is_refused_and_not_run(tmp_path, zipped):
    marker = tmp_path / "marker"
    content = {
        "args": argparse.Namespace(lr=np.float64(0.1)),
        "model": weights(),
        "more": Calls(os.system, f"touch {marker}"),
    }
    path = saved(tmp_path / "w.pt", content, _use_new_zipfile_serialization=zipped)
    allowed = torch.serialization.get_safe_globals()
    message = refusal_of(read_content, path)
    assert "it tries to import posix.system" in message
    assert not marker.exists()
    assert set(torch.serialization.get_safe_globals()) == set(allowed)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"epoch": 3}, 3),
        ({"epoch": np.int64(3)}, 3),
        ({"epoch": torch.tensor(3)}, 3),
        ({"epoch": 3.0}, None),
        ({"epoch": True}, None),
        ({"epoch": -1}, None),
        ({"epoch": "3"}, None),
        ({"epoch": torch.tensor([3])}, None),
        ({}, None),
        ([3], None),
    ],
)
def test_the_epoch_that_a_file_states(content, expected):
    assert numbers_in(content).get("epoch") == expected
