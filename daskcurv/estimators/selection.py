"""Which method and precision a run uses, and why; the only module that tells methods apart by name.

What the rest of the program has to know about a method is in `daskcurv.config.TRAITS`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from daskcurv.config import EstimatorConfig
from daskcurv.errors import ConfigError
from daskcurv.estimators.auto import Auto
from daskcurv.estimators.base import Estimator, SampleLoss
from daskcurv.estimators.difference_propagation import DifferencePropagation
from daskcurv.estimators.finite_difference import FiniteDifference
from daskcurv.estimators.zeroth_order import ZerothOrder

AUTO, PROPAGATION, DIRECT = "auto", "difference-propagation", "finite-difference"

ESTIMATORS: dict[str, type[Estimator]] = {
    AUTO: Auto,
    PROPAGATION: DifferencePropagation,
    DIRECT: FiniteDifference,
    "zeroth-order": ZerothOrder,
}


def resolve(
    config: EstimatorConfig,
    device: torch.device,
    recorded: EstimatorConfig | None = None,
    dtype: torch.dtype = torch.float32,
) -> tuple[EstimatorConfig, str]:
    """Decide what is left to ``"auto"``.

    A store is continued as it began. Otherwise bfloat16 is used where the device is fast at it.
    Where it is not, a CPU takes direct finite differences. So does float64, which is asked for as a
    reference. A precision that is given, or taken from a store, does not change the method.

    Parameters
    ----------
    config : EstimatorConfig
    device : torch.device
        Of the workers.
    recorded : EstimatorConfig, optional
        Settings that the store to be continued was started with.
    dtype : torch.dtype
        Of the images.

    Returns
    -------
    config : EstimatorConfig
        With a precision. The method is still ``"auto"`` if difference propagation is to be used
        where the network allows it and the self-check passes, else direct finite differences.
    reason : str

    Raises
    ------
    ConfigError
        If the method does not support the requested precision.
    """
    asked = config
    if dtype == torch.float64 and config.method == AUTO:
        config = replace(config, method=DIRECT, precision="auto")
    if recorded is not None:
        if config.method in (AUTO, recorded.method) and config.precision == "auto":
            config = replace(config, precision=recorded.precision)
        if config.method == AUTO and recorded.method != PROPAGATION:
            config = replace(config, method=recorded.method)
    propagates = config.traits.propagates
    if not propagates and config.precision not in ("auto", "float32"):
        raise ConfigError(
            f"precision is {config.precision!r}, but method {config.method!r} is always computed "
            "in float32; omit one of them"
        )
    fast = has_fast_bfloat16(device)
    if config.precision == "auto":
        if config.method == AUTO and device.type == "cpu" and not fast:
            # In float32 both are far more accurate than the probes are, and propagation is slower
            # while its kernels are not compiled (docs/estimators.md); nor is a self-check needed.
            config = replace(config, method=DIRECT)
        config = replace(config, precision="bfloat16" if propagates and fast else "float32")
    if recorded is not None:
        return config, "as the store was started"
    if asked.precision != "auto" or asked.method not in (AUTO, PROPAGATION):
        return config, "as requested"
    if dtype == torch.float64:
        return config, "the images are float64"
    supports = "supports fast bfloat16" if fast else "has no fast bfloat16"
    return config, f"the {device.type} {supports}"


def recorded_as(config: EstimatorConfig) -> EstimatorConfig:
    """Return the settings as the identity of a store has them.

    What is computed for want of a self-check passed is the same quantity, and is recorded epoch by
    epoch.
    """
    return replace(config, method=PROPAGATION) if config.method == AUTO else config


def reference(config: EstimatorConfig) -> EstimatorConfig:
    """Return the settings that give a reference for a method, if computed in float64.

    The same quantity along the same probes, by differences of whole gradients (or losses).
    """
    if config.traits.propagates:
        return replace(config, method=DIRECT, precision="float32")
    return config


def compared(config: EstimatorConfig, device: torch.device) -> dict[str, EstimatorConfig]:
    """Return the settings that a comparison of methods shows for a device, by name."""
    precisions = ["bfloat16", "float32"] + (["tf32"] if device.type == "cuda" else [])
    settings = {
        f"difference propagation, {precision}": replace(
            config, method=PROPAGATION, precision=precision
        )
        for precision in precisions
    }
    return settings | {"direct finite differences, float32": direct(config)}


def direct(config: EstimatorConfig) -> EstimatorConfig:
    """Return the settings for direct finite differences."""
    return replace(config, method=DIRECT, precision="float32")


def described(config: EstimatorConfig) -> str:
    """Return method and precision in words."""
    checked = f"{PROPAGATION} (if it passes its self-check)"
    return f"{checked if config.method == AUTO else config.method}, in {config.precision}"


def make_estimator(model: nn.Module, loss: SampleLoss, config: EstimatorConfig) -> Estimator:
    """Return the estimator of resolved settings."""
    return ESTIMATORS[config.method](model, loss, config)


def check_itself(estimator: Estimator, images: Tensor, labels: Tensor, sample_ids: Tensor) -> None:
    """Let an estimator that chooses between methods choose by these samples; else do nothing."""
    if isinstance(estimator, Auto):
        estimator.choose(images, labels, sample_ids)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Return whether a device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        # A login node has no GPU of its own; those of the nodes are taken to be of this decade.
        known = torch.cuda.is_available()
        return not known or torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Older versions of PyTorch do not tell; float32 then is the safe guess.
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(found.get(name, False) for name in ("amx_bf16", "avx512_bf16", "bf16"))
