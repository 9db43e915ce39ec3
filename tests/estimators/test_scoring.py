"""A sample's results depend on the sample and the settings, and on nothing around them.

Not on the batch it is computed in, its neighbours, the process's precision settings or contexts,
or a device running out of memory; and the model comes back as it was. The oracle is mostly the
same function called in the plainest way, by either method. In which precision direct differences
compute is read off by a hook on a layer, since settings such as bf16 matrix products only act on
hardware that has them (for difference propagation see test_auto.py).
"""

from __future__ import annotations

import copy
import dataclasses
import logging
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from daskcurv import SampleScores, score_samples
from daskcurv.errors import ConfigError
from daskcurv.estimators.probes import draw_probe
from tests.support.builders import make_model

N = 11
NAMES = ("curvature", "curvature_sq", "directional_eig", "loss", "grad_norm", "prediction")


@pytest.fixture(params=["finite-difference", "difference-propagation"])
def score(request):
    """`score_samples` by either method, in float32 unless the images are float64."""
    return partial(score_samples, method=request.param, precision="float32")


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def images():
    return torch.randn(N, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(N) % 10


def assert_same(scores: SampleScores, expected: SampleScores) -> None:
    for name in NAMES:
        np.testing.assert_array_equal(getattr(scores, name), getattr(expected, name), name)


def assert_close(scores: SampleScores, expected: SampleScores, dtype: torch.dtype) -> None:
    """Compare up to rounding in `dtype`.

    Two roundings of a network with ReLUs may differ as float32 and float64 do, which
    test_finite_difference.py measures; in float64 the same arithmetic leaves no such room.
    """
    tolerance = 2e-2 if dtype is torch.float32 else 1e-9
    slight = min(tolerance, 1e-5)
    np.testing.assert_allclose(scores.curvature, expected.curvature, rtol=tolerance)
    np.testing.assert_allclose(scores.curvature_sq, expected.curvature_sq, rtol=2 * tolerance)
    np.testing.assert_allclose(scores.loss, expected.loss, rtol=slight)
    np.testing.assert_allclose(scores.grad_norm, expected.grad_norm, rtol=slight)
    np.testing.assert_array_equal(scores.prediction, expected.prediction)
    largest = 1e-3 * np.sqrt(3072) * expected.curvature  # h √d ‖Δg‖ bounds directional_eig
    difference = np.abs(scores.directional_eig - expected.directional_eig)
    assert (difference <= tolerance / 10 * largest).all()


def rows(scores: SampleScores, chosen: Any) -> SampleScores:
    return SampleScores(**{name: getattr(scores, name)[chosen] for name in NAMES})


# Batches, neighbours, order


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_the_batch_size(score, model, images, labels, dtype):
    images = images.to(dtype)
    expected = score(model, images, labels, n_probes=3)
    for batch_size in (1, 3, 8, N, 50):
        scores = score(model, images, labels, n_probes=3, batch_size=batch_size)
        assert_close(scores, expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_follow_samples_permuted_with_their_ids(score, model, images, labels, dtype):
    images = images.to(dtype)
    ids = torch.arange(N) * 1000 + 7
    expected = score(model, images, labels, sample_ids=ids, n_probes=3)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(2))
    permuted = score(
        model, images[order], labels[order], sample_ids=ids[order], n_probes=3, batch_size=4
    )
    assert_close(permuted, rows(expected, order.numpy()), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_do_not_depend_on_the_neighbours(score, model, images, labels, dtype):
    images = images.to(dtype)
    expected = rows(score(model, images, labels, n_probes=3), slice(4, 5))
    alone = score(model, images[4:5], labels[4:5], sample_ids=[4], n_probes=3)
    assert_close(alone, expected, dtype)
    strangers = torch.cat([10 * images[:3], images[4:5], -images[:3]])
    among = score(
        model, strangers, [9, 9, 9, int(labels[4]), 0, 0, 0],
        sample_ids=[50, 51, 52, 4, 53, 54, 55], n_probes=3,
    )  # fmt: skip
    assert_close(rows(among, slice(3, 4)), expected, dtype)


def test_curvature_is_not_divided_by_the_batch_size(score, model, images, labels):
    copies = images[:1].double().expand(8, -1, -1, -1)
    one = score(model, copies[:1], labels[:1], sample_ids=[0])
    eight = score(model, copies, labels[:1].expand(8), sample_ids=[0] * 8, batch_size=8)
    for name in NAMES:
        np.testing.assert_allclose(getattr(eight, name), [getattr(one, name)[0]] * 8, rtol=1e-9)


def test_sample_ids_select_the_probes(score, model, images, labels):
    images = images.double()
    default = score(model, images, labels, n_probes=2)
    assert_same(score(model, images, labels, n_probes=2, sample_ids=np.arange(N)), default)
    shifted = score(model, images, labels, n_probes=2, sample_ids=np.arange(N) + 1)
    assert (shifted.curvature != default.curvature).all()
    np.testing.assert_array_equal(shifted.loss, default.loss)
    np.testing.assert_array_equal(shifted.grad_norm, default.grad_norm)


def test_the_seed_selects_the_probes(score, model, images, labels):
    first, second = (score(model, images, labels, n_probes=2, seed=s) for s in (0, 1))
    assert (first.curvature != second.curvature).all()
    np.testing.assert_array_equal(first.loss, second.loss)


def test_the_same_call_twice_gives_the_same_bits(score, model, images, labels):
    expected = score(model, images, labels, n_probes=3)
    torch.randn(3)  # the global generator has no part in it
    assert_same(score(model, images, labels, n_probes=3), expected)


# The model


def test_the_model_is_left_as_it_was(score, model, images, labels):
    model.train()
    model.fc.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    strides = [p.stride() for p in model.parameters()]
    score(model, images, labels, n_probes=1)
    assert all(module.training for module in model.modules())
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["fc.weight"]
    assert all(p.grad is None for p in model.parameters())
    assert all(p.dtype is torch.float32 for p in model.parameters())
    assert [p.stride() for p in model.parameters()] == strides
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_in_training_mode_is_scored_in_eval_mode(score, model, images, labels):
    expected = score(model, images, labels, n_probes=2)
    assert_same(score(model.train(), images, labels, n_probes=2), expected)


# Contexts and precision settings of the process


@pytest.mark.parametrize(
    "context",
    [
        pytest.param(lambda: torch.no_grad(), id="no_grad"),
        pytest.param(lambda: torch.inference_mode(), id="inference_mode"),
        pytest.param(lambda: torch.autocast("cpu", dtype=torch.bfloat16), id="autocast"),
    ],
)
def test_contexts_change_no_bit(score, model, images, labels, context):
    expected = score(model, images, labels, n_probes=2)
    with context():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        scores = score(model, images, labels, n_probes=2)
        made_inside = score(model, images * 1, labels * 1, n_probes=2)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert_same(scores, expected)
    assert_same(made_inside, expected)


def read_precision() -> dict[str, Any]:
    """Return the precision settings of the process, by name."""
    backends = torch.backends
    parts = {
        "all": backends,
        "cuda.matmul": backends.cuda.matmul,
        "cudnn": backends.cudnn,
        "cudnn.conv": backends.cudnn.conv,  # type: ignore[attr-defined]
        "cudnn.rnn": backends.cudnn.rnn,
        "mkldnn": backends.mkldnn,
        "mkldnn.matmul": backends.mkldnn.matmul,  # type: ignore[attr-defined]
        "mkldnn.conv": backends.mkldnn.conv,  # type: ignore[attr-defined]
    }
    settings = {name: part.fp32_precision for name, part in parts.items()}
    settings["cudnn.benchmark"] = backends.cudnn.benchmark
    settings["cudnn.deterministic"] = backends.cudnn.deterministic
    return settings


@pytest.fixture(autouse=True)
def precision_is_put_back():
    """Undo what a test does to the process's settings, which other tests share."""
    backends = torch.backends
    conv = backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    rnn = backends.cudnn.rnn.fp32_precision  # type: ignore[attr-defined]
    before = read_precision()
    yield
    torch.set_float32_matmul_precision("highest")
    backends.fp32_precision = "none"  # type: ignore[attr-defined]
    backends.cuda.matmul.fp32_precision = "none"
    backends.mkldnn.matmul.fp32_precision = "none"  # type: ignore[attr-defined]
    backends.mkldnn.conv.fp32_precision = "none"  # type: ignore[attr-defined]
    backends.cudnn.conv.fp32_precision = conv  # type: ignore[attr-defined]
    backends.cudnn.rnn.fp32_precision = rnn  # type: ignore[attr-defined]
    backends.cudnn.benchmark = before["cudnn.benchmark"]
    backends.cudnn.deterministic = before["cudnn.deterministic"]
    assert read_precision() == before


def medium_matmul() -> None:
    torch.set_float32_matmul_precision("medium")


def bf16_everywhere() -> None:
    torch.backends.fp32_precision = "bf16"  # type: ignore[attr-defined]


def bf16_on_the_cpu() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    torch.backends.mkldnn.conv.fp32_precision = "bf16"  # type: ignore[attr-defined]


def tf32_and_benchmarking() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    torch.backends.cudnn.conv.fp32_precision = "tf32"  # type: ignore[attr-defined]
    torch.backends.cudnn.benchmark = True


CHANGES = [medium_matmul, bf16_everywhere, bf16_on_the_cpu, tf32_and_benchmarking]


@pytest.mark.parametrize("change", CHANGES)
def test_precision_settings_change_no_bit_and_are_put_back(score, model, images, labels, change):
    expected = score(model, images, labels, n_probes=2)
    change()
    before = read_precision()
    assert_same(score(model, images, labels, n_probes=2), expected)
    assert read_precision() == before
    if change is medium_matmul:
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("change", CHANGES)
def test_precision_settings_are_put_back_when_the_model_raises(model, images, labels, change):
    def fail(module, inputs):
        if len(inputs[0]) == N:  # the first looks, at what the model returns, take fewer
            raise ZeroDivisionError

    model.fc.register_forward_pre_hook(fail)
    change()
    before = read_precision()
    with pytest.raises(ZeroDivisionError):
        score_samples(model, images, labels, n_probes=2, method="finite-difference")
    assert read_precision() == before
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("change", CHANGES)
def test_the_model_runs_in_plain_float32(model, images, labels, change):
    seen = []

    def look(module, inputs):
        precision = read_precision()
        seen.append(
            {
                "samples": len(inputs[0]),
                "autocast": torch.is_autocast_enabled("cpu"),
                "grad": torch.is_grad_enabled(),
                "training": module.training,
                "benchmark": precision["cudnn.benchmark"],
                **{
                    name: precision[name]
                    for name in ("cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv")
                },
            }
        )

    # The last layer: its module is in the graph that the network is turned into, hook and all.
    model.train().fc.register_forward_pre_hook(look)
    change()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        score_samples(model, images, labels, n_probes=2, method="finite-difference")
    plain = {
        "samples": N, "autocast": False, "grad": True, "training": False, "benchmark": False,
        "cuda.matmul": "ieee", "cudnn.conv": "ieee", "mkldnn.matmul": "ieee", "mkldnn.conv": "ieee",
    }  # fmt: skip
    # Looks at what the model returns and whether the graph is that of the network, and then the
    # clean gradient and one gradient for each probe.
    assert seen[0] == {**plain, "samples": 1, "grad": False}
    assert all({**look, "samples": N, "grad": True} == plain for look in seen[1:])
    assert [look["grad"] for look in seen if look["samples"] == N] == [True] * 3


# Running out of memory


@pytest.fixture
def out_of_memory(monkeypatch):
    """Makes drawing probes fail for more than `largest` samples, once `spared` were drawn."""

    def limit(largest: int, spared: int = 0) -> None:
        left = [spared]

        def draw(sample_ids: Tensor, *arguments: Any) -> Tensor:
            left[0] -= 1
            if left[0] < 0 and len(sample_ids) > largest:
                raise torch.OutOfMemoryError("out of memory")
            return draw_probe(sample_ids, *arguments)

        for estimator in ("finite_difference", "difference_propagation"):
            monkeypatch.setattr(f"daskcurv.estimators.{estimator}.draw_probe", draw)

    return limit


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    """Returns the warnings logged so far."""
    return lambda: [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


def assert_halved_twice(warnings: list[str]) -> None:
    assert len(warnings) == 2
    assert "memory" in warnings[0]
    assert "batch size is now 8" in warnings[0]
    assert "batch size is now 4" in warnings[1]


def test_running_out_of_memory_halves_the_batch_and_is_logged(
    score, model, images, labels, out_of_memory, warnings
):
    expected = score(model, images, labels, n_probes=2, batch_size=4)
    out_of_memory(4)
    assert_same(score(model, images, labels, n_probes=2, batch_size=16), expected)
    assert_halved_twice(warnings())


class SmallMemory(nn.Module):
    """Runs out of memory in batches above 4. There is no graph of it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        if len(images) > 4:
            raise torch.OutOfMemoryError("out of memory")
        logits: Tensor = self.model(images)
        return logits


def test_running_out_of_memory_in_the_network_does_too(model, images, labels, warnings):
    score, small = partial(score_samples, method="finite-difference"), SmallMemory(model)
    expected = score(small, images, labels, n_probes=2, batch_size=4)
    assert_same(score(small, images, labels, n_probes=2, batch_size=16), expected)
    assert_halved_twice(warnings())


def test_running_out_of_memory_in_the_self_check_leaves_the_method_as_it_is(
    model, images, labels, out_of_memory, warnings
):
    expected = score_samples(model, images, labels, n_probes=2, batch_size=4)
    out_of_memory(4)
    assert_same(score_samples(model, images, labels, n_probes=2, batch_size=16), expected)
    assert_halved_twice(warnings())


@pytest.mark.parametrize("spared", [0, 1, 2, 3])
def test_running_out_of_memory_midway_repeats_and_loses_no_sample(
    score, model, images, labels, out_of_memory, warnings, spared
):
    images = images.double()
    expected = score(model, images, labels, n_probes=2)
    # Two probes a batch: memory runs out within the first batch, or within the second.
    out_of_memory(2, spared)
    scores = score(model, images, labels, n_probes=2, batch_size=5)
    assert_close(scores, expected, torch.float64)
    assert len(warnings()) == 1


def test_running_out_of_memory_with_one_sample_raises(score, model, images, labels, out_of_memory):
    out_of_memory(0)
    with pytest.raises(torch.OutOfMemoryError):
        score(model, images, labels, n_probes=1, batch_size=4)


# Arguments and the result


@pytest.mark.parametrize("kind", [torch.empty, np.empty])
def test_no_samples_give_empty_arrays(model, kind):
    nothing = kind((0, 3, 32, 32), dtype=torch.float32 if kind is torch.empty else np.float32)
    scores = score_samples(model, nothing, torch.empty(0, dtype=torch.int64))
    for name in NAMES:
        assert getattr(scores, name).shape == (0,)
        assert getattr(scores, name).dtype == (np.int64 if name == "prediction" else np.float64)


def test_arrays_and_tensors_are_equivalent(model, images, labels):
    ids = torch.arange(N) + 5
    expected = score_samples(model, images, labels, n_probes=2, sample_ids=ids)
    arrays = score_samples(
        model, images.numpy(), labels.numpy(), n_probes=2, sample_ids=ids.numpy()
    )
    assert_same(arrays, expected)
    lists = score_samples(
        model, images.numpy(), labels.tolist(), n_probes=2, sample_ids=ids.tolist()
    )
    assert_same(lists, expected)
    narrow = score_samples(
        model, images, labels.numpy().astype(np.uint8), n_probes=2, sample_ids=ids.to(torch.int16)
    )
    assert_same(narrow, expected)


def test_the_result_is_frozen_and_has_exactly_the_documented_fields(model, images, labels):
    scores = score_samples(model, images, labels, n_probes=1)
    assert tuple(field.name for field in dataclasses.fields(scores)) == (*NAMES, "further")
    assert scores.further == {}
    for name in NAMES:
        assert getattr(scores, name).shape == (N,)
        assert getattr(scores, name).dtype == (np.int64 if name == "prediction" else np.float64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        scores.curvature = scores.loss  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "argument"),
    [
        ("h", {"h": 0.0}),
        ("h", {"h": -1e-3}),
        ("h", {"h": float("nan")}),
        ("h", {"h": float("inf")}),
        ("n_probes", {"n_probes": 0}),
        ("temperature", {"temperature": -1.0}),
        ("temperature", {"temperature": 0.0}),
        ("temperature", {"temperature": float("nan")}),
        ("seed", {"seed": -1}),
        ("seed", {"seed": 2**64}),
        ("method", {"method": "guess"}),
        ("batch_size", {"batch_size": 0}),
        ("batch_size", {"batch_size": -4}),
        ("images", {"images": torch.zeros(N, 3, 32, 32, dtype=torch.uint8)}),
        ("images", {"images": torch.zeros(N, 3, 32, 32, dtype=torch.float16)}),
        ("images", {"images": torch.zeros(N)}),
        ("labels", {"labels": torch.zeros(N - 1, dtype=torch.int64)}),
        ("labels", {"labels": torch.zeros(N, 1, dtype=torch.int64)}),
        ("labels", {"labels": torch.zeros(N)}),
        ("labels", {"labels": torch.full((N,), -1)}),
        ("labels", {"classes": [1, 2, 3]}),
        ("sample_ids", {"sample_ids": [0, 1]}),
        ("sample_ids", {"sample_ids": torch.zeros(N)}),
        ("sample_ids", {"sample_ids": -torch.arange(N)}),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_make_no_sense_are_refused_by_name(model, images, labels, name, argument):
    arguments = {"images": images, "labels": labels, "n_probes": 1, **argument}
    with pytest.raises(ConfigError, match=rf"\b{name}\b"):
        score_samples(model, **arguments)
