"""What is drawn for a batch beside its crops, as the loader's threads make it ahead of the step."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from vitds.augment.mix import draw_mixing
from vitds.batch import Drawing, Draws
from vitds.config.tree import Settings
from vitds.methods.base import Method
from vitds.models.stochastic import StochasticDraws


def drawing_of(settings: Settings, method: type[Method], stochastic: StochasticDraws) -> Drawing:
    """Mixing, drop path and patch drop of a run, a function of a batch's place alone.

    Args:
        settings: of the run.
        method: says what it mixes.
        stochastic: of the backbone that trains.
    """
    views, mix, chunk_images = settings.views, method.mix(settings), settings.batch.chunk_images

    def draw(is_real: NDArray[np.bool_], epoch: int, step: int, first_chunk: int) -> Draws:
        place = (epoch, step, first_chunk)
        mixing = draw_mixing(is_real, *place, views, mix, chunk_images=chunk_images, seed=settings.seed)
        return Draws(mixing, stochastic.draw(step, first_chunk, len(is_real) // chunk_images))

    return draw
