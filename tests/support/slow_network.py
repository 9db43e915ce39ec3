"""A network that takes its time, but not the processor's: its runs can be caught in the middle.

The file is all that a launch reads of it: it imports nothing of the tests.
"""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from daskcurv.experiment.resnet18 import ModelSpec

SECONDS = 0.05


def build() -> nn.Module:
    network = ModelSpec(num_classes=10, width=4).build()
    network.register_forward_pre_hook(_wait)
    return network


def _wait(*_: Any) -> None:
    time.sleep(SECONDS)
