r"""Random directions, each a pure function of (seed, sample, probe index).

A probe is a vector of independent signs (Rademacher, ±1). Its bits come from the counter-based
generator Philox4x32-10 [1]_, evaluated at counters that encode *which* probe of *which* sample is
wanted. No state is carried from one draw to the next, so a sample's probes do not depend on its
batch, block, worker or device, on a retry, or on how many probes are drawn; and they are the same
at every epoch, which makes differences between epochs paired.

Layout, fixed for good because stored results depend on it: with key ``(seed mod 2³², seed // 2³²)``
and counter ``(c, k, s mod 2³², s // 2³²)`` for sample *s* and probe *k*, Philox yields four 32-bit
words; bit *b* of word *w* gives element ``128 c + 32 w + b`` of the flattened probe, +1 where the
bit is set and −1 where it is not.

References
----------
.. [1] Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from daskcurv.config import EstimatorConfig
from daskcurv.errors import ConfigError

GENERATOR = "rademacher/philox4x32-10"

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_BITS_PER_COUNTER = 128


def philox4x32(counter: Sequence[Tensor], key: tuple[int, int]) -> list[Tensor]:
    """Evaluate Philox4x32-10.

    Parameters
    ----------
    counter : sequence of four int64 tensors
        The counter's 32-bit words, broadcastable against each other.
    key : (int, int)
        The key's 32-bit words.

    Returns
    -------
    list of four int64 tensors
        Random words in 0 … 2³²−1.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        hi0, lo0 = _multiply(c0, _MULTIPLIERS[0])
        hi1, lo1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _MASK, (k1 + _KEY_INCREMENTS[1]) & _MASK
    return [c0, c1, c2, c3]


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The product of two 32-bit words fills 64 bits. int64 wraps to the same bits as uint64 would
    # hold, and masking after the arithmetic shift drops the copies of the sign bit.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def draw_probe(sample_ids: Tensor, probe: int, shape: Sequence[int], seed: int) -> Tensor:
    """Draw one probe for each sample, on the device that holds `sample_ids`.

    Parameters
    ----------
    sample_ids : Tensor of int64, shape (N,)
        Indices of the samples, 0 … 2⁶³−1.
    probe : int
        Probe index.
    shape : sequence of int
        Shape of one sample.
    seed : int
        Seed, 0 … 2⁶⁴−1.

    Returns
    -------
    Tensor of int8, shape (N, *shape)
        Entries −1 and +1.
    """
    size = math.prod(shape)
    n_counters = -(-size // _BITS_PER_COUNTER)
    device = sample_ids.device
    ids = sample_ids.to(torch.int64)[:, None]
    words = philox4x32(
        (
            torch.arange(n_counters, device=device)[None, :],
            torch.full((), probe, device=device),
            ids & _MASK,
            ids >> 32,
        ),
        (seed & _MASK, seed >> 32),
    )
    bits = torch.stack(words, dim=-1)[..., None] >> torch.arange(32, device=device) & 1
    signs = bits.to(torch.int8).flatten(start_dim=1)[:, :size] * 2 - 1
    return signs.reshape(len(sample_ids), *shape)


def rademacher_probes(
    sample_ids: ArrayLike, shape: Sequence[int], n_probes: int, seed: int = 0
) -> NDArray[np.int8]:
    """Return the very probes that scoring uses.

    Parameters
    ----------
    sample_ids : array_like of int, shape (N,)
        Indices of the samples in the training set.
    shape : sequence of int
        Shape of one sample, for CIFAR images ``(3, 32, 32)``.
    n_probes : int
        Probes per sample; the first ones do not change when more are asked for.
    seed : int
        The run's seed.

    Returns
    -------
    ndarray of int8, shape (N, n_probes, *shape)
        Entries −1 and +1.

    Raises
    ------
    ConfigError
        For an argument that cannot be used, by name.
    """
    EstimatorConfig(n_probes=n_probes, seed=seed)  # checks them
    indices = np.asarray(sample_ids)
    integers = indices.dtype.kind in "iu" or not indices.size
    if indices.ndim != 1 or not integers or (indices < 0).any():
        raise ConfigError(
            f"sample_ids have dtype {indices.dtype} and shape {indices.shape}; expected a list of "
            "integers, 0 or more"
        )
    ids = torch.from_numpy(indices.astype(np.int64))
    probes = [draw_probe(ids, probe, shape, seed) for probe in range(n_probes)]
    return torch.stack(probes, dim=1).numpy()
