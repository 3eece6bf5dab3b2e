"""Crops to the network's input, a row and a pixel after the other, and batches to try the kernels with."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vitds.batch import Mixing

SCALE, SHIFT = (0.0171, 0.0175, 0.0174), (-2.118, -2.036, -1.804)
K = 3  # images of a chunk


class Case(NamedTuple):
    """What `write_images` is given."""

    crops: Tensor
    mixing: Mixing | None


def case(kind: str, side: int, *, views: int = 2, chunks: int = 2, seed: int = 0) -> Case:
    """Random crops and partners; boxes and lambdas with all edges among them, another for each row."""
    generator = np.random.default_rng(seed + side)
    rows = chunks * K * views
    crops = torch.from_numpy(generator.integers(0, 256, (chunks * K, views, 3, side, side), dtype=np.uint8))
    partner = generator.integers(0, rows, rows)
    partner[0] = 0  # its own
    # Rows of (top, bottom, left, right).
    box = generator.integers(0, side + 1, (rows, 4))
    box[:6] = (
        (0, side, 0, side),  # all
        (0, 0, 0, side),  # nothing
        (side, side, side, side),  # nothing, at the end
        (-2, side + 3, -1, 1),  # over the edges
        (0, 1, side - 1, side + 2),
        (side - 1, side, 0, side),
    )
    lam = generator.uniform(0.5, 1, rows).astype(np.float32)
    lam[:3] = 1, 0.5, np.nextafter(np.float32(1), np.float32(0))
    tables = (partner, np.ascontiguousarray(box.T), lam)
    return Case(crops, None if kind == "plain" else Mixing(kind, *map(torch.from_numpy, tables)))


def written_plainly(crops: Tensor, mixing: Mixing | None) -> Tensor:
    """What `write_images` has to write in float32, bit by bit."""
    levels = crops.numpy()
    chunks, views, side = len(levels) // K, levels.shape[1], levels.shape[-1]
    order = [
        levels[chunk * K + image, view]
        for chunk in range(chunks)
        for view in range(views)
        for image in range(K)
    ]
    images = np.empty((len(order), 3, side, side), np.float32)
    kind = "none" if mixing is None else mixing.kind
    for row, own in enumerate(order):
        if kind == "none":
            images[row] = scaled(own)
            continue
        other = order[mixing.partner[row]]
        if kind == "mixup":
            mine, theirs = scaled(own), scaled(other)
            # One rounding: 64 bits hold the product, and nearly always the sum.
            share = np.longdouble(mixing.lam.numpy()[row] - np.float32(1))
            images[row] = (share * (mine - theirs) + mine).astype(np.float32)
            continue
        top, bottom, left, right = mixing.box[:, row].tolist()
        for y in range(side):
            for x in range(side):
                inside = top <= y < bottom and left <= x < right
                images[row, :, y, x] = scaled((other if inside else own)[:, y : y + 1, x : x + 1])[:, 0, 0]
    return torch.from_numpy(images)


def scaled(levels: np.ndarray) -> np.ndarray:
    """A product and a sum, both rounded to float32."""
    scale, shift = (np.array(values, np.float32)[:, None, None] for values in (SCALE, SHIFT))
    return levels.astype(np.float32) * scale + shift
