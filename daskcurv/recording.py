"""Keeping the weights of a training run, so that they can be scored afterwards."""

from __future__ import annotations

from pathlib import Path

import safetensors.torch
from torch import nn

from daskcurv.atomic import write_whole
from daskcurv.errors import ConfigError

NAME = "epoch-{epoch}.safetensors"
"""Name of a file; ``--checkpoints 'DIRECTORY/epoch-{epoch}.safetensors'`` finds them all."""


def keep(model: nn.Module, directory: Path | str, epoch: int) -> Path:
    """Save the weights of an epoch.

    The file is whole or not there, also if the program is killed. It holds tensors only, under the
    names of the network itself: what DataParallel, DistributedDataParallel or ``torch.compile`` put
    around it is left out. Call it in one process of a distributed training.

    Parameters
    ----------
    model : torch.nn.Module
        In training or evaluation mode, on any device; it is not changed.
    directory : Path or str
        Created if it does not exist.
    epoch : int
        Number of epochs that the model has been trained for; 0 before the first.

    Returns
    -------
    Path
        The file, ``epoch-{epoch}.safetensors``.

    Raises
    ------
    ConfigError
        If `epoch` is not a whole number from 0.
    OSError
        If the file cannot be written.
    """
    if isinstance(epoch, bool) or not isinstance(epoch, int) or epoch < 0:
        raise ConfigError(f"epoch is {epoch!r}; expected a whole number from 0")
    inner = model
    while (wrapped := _inside(inner)) is not None:
        inner = wrapped
    # Copies, as weights that are tied share their memory, which the format refuses.
    weights = {
        name: value.detach().cpu().clone().contiguous()
        for name, value in inner.state_dict().items()
    }
    path = Path(directory) / NAME.format(epoch=epoch)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, safetensors.torch.save(weights))
    return path


def _inside(model: nn.Module) -> nn.Module | None:
    """Return the network that a wrapper holds, or None if it is none."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        inner: nn.Module = model.module
        return inner
    compiled = getattr(model, "_orig_mod", None)
    return compiled if isinstance(compiled, nn.Module) else None
