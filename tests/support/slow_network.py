"""A network that takes its time, but not the processor's: its runs can be caught in the middle."""

from __future__ import annotations

import time
from typing import Any

from torch import nn

from tests.support.builders import TINY

SECONDS = 0.05


def build() -> nn.Module:
    network = TINY.build()
    network.register_forward_pre_hook(_wait)
    return network


def _wait(*_: Any) -> None:
    time.sleep(SECONDS)
