"""Counter-based draws: every random number is a pure function of a key, so nothing keeps generator state.

A key is a purpose and some integers, e.g. (Purpose.CROP, seed, epoch, image, view). The parts are folded one
after the other through splitmix64's finaliser (Steele, Lea, Flood 2014), which is a bijection of 64-bit
words; so (seed 2, epoch 3) and (seed 3, epoch 2) give unrelated numbers. All functions take integers or
broadcasting integer arrays and are exact on every machine: the same key gives the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri

Key = int | np.integer | NDArray[np.integer]  # a part of a key
Word = np.uint64 | NDArray[np.uint64]
# splitmix64's increment, 2^64 divided by the golden ratio.
_GAMMA = np.uint64(0x9E3779B97F4A7C15)


class Purpose(IntEnum):
    """What a draw is for; the first part of every key. A number, once given, keeps its meaning."""

    ORDER = 1
    CROP = 2
    FLIP = 3
    COLOUR = 4
    GREY = 5
    BLUR = 6
    POLICY = 7
    MIX = 8
    PARTNERS = 9
    DROP_PATH = 10
    PATCH_DROP = 11
    INIT = 12
    DROPOUT = 13
    SPLIT = 14
    PROBE = 15
    NEGATIVES = 16
    ROUNDING = 17
    SOLARISE = 18
    BOOTSTRAP = 19
    FEW_SHOT = 20
    HOLD_OUT = 21
    DIRECTIONS = 22
    PAIRS = 23
    NORMS = 24


LARGEST_SEED = 2**63 - 1  # of those that a person gives; the smallest is 0


def _mix(word: Word) -> Word:
    # splitmix64's finaliser with its own constants: each step can be undone, so no two words become one.
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def words(purpose: Purpose, *key: Key) -> NDArray[np.uint64]:
    """One 64-bit word a key; the parts of the key broadcast against each other.

    Args:
        purpose: what the draw is for.
        key: integers or integer arrays, each in -2**63..2**64-1.
    """
    # The purpose begins the key, so draws of two purposes have nothing in common.
    word = np.full((), int(purpose), np.uint64)
    with np.errstate(over="ignore"):  # 64-bit arithmetic wraps by design
        word = _mix(word + _GAMMA)
        for part in key:
            # Arrays broadcast with the word so far: (B, 1), then (V,) gives (B, V) words.
            array = np.asarray(part)
            # Negative parts wrap to the upper half of 64 bits, as a cast in C does.
            word = _mix(
                (word ^ array.astype(np.int64 if array.dtype.kind != "u" else np.uint64).astype(np.uint64))
                + _GAMMA
            )
    return np.asarray(word)


def uniform(purpose: Purpose, *key: Key) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1), multiples of 2**-53; one a key."""
    # A float64 holds 53 bits: the upper ones, and 1.0 can never come out.
    return np.asarray((words(purpose, *key) >> np.uint64(11)) * 2.0**-53)


def beta(alpha: float, purpose: Purpose, *key: Key) -> NDArray[np.float64]:
    """Numbers distributed as Beta(alpha, alpha), by inversion of one uniform number a key."""
    # Inversion takes one uniform number; a sampler by rejection would take an unknown number of them.
    return np.asarray(betaincinv(alpha, alpha, uniform(purpose, *key)))


def normal(purpose: Purpose, *key: Key) -> NDArray[np.float64]:
    """Standard normal numbers, by inversion of one uniform number a key."""
    # The middle of each step of 2**-53: 0 would give minus infinity.
    return np.asarray(ndtri(uniform(purpose, *key) + 2.0**-54))


def permutation(size: int, purpose: Purpose, *key: int) -> NDArray[np.int64]:
    """A permutation of 0..size-1: the order of one word an element.

    The words of distinct elements differ, so it is unique.
    """
    return np.argsort(words(purpose, *key, np.arange(size)), kind="stable")


@contextmanager
def seeded_torch(purpose: Purpose, *key: int) -> Iterator[None]:
    """Inside, torch's generators start from a keyed seed; their state before is put back, on every device."""
    # All devices: manual_seed sets the generators of all of them.
    with torch.random.fork_rng(devices=list(range(torch.cuda.device_count()))):
        torch.manual_seed(seed_of(purpose, *key))
        yield


def seed_of(purpose: Purpose, *key: int) -> int:
    """A seed in 0..2**63-1 for torch's generators.

    It is for what a library draws by itself: initialisation, dropout.
    """
    return int(words(purpose, *key)) >> 1
