"""What is drawn for a batch beside its crops, as the loader's threads make it ahead of the step."""

from __future__ import annotations

from vitds.augment.mix import draw_mixed
from vitds.batch import CropBatch, Drawing, Draws
from vitds.config.tree import Settings
from vitds.methods.base import Method
from vitds.models.stochastic import StochasticDraws


def drawing_of(settings: Settings, method: type[Method], stochastic: StochasticDraws) -> Drawing:
    """Mixing, targets, drop path and patch drop of a run, a function of a batch's place and images alone.

    Args:
        settings: of the run.
        method: says what it mixes, and whether its targets are classes.
        stochastic: of the backbone that trains.
    """
    views, mix, chunk_images = settings.views, method.mix(settings), settings.batch.chunk_images

    def draw(batch: CropBatch) -> Draws:
        labels = batch.label if method.needs_labels else batch.index
        mixed = draw_mixed(batch, labels, views, mix, chunk_images=chunk_images, seed=settings.seed)
        return Draws(*mixed, stochastic.draw(batch.step, batch.first_chunk, len(labels) // chunk_images))

    return draw
