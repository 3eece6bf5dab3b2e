"""Supervised training and fine-tuning (METHOD 4): one view, class labels, mixup or CutMix by epoch, label smoothing."""

from __future__ import annotations

import torch

from vitds.augment.mix import mix_batch
from vitds.batch import CropBatch, TrainBatch
from vitds.config.tree import Settings


def prepare(batch: CropBatch, settings: Settings, device: torch.device) -> TrainBatch:
    """Crops -> what enters the backbone, the target of a row being its image's class."""
    return mix_batch(
        batch,
        batch.label,
        settings.views,
        settings.mix,
        chunk_images=settings.batch.chunk_images,
        seed=settings.seed,
        device=device,
    )
