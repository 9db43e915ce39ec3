"""Which method and precision is used, as a table."""

from __future__ import annotations

import re
import subprocess

import pytest
import torch

from daskcurv.config import EstimatorConfig
from daskcurv.errors import ConfigError
from daskcurv.estimators import selection
from daskcurv.estimators.selection import recorded_as, reference, resolve
from tests.support.project import REPOSITORY

AUTO, FAST, DIRECT, ZEROTH = "auto", "difference-propagation", "finite-difference", "zeroth-order"
REQUESTED, STARTED = "as requested", "as the store was started"
SUPPORTS, LACKS = "the cpu supports fast bfloat16", "the cpu has no fast bfloat16"

# On a CPU; the rows are: fast at bfloat16, asked for, recorded in the store, used, why.
TABLE = [
    (True, (AUTO, "auto"), None, (AUTO, "bfloat16"), SUPPORTS),
    (False, (AUTO, "auto"), None, (DIRECT, "float32"), LACKS),
    (False, (AUTO, "float32"), None, (AUTO, "float32"), REQUESTED),
    (False, (AUTO, "bfloat16"), None, (AUTO, "bfloat16"), REQUESTED),
    (True, (AUTO, "float32"), None, (AUTO, "float32"), REQUESTED),
    (True, (FAST, "auto"), None, (FAST, "bfloat16"), SUPPORTS),
    (False, (FAST, "auto"), None, (FAST, "float32"), LACKS),
    (True, (FAST, "tf32"), None, (FAST, "tf32"), REQUESTED),
    (True, (DIRECT, "auto"), None, (DIRECT, "float32"), REQUESTED),
    (True, (DIRECT, "float32"), None, (DIRECT, "float32"), REQUESTED),
    (False, (ZEROTH, "auto"), None, (ZEROTH, "float32"), REQUESTED),
    # A store goes on as it began, on whatever device.
    (True, (AUTO, "auto"), (FAST, "float32"), (AUTO, "float32"), STARTED),
    (False, (AUTO, "auto"), (FAST, "bfloat16"), (AUTO, "bfloat16"), STARTED),
    (False, (AUTO, "auto"), (FAST, "tf32"), (AUTO, "tf32"), STARTED),
    (True, (AUTO, "auto"), (DIRECT, "float32"), (DIRECT, "float32"), STARTED),
    (True, (AUTO, "auto"), (ZEROTH, "float32"), (ZEROTH, "float32"), STARTED),
    (False, (FAST, "auto"), (FAST, "bfloat16"), (FAST, "bfloat16"), STARTED),
    # What is asked for stands; the store then refuses what differs.
    (True, (AUTO, "bfloat16"), (FAST, "float32"), (AUTO, "bfloat16"), STARTED),
    (True, (DIRECT, "auto"), (FAST, "bfloat16"), (DIRECT, "float32"), STARTED),
    (False, (FAST, "auto"), (DIRECT, "float32"), (FAST, "float32"), STARTED),
]


def config(method: str, precision: str) -> EstimatorConfig:
    return EstimatorConfig(method=method, precision=precision, n_probes=4, h=0.01, seed=3)


@pytest.mark.parametrize(("fast", "asked", "recorded", "used", "why"), TABLE)
def test_method_and_precision_by_device_and_store(monkeypatch, fast, asked, recorded, used, why):
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: fast)
    began = config(*recorded) if recorded else None
    # Nothing else of the settings changes.
    assert resolve(config(*asked), torch.device("cpu"), began) == (config(*used), why)


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        ((AUTO, "auto"), (DIRECT, "float32")),
        ((AUTO, "bfloat16"), (DIRECT, "float32")),
        ((FAST, "float32"), (FAST, "float32")),
        ((ZEROTH, "auto"), (ZEROTH, "float32")),
    ],
)
def test_float64_is_computed_directly_unless_propagation_is_named(monkeypatch, fast, asked, used):
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: fast)
    found, _ = resolve(config(*asked), torch.device("cpu"), dtype=torch.float64)
    assert found == config(*used)


@pytest.mark.parametrize(("fast", "precision"), [(True, "bfloat16"), (False, "float32")])
def test_a_gpu_always_propagates(monkeypatch, fast, precision):
    monkeypatch.setattr(selection, "has_fast_bfloat16", lambda device: fast)
    found, why = resolve(config(AUTO, "auto"), torch.device("cuda"))
    assert found == config(AUTO, precision)
    assert why == f"the cuda {'supports' if fast else 'has no'} fast bfloat16"


@pytest.mark.parametrize("method", [DIRECT, ZEROTH])
@pytest.mark.parametrize("precision", ["bfloat16", "tf32"])
def test_a_low_precision_is_for_propagation_only(method, precision):
    with pytest.raises(ConfigError, match=f"method '{method}' is always computed in float32"):
        resolve(config(method, precision), torch.device("cpu"))


def test_what_is_resolved_stays():
    """A worker resolves what the launcher resolved, perhaps on another device."""
    for _, asked, *_ in TABLE:
        first, _ = resolve(config(*asked), torch.device("cpu"))
        for device in ("cpu", "cuda"):
            assert resolve(first, torch.device(device))[0] == first


def test_what_falls_back_is_recorded_as_what_it_falls_back_from():
    assert recorded_as(config(AUTO, "bfloat16")) == config(FAST, "bfloat16")
    assert recorded_as(config(ZEROTH, "float32")) == config(ZEROTH, "float32")


def test_the_reference_is_direct_except_for_losses_alone():
    assert reference(config(FAST, "bfloat16")) == config(DIRECT, "float32")
    assert reference(config(DIRECT, "float32")) == config(DIRECT, "float32")
    assert reference(config(ZEROTH, "float32")) == config(ZEROTH, "float32")


def test_methods_are_compared_in_one_module_only():
    compared = (
        r"[!=]= *\"(auto|difference-propagation|finite-difference|zeroth-order)\"|PROPAGATION"
    )
    found = subprocess.run(
        ["grep", "-rnE", rf"method.*({compared})|isinstance\(.*\bAuto\b", "daskcurv", "storage"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    ).stdout.splitlines()  # fmt: skip
    code = [line for line in found if re.match(r"[^:]*\.py:", line)]
    assert code
    elsewhere = [line for line in code if not line.startswith("daskcurv/estimators/selection.py:")]
    assert elsewhere == []
