"""IDMM: parametric instance discrimination with multi-crop and CutMix (Cao, Yu, Wu 2022, METHOD 3).

Each training image is a class of its own. The loss of a step is the sum over view groups of the mean cross-entropy of the group's
mixed rows; all views go through the backbone in one pass, for all have one size.
"""

from __future__ import annotations

import torch

from vitds.augment.mix import mix_batch
from vitds.batch import CropBatch, TrainBatch
from vitds.config.tree import Settings


def prepare(batch: CropBatch, settings: Settings, device: torch.device) -> TrainBatch:
    """Crops -> what enters the backbone, the target of a row being its image's index."""
    return mix_batch(
        batch,
        batch.index,
        settings.views,
        settings.mix,
        chunk_images=settings.batch.chunk_images,
        seed=settings.seed,
        device=device,
    )
