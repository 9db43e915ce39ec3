"""The probes are the documented bits, and depend on nothing but seed, sample and probe index.

The oracles are the known-answer vectors published with Random123 and a second implementation of
Philox in plain Python integers, which cannot wrap, shift or mask the way int64 tensors can.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from daskcurv import rademacher_probes
from daskcurv.estimators.probes import philox4x32

IMAGE = (3, 32, 32)

KNOWN_ANSWERS = [
    # counter (4 words), key (2), result (4)
    "00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8",
    "ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd",
    "243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1",
]


def philox_of_integers(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0 = product1 // 2**32 ^ c1 ^ k0
        c2 = product0 // 2**32 ^ c3 ^ k1
        c1, c3 = product1 % 2**32, product0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [c0, c1, c2, c3]


def sign_of_element(seed: int, sample: int, probe: int, element: int) -> int:
    counter = (element // 128, probe, sample % 2**32, sample // 2**32)
    random_words = philox_of_integers(counter, (seed % 2**32, seed // 2**32))
    bit = random_words[element % 128 // 32] >> element % 32 & 1
    return 1 if bit else -1


@pytest.mark.parametrize("known_answer", KNOWN_ANSWERS)
def test_philox_gives_the_published_known_answers(known_answer):
    words = [int(word, 16) for word in known_answer.split()]
    counter, key, expected = words[:4], (words[4], words[5]), words[6:]
    tensors = [torch.tensor(word) for word in counter]
    assert [int(word) for word in philox4x32(tensors, key)] == expected
    assert philox_of_integers(counter, key) == expected


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**64 - 1),
    sample=st.integers(0, 2**40),
    probe=st.integers(0, 12),
    shape=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
@example(seed=2**64 - 1, sample=2**40, probe=12, shape=[3, 7, 9])
@example(seed=2**63, sample=2**31, probe=0, shape=[129])
@example(seed=2**32, sample=2**32, probe=1, shape=[128])
@example(seed=2**32 - 1, sample=2**32 - 1, probe=2, shape=[1])
def test_every_element_is_the_documented_bit(seed, sample, probe, shape):
    probes = rademacher_probes([sample], shape, probe + 1, seed)[0, probe]
    expected = [sign_of_element(seed, sample, probe, e) for e in range(math.prod(shape))]
    assert probes.shape == tuple(shape)
    assert probes.ravel().tolist() == expected


def test_an_image_sized_probe_is_the_documented_bits():
    probe = rademacher_probes([49_999], IMAGE, 10, seed=7)[0, 9]
    assert probe.ravel().tolist() == [sign_of_element(7, 49_999, 9, e) for e in range(3072)]


def test_probes_are_int8_signs_with_one_row_for_each_sample_and_probe():
    probes = rademacher_probes([5, 0, 2**40], IMAGE, 4)
    assert probes.dtype == np.int8
    assert probes.shape == (3, 4, *IMAGE)
    assert set(np.unique(probes)) == {-1, 1}


def test_no_samples_give_an_empty_array():
    assert rademacher_probes([], IMAGE, 4).shape == (0, 4, *IMAGE)


def test_probes_do_not_depend_on_how_many_are_drawn():
    many = rademacher_probes([3, 4], IMAGE, 10)
    for n_probes in (1, 2, 9):
        np.testing.assert_array_equal(
            rademacher_probes([3, 4], IMAGE, n_probes), many[:, :n_probes]
        )


def test_probes_do_not_depend_on_the_other_samples_or_their_order():
    ids = np.array([17, 3, 2**33, 3, 0])
    together = rademacher_probes(ids, IMAGE, 3, seed=1)
    backwards = [4, 3, 2, 1, 0]
    np.testing.assert_array_equal(
        rademacher_probes(ids[backwards], IMAGE, 3, seed=1), together[backwards]
    )
    for row, sample in enumerate(ids):
        np.testing.assert_array_equal(
            rademacher_probes([sample], IMAGE, 3, seed=1)[0], together[row]
        )


def test_seeds_samples_and_probes_all_give_different_probes():
    # Neighbours, and values that agree in one of the two 32-bit words.
    numbers = [0, 1, 2, 2**32, 2**32 + 1, 2**33]
    probes = [rademacher_probes(numbers, IMAGE, 4, seed).reshape(-1, 3072) for seed in numbers]
    rows = np.concatenate(probes)
    assert len(np.unique(rows, axis=0)) == len(numbers) ** 2 * 4


def test_signs_are_balanced_and_uncorrelated_like_fair_coins():
    seeds, samples, n_probes = [0, 1, 2**32, 2**63], np.arange(20), 10
    signs = np.concatenate(
        [rademacher_probes(samples, IMAGE, n_probes, seed).reshape(-1, 3072) for seed in seeds]
    ).astype(np.float32)
    assert abs(signs.mean()) < 5 / np.sqrt(signs.size)
    # Pairs of probes (rows) and pairs of pixels (columns): scaled to unit variance, products of
    # independent signs have mean square 1, which a weak dependence of many pairs would raise. The
    # largest of millions of normal values is itself beyond 5 sigma, hence the 6 for single ones.
    for vectors in (signs, signs.T):
        count, length = vectors.shape
        sums = vectors.sum(axis=1) / np.sqrt(length)
        assert np.abs(sums).max() < 5
        products = (vectors @ vectors.T / np.sqrt(length))[np.triu_indices(count, k=1)]
        products = products.astype(np.float64)
        assert abs(products.mean()) < 5 / np.sqrt(products.size)
        assert abs((products**2).mean() - 1) < 5 * np.sqrt(2 / products.size)
        assert np.abs(products).max() < 6
