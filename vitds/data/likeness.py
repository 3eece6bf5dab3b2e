"""Which images of two halves look almost alike: the same photograph again, resized, encoded anew, or the next
frame of a video. Such pairs across a split make a test lie.

An image is reduced to LOOK_PX x LOOK_PX grey levels. Pairs are proposed by a perceptual hash of 64 bits, the
signs of the lowest frequencies of a cosine transform, and kept where the grey levels correlate as well: to
0.95 where the images of a set are unlike each other, as photographs are; closer where all are alike, as
radiographs are. Mirrored and cropped copies are not found. Every image of one half is compared with every one
of the other, in blocks, so memory does not grow with the pairs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, UInt8, UInt64
from numpy.typing import NDArray
from PIL import Image
from scipy.fft import dctn

LOOK_PX = 16
MOST_BITS = 16  # that may differ, of 64
LARGEST_DISTANCE = 0.05  # 1 - correlation, as a share of the usual distance of two images of the set
SAMPLE = 500  # images of each half, spread over it, whose distances are the usual ones
BLOCK = 512, 16384  # images of one half, and of the other, whose hashes are compared at once
PAIRS = 50_000  # whose grey levels are compared at once: 50 MB a side


def look_of(pixels: UInt8[np.ndarray, "H W 3"]) -> bytes:
    """An image as LOOK_PX * LOOK_PX grey levels."""
    grey = Image.fromarray(pixels).convert("L")
    return grey.resize((LOOK_PX, LOOK_PX), Image.Resampling.BOX, reducing_gap=2.0).tobytes()


def nearest_looks(looks: list[bytes], others: list[bytes]) -> NDArray[np.int64]:
    """(len(looks),) for each image the one of the others that looks almost like it; -1 where none does."""
    found = np.full(len(looks), -1)
    if not looks or not others:
        return found
    ours, theirs = _grey(looks), _grey(others)
    our_bits, their_bits = _hashes(ours), _hashes(theirs)
    ours, theirs = _standardised(ours), _standardised(theirs)
    sample = [grey[:: len(grey) // SAMPLE + 1] for grey in (ours, theirs)]
    usual = float(np.median(1 - sample[0] @ sample[1].T / LOOK_PX**2))
    least = 1 - LARGEST_DISTANCE * min(usual, 1.0)
    best = np.full(len(looks), least, np.float32)  # of the one found so far
    for rows, columns in _proposed(our_bits, their_bits):
        likeness = (ours[rows] * theirs[columns]).mean(axis=1)
        np.maximum.at(best, rows, likeness)
        is_best = likeness == best[rows]
        found[rows[is_best]] = columns[is_best]  # of equal ones the last
    return found


def _proposed(
    our_bits: UInt64[np.ndarray, " N"], their_bits: UInt64[np.ndarray, " M"]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Rows and columns of the pairs whose hashes are near, at most PAIRS at once; a row's columns ascend."""
    for top in range(0, len(our_bits), BLOCK[0]):
        for left in range(0, len(their_bits), BLOCK[1]):
            ours, theirs = our_bits[top : top + BLOCK[0], None], their_bits[left : left + BLOCK[1]]
            rows, columns = np.nonzero(np.bitwise_count(ours ^ theirs) <= MOST_BITS)
            for start in range(0, len(rows), PAIRS):
                part = slice(start, start + PAIRS)
                yield top + rows[part], left + columns[part]


def _grey(looks: list[bytes]) -> Float[np.ndarray, "N P P"]:
    levels = np.frombuffer(b"".join(looks), np.uint8)
    return levels.reshape(-1, LOOK_PX, LOOK_PX).astype(np.float32)


def _hashes(grey: Float[np.ndarray, "N P P"]) -> UInt64[np.ndarray, " N"]:
    low = dctn(grey, axes=(1, 2))[:, :8, :8].reshape(len(grey), 64)
    low[:, 0] = 0  # the mean, which light changes
    return np.packbits(low > np.median(low, axis=1, keepdims=True), axis=1).view(np.uint64)[:, 0]


def _standardised(grey: Float[np.ndarray, "N P P"]) -> Float[np.ndarray, "N Q"]:
    """Mean 0 and deviation 1 an image; an image of one grey level is like no other."""
    flat = grey.reshape(len(grey), -1)
    flat = flat - flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(flat.std(axis=1, keepdims=True), 1.0)
