"""What `daskcurv.score_samples` is given: converted, or refused by the argument's name."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from daskcurv.errors import ConfigError
from daskcurv.estimators.tracing import first_line

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def images_of(images: ArrayLike | Tensor) -> Tensor:
    """Return images as a tensor, or raise `ConfigError` saying what is wrong with them."""
    inputs = _tensor("images", images)
    if inputs.dtype in _INTEGERS and inputs.dtype != torch.uint8:
        raise ConfigError(
            f"images have dtype {inputs.dtype}, like token ids; a step h from them is no input of "
            "the model. Score their embeddings, in float32, with the part of the model behind them"
        )
    if inputs.dtype not in (torch.float32, torch.float64) or inputs.ndim < 2:
        raise ConfigError(
            f"images have dtype {inputs.dtype} and shape {tuple(inputs.shape)}; expected float32 "
            "or float64 of shape (N, C, H, W), already normalised"
        )
    finite = torch.isfinite(inputs).flatten(1).all(dim=1)
    if bad := (~finite).nonzero().flatten().tolist():
        raise ConfigError(
            f"images contain NaN or infinity: {len(bad)} of {len(inputs)}, first in number "
            f"{bad[0]}; leave them out, or correct the normalisation"
        )
    return inputs


def device_of(device: torch.device | str | None, model: nn.Module) -> torch.device:
    """Return the device to compute on, or raise `ConfigError` if there is no such thing here."""
    if device is None:
        return next((p.device for p in model.parameters()), torch.device("cpu"))
    try:
        place = torch.device(device)
        torch.zeros(1, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ConfigError(f"device is {device!r}: {str(error).splitlines()[0]}") from error
    return place


def check_parameters(model: nn.Module) -> None:
    """Raise `ConfigError` naming the first parameter that is not finite."""
    for name, value in model.named_parameters():
        if not torch.isfinite(value).all():
            raise ConfigError(
                f"the model's parameter {name} holds NaN or infinity; its training diverged, or "
                "the file it was read from is damaged"
            )


def check_classes(labels: Tensor, classes: Sequence[int] | None, num_outputs: int) -> None:
    """Raise `ConfigError` unless `classes` are outputs, each once, and contain all labels."""
    allowed = list(range(num_outputs)) if classes is None else sorted(map(int, classes))
    if len({*allowed}) < len(allowed) or not {*allowed} <= {*range(num_outputs)}:
        raise ConfigError(
            f"classes are {allowed}; expected outputs of the model, 0 … {num_outputs - 1}, each "
            "at most once"
        )
    if stray := sorted({*labels.tolist()} - {*allowed}):
        what = f"the model's outputs, 0 … {num_outputs - 1}" if classes is None else "classes"
        raise ConfigError(f"labels contain {stray[0]}, which is not among {what}")


def _tensor(name: str, values: ArrayLike | Tensor) -> Tensor:
    """Return `values` as a tensor, or raise `ConfigError` naming the argument."""
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    try:
        # Read-only, byte-swapped or reversed arrays have no tensor that shares their memory.
        native = np.require(array, array.dtype.newbyteorder("="), ["C", "W"])
        return torch.from_numpy(native)
    except TypeError:
        raise ConfigError(f"{name} have dtype {array.dtype}; expected numbers") from None


def integers_of(name: str, values: ArrayLike | Tensor, length: int) -> Tensor:
    """Return a 1-D int64 tensor on the CPU, or raise `ConfigError` naming the argument."""
    tensor = _tensor(name, values).cpu()
    fits = tensor.shape == (length,) and tensor.dtype in _INTEGERS
    if not fits or (tensor < 0).any():
        raise ConfigError(
            f"{name} have dtype {tensor.dtype} and shape {tuple(tensor.shape)}; expected one "
            f"integer, 0 or more, for each of the {length} images"
        )
    return tensor.to(torch.int64)


def private_copy(model: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Return a copy in eval mode, on a device and in a dtype, whose parameters are frozen."""
    try:
        with torch.inference_mode(False):
            private = copy.deepcopy(model).to(device, dtype).eval().requires_grad_(False)
    except (RuntimeError, ValueError, TypeError) as error:
        # What is not initialised or was computed from parameters cannot be copied.
        raise ConfigError(
            f"{type(model).__name__} cannot be copied to {device}: {first_line(error)}"
        ) from error
    if device.type == "cuda":
        enable_gradients_of_recurrent_layers(private)
    return private


def enable_gradients_of_recurrent_layers(model: nn.Module) -> None:
    """Put recurrent layers into training mode, without dropout, which changes no value.

    cuDNN has no gradient for them in eval mode.
    """
    for module in model.modules():
        if isinstance(module, nn.RNNBase):
            module.dropout = 0.0
            module.train()
