"""Compiled kernels: when, with which bits, and what if it fails."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from daskcurv.estimators import kernels, native
from daskcurv.estimators.kernels import Kernels
from daskcurv.estimators.native import compiler

CPU, CUDA = map(torch.device, ("cpu", "cuda"))
needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")


@pytest.fixture(scope="module")
def compiled() -> Kernels:
    functions = Kernels()
    functions.compile(CPU)
    assert functions._decided["cpu"] is not functions._plain
    return functions


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.WARNING, "daskcurv")
    return caplog


def use(
    functions: Kernels, dtype: torch.dtype, parts: int, probes: int, size: int = 60
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    clean = torch.float64 if dtype == torch.float64 else torch.float32

    def draw(rows: int, of: torch.dtype) -> list[Tensor]:
        shape = rows * 2, 3, size, 5
        return [torch.randn(shape, generator=generator).to(of) for _ in range(parts)]

    with torch.no_grad():
        output, scaled = functions.clean_rectify(draw(1, clean), 1e-3, dtype)
        before, gradient = functions.clean_rectify_gradient(draw(1, clean), scaled, 1e-3)
        scaled, gradient = kernels.dense(scaled / 1000), kernels.dense(gradient / 1000)
        rectified = functions.rectify(draw(probes, dtype), scaled)
        gamma = functions.rectify_gradient(draw(probes, dtype), rectified, scaled, gradient)
    return [output, scaled, before, gradient, rectified, gamma]


@needs_compiler
@pytest.mark.parametrize(
    ("dtype", "parts", "probes", "size", "threads"),
    [
        (torch.bfloat16, 1, 3, 4, 1),
        (torch.float32, 2, 1, 4, 1),
        # Several blocks, the last of them not full; several threads, also of one row.
        (torch.bfloat16, 3, 5, 3001, 3),
        (torch.float32, 1, 1, 7001, 2),
        # Not compiled for.
        (torch.float64, 2, 3, 4, 1),
    ],
)
def test_compiled_kernels_give_the_same_bits(
    compiled, monkeypatch, dtype, parts, probes, size, threads
):
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    ours = use(compiled, dtype, parts, probes, size)
    theirs = use(Kernels(), dtype, parts, probes, size)
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype
        assert one.stride() == other.stride()
        assert torch.equal(one, other)


@needs_compiler
@given(
    arrays(np.float32, (4, 7), elements=st.floats(width=32)),
    st.sampled_from([torch.bfloat16, torch.float32]),
)
def test_compiled_kernels_treat_special_values_as_pytorch_does(compiled, values, dtype):
    wide = torch.from_numpy(values)
    some = wide.to(dtype)

    def use_all(functions: Kernels) -> list[Tensor]:
        return [
            *functions.clean_rectify([wide[0]], 1e-3, dtype),
            *functions.clean_rectify_gradient([wide[1]], some[0], 1e-3),
            functions.rectify([some[2:]], some[0]),
            functions.rectify_gradient([some[2:]], some[2:], some[0], some[1]),
        ]

    for one, other in zip(use_all(compiled), use_all(Kernels()), strict=True):
        np.testing.assert_array_equal(one.float().numpy(), other.float().numpy())


@pytest.fixture(params=["no compiler", "fails", "cannot be loaded"])
def failing(request: pytest.FixtureRequest, monkeypatch, tmp_path) -> str:
    fake = tmp_path / "c++"
    fake.write_text("#!/bin/sh\necho 'no headers here' >&2; echo 'and a long story' >&2; exit 1\n")
    if request.param == "cannot be loaded":
        # What a file system without the right to execute comes to.
        fake.write_text('#!/bin/sh\nfor out; do :; done; : > "$out"\n')
    fake.chmod(0o755)
    found = None if request.param == "no compiler" else str(fake)
    monkeypatch.setattr(native, "compiler", lambda: found)
    return {
        "no compiler": "no C++ compiler (c++, g++ or clang++) was found",
        "fails": "failed: no headers here",
        "cannot be loaded": "kernels.so: file too short",
    }[request.param]


def test_a_compiler_that_fails_costs_one_warning(messages, failing):
    functions = Kernels()
    functions.compile(CPU)
    found = use(functions, torch.bfloat16, 1, 2)
    functions.warm_up(CPU)
    assert all(map(torch.equal, found, use(Kernels(), torch.bfloat16, 1, 2)))
    (record,) = messages.records
    assert "kernels cannot be compiled here; continuing without that, slower" in record.message
    assert failing in record.message
    assert "long story" not in record.message


def test_pytorch_s_compiler_that_fails_costs_one_warning(messages, monkeypatch):
    def broken(*arguments: object) -> object:
        raise RuntimeError("no compiler here\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda function, **options: broken)
    functions = Kernels()
    functions._decided["cpu"] = kernels._by_pytorch(functions._plain)
    found = use(functions, torch.bfloat16, 1, 2)
    assert all(map(torch.equal, found, use(Kernels(), torch.bfloat16, 1, 2)))
    (record,) = messages.records
    assert record.message.endswith("slower: no compiler here")


def test_kernels_are_compiled_after_a_while_of_work(monkeypatch):
    now = [1000.0]
    calls: list[torch.device] = []

    def clock() -> float:
        now[0] += kernels.COMPILE_AFTER_SECONDS / 9
        return now[0]

    functions = Kernels()
    monkeypatch.setattr("daskcurv.estimators.kernels.time.perf_counter", clock)
    monkeypatch.setattr(functions, "compile", calls.append)
    # Four functions, each of which takes a ninth of the time.
    use(functions, torch.float32, 1, 1)
    use(functions, torch.float32, 1, 1)
    functions.warm_up(CPU)
    assert calls == []
    use(functions, torch.float32, 1, 1)
    functions.warm_up(CPU)
    assert calls == [CPU]


def test_kernels_for_a_gpu_are_compiled_at_once(monkeypatch):
    functions = Kernels()
    calls: list[torch.device] = []
    monkeypatch.setattr(functions, "compile", calls.append)
    functions.warm_up(CUDA)
    assert calls == [CUDA]
