"""95 % intervals by the bootstrap: what would another test set of as many images have given?

The images are drawn anew, with repeats, DRAWS times. The draws are keyed by draw and position, so they are
the same for every model: differences between models on the same images are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from vitds import rng
from vitds.rng import Purpose

DRAWS = 1000
PERCENTILES = (2.5, 97.5)
HELD = 2**22  # positions drawn at once, 32 MB

Interval = tuple[float, float]


def interval_of_mean(value_M: NDArray[np.float64]) -> Interval:
    """Of the mean of one number an image.

    Raises: ValueError if there are no images.
    """
    return intervals(lambda drawn_RM: value_M[drawn_RM].mean(1, keepdims=True), len(value_M))[0]


def intervals(statistics: Callable[[NDArray[np.int64]], NDArray[np.float64]], images: int) -> list[Interval]:
    """Of several statistics at once.

    Args:
        statistics: positions of the drawn images (R, M), a draw a row -> the statistics (R, S) of each draw.
        images: M.
    Raises: ValueError if there are no images.
    """
    if not images:
        raise ValueError("bootstrap: there are no images")
    found_RS = np.concatenate([statistics(drawn_RM) for drawn_RM in _draws(images)])
    return [tuple(map(float, ends)) for ends in np.percentile(found_RS, PERCENTILES, axis=0).T]


def _draws(images: int) -> Iterator[NDArray[np.int64]]:
    """The positions of all draws, (R, M) at a time."""
    rows = max(1, HELD // images)
    for first in range(0, DRAWS, rows):
        draw_R = np.arange(first, min(first + rows, DRAWS))
        word_RM = rng.words(Purpose.BOOTSTRAP, draw_R[:, None], np.arange(images))
        yield (word_RM % np.uint64(images)).astype(np.int64)
