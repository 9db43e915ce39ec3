"""The doctor: what it finds on this machine and in the inputs, and what it measures."""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch

from daskcurv.audit.comparison import Comparison, round_to_tf32, with_tf32_convolutions
from daskcurv.cli import main
from daskcurv.errors import ConfigError
from daskcurv.estimators.kernels import KERNELS
from daskcurv.experiment.curriculum import class_order_of
from daskcurv.experiment.data.cifar import read_cifar
from tests.support.builders import make_model
from tests.support.project import Project

SCHEDULE = ["--initial_classes", "4", "--class_increment", "4", "--class_frequency", "2"]


@pytest.fixture
def doctor(project: Project, monkeypatch, capsys) -> Callable[..., tuple[int, str]]:
    """Run ``daskcurv doctor`` in the project's directory; returns exit code and output."""
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(KERNELS, "compile", lambda device: None)
    threads = torch.get_num_threads()

    def run(*arguments: object) -> tuple[int, str]:
        code = main(["doctor", *map(str, arguments)])
        torch.set_num_threads(threads)
        return code, capsys.readouterr().out

    return run


def inputs(project: Project) -> list[object]:
    return ["--data_path", project.data, "--model_dir", project.models, *SCHEDULE]


def test_without_inputs_the_machine_is_described_and_what_was_not_checked_is_said(doctor):
    code, output = doctor()
    assert code == 0
    assert "ready for a run" not in output
    verdict = output.splitlines()[-1]
    assert "Not checked, because no inputs were given: weights, data, class order" in verdict
    assert "FAIL" not in output
    assert "none at results2/base_deep_learning_system/model_parameters" in output
    for line in (f"ok    torch {torch.__version__.split('+')[0]}", "TLS between", "CPU cores"):
        assert line in output


def test_inputs_that_were_named_and_are_not_there_are_a_failure(doctor, project):
    code, output = doctor("--model_dir", project.root / "nowhere")
    assert code == 1
    assert re.search(r"FAIL  model directory \S+nowhere cannot be read", output)
    assert "a run is not possible" in output


def test_a_broken_checkpoint_is_named(doctor, project):
    path = project.models / "index-0_epoch-2.pt"
    path.write_bytes(path.read_bytes()[:1000])
    code, output = doctor(*inputs(project))
    assert code == 1
    assert f"FAIL  checkpoint {path} (1000 bytes) is cut short" in output
    assert "methods" not in output


def test_every_methods_error_and_speed_are_measured(doctor, project):
    code, output = doctor(*inputs(project), "--n_probes", "4")
    assert code == 0
    assert "methods: 8 samples at epoch 4, h = 0.001, 4 probes" in output
    number = r"([\d.e+-]+)"
    rows = {
        name: (float(median), float(worst))
        for name, median, worst in re.findall(
            rf"^ +(\S.*?) {{2,}}{number} +{number}", output, re.MULTILINE
        )
    }
    assert rows["direct finite differences, float32"][0] < 1e-4
    assert rows["difference propagation, float32"][0] < 1e-4
    assert rows["difference propagation, bfloat16"][0] < 1e-2
    assert rows["direct, TF32 convolutions"][0] > 1e-2
    assert output.endswith("\nready for a run\n")


def active_samples_of(project: Project) -> int:
    """Over the four epochs: 4 classes of 10 at epochs 0 and 1, 8 at 2, all at 4."""
    position = np.argsort(class_order_of(0, 10))[read_cifar(project.data).labels]
    return int(sum((position < active).sum() for active in (4, 4, 8, 10)))


def test_the_printed_figures_follow_from_what_was_measured(doctor, project, monkeypatch):
    rows = [
        Comparison("difference propagation, float32", 2.34e-6, 4.56e-4, 0.037),
        Comparison("direct finite differences, float32", 1.2e-7, 3.4e-5, 0.25),
        Comparison("direct, TF32 convolutions", 0.123, 0.456),
    ]
    monkeypatch.setattr("daskcurv.audit.doctor.compare", lambda *_, **__: rows)
    code, output = doctor(*inputs(project), "--workers", "3", "--n_probes", "4")
    assert code == 0
    assert f"ok    data: {project.data}, 60 samples" in output
    assert "ok    weights: 4 epochs, 4 of them read completely" in output
    assert re.search(r"1 worker +for all epochs\n", output)
    assert re.search(r"samples/s +3 workers\n", output)
    total = active_samples_of(project)
    for name, errors, rate in (
        ("difference propagation, float32", "2e-06 +5e-04", 0.037),
        ("direct finite differences, float32", "1e-07 +3e-05", 0.25),
    ):
        left = timedelta(seconds=round(total / (3 * rate)))
        line = rf"^ +{name} +{errors} +{rate:.1f} +{left}$"
        assert re.search(line, output, re.MULTILINE), output
    assert re.search(r"^ +direct, TF32 convolutions +1e-01 +5e-01 +$", output, re.MULTILINE)


def test_the_disk_space_is_that_of_the_plan(doctor, project, monkeypatch, capsys):
    monkeypatch.setattr("daskcurv.audit.doctor.compare", lambda *_, **__: [])
    _, output = doctor(*inputs(project), "--store", project.store)
    launch = project.launch_arguments("--rate", "1")
    assert main(["plan", *launch]) == 0
    planned = re.findall(r"([\d.]+) (KiB|MiB) on disk", capsys.readouterr().out)
    units = {"KiB": 2**10, "MiB": 2**20}
    (found,) = re.findall(r"about ([\d.]+) (KiB|MiB) on disk needed", output)
    assert len(planned) == 3  # store, npy tree, workers' copy
    assert float(found[0]) * units[found[1]] == pytest.approx(
        sum(float(value) * units[unit] for value, unit in planned), rel=0.1
    )


def test_a_network_for_whose_classes_there_are_no_samples_is_not_measured(doctor, project):
    path = project.data / "train"
    content = pickle.loads(path.read_bytes())
    absent = int(class_order_of(0, 10)[0])
    content["fine_labels"] = [(absent + 1) % 10] * len(content["fine_labels"])
    path.write_bytes(pickle.dumps(content))
    schedule = ["--initial_classes", "1", "--class_increment", "1", "--class_frequency", "9"]
    named = ["--data_path", project.data, "--model_dir", project.models]
    code, output = doctor(*named, *schedule, "--epochs", "0")
    assert code == 0
    assert "note  no sample has an active class at epoch 0" in output


def test_inputs_that_may_not_be_looked_at_are_a_failure(doctor, monkeypatch):
    def refuse(path: Path, what: str) -> bool:
        raise ConfigError(f"{what} {path} cannot be accessed: Permission denied")

    monkeypatch.setattr("daskcurv.audit.doctor.exists", refuse)
    code, output = doctor()
    assert code == 1
    assert "FAIL  model directory" in output


@pytest.mark.parametrize(
    ("fast", "asked", "said"),
    [
        (
            True,
            [],
            r"difference-propagation \(if it .*\), in bfloat16: the cpu supports fast bfloat16",
        ),
        (False, [], "finite-difference, in float32: the cpu has no fast bfloat16"),
        (True, ["--method", "finite-difference"], "finite-difference, in float32: as requested"),
        (True, ["--precision", "float32"], r"in float32: as requested"),
    ],
)
def test_it_says_which_method_a_run_would_use_and_why(
    doctor, project, monkeypatch, fast, asked, said
):
    for module in ("daskcurv.estimators.selection", "daskcurv.audit.doctor"):
        monkeypatch.setattr(f"{module}.has_fast_bfloat16", lambda device: fast)
    code, output = doctor(*inputs(project), "--n_probes", "1", *asked)
    assert code == 0
    assert re.search(f"ok    method for a run: .*{said}", output), output


def test_a_store_that_does_not_fit_on_the_disk_is_a_failure(doctor, project, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    code, output = doctor(*inputs(project), "--n_probes", "1")
    assert code == 1
    assert re.search(
        r"FAIL  about \d\.\d MiB on disk needed .* 1\.0 KiB free; choose another --store", output
    )


def test_tf32_rounding_keeps_ten_bits_and_rounds_ties_to_even():
    step = 2.0**-10
    values = torch.tensor([1 + step / 4, 1 + step / 2, 1 + 3 * step / 2, 1 + 0.7 * step, -3.0, 0.0])
    expected = torch.tensor([1.0, 1.0, 1 + 2 * step, 1 + step, -3.0, 0.0])
    torch.testing.assert_close(round_to_tf32(values), expected, rtol=0, atol=0)
    random = torch.randn(1000)
    assert (round_to_tf32(random) / random - 1).abs().max() <= 2.0**-11
    assert (round_to_tf32(random).view(torch.int32) & 0x1FFF == 0).all()


def test_tf32_convolutions_err_forward_and_backward_as_rounding_their_factors_would():
    model = make_model()
    images = torch.randn(3, 3, 32, 32)
    stem = with_tf32_convolutions(model).get_submodule("conv1")
    weights = model.state_dict()
    bias = weights["conv1.bias"].double()
    rounded = round_to_tf32(weights["conv1.weight"]).double()
    point = images.clone().requires_grad_(True)
    output = stem(point)
    expected = torch.conv2d(round_to_tf32(images).double(), rounded, bias, padding=1)
    np.testing.assert_allclose(output.detach(), expected.detach(), atol=1e-5)
    upstream = torch.randn_like(output)
    (gradient,) = torch.autograd.grad(output, point, upstream)
    back = torch.conv_transpose2d(round_to_tf32(upstream).double(), rounded, padding=1)
    np.testing.assert_allclose(gradient, back.detach(), atol=1e-5)
