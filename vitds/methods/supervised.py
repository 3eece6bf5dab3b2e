"""Supervised training and fine-tuning (METHOD 4): one view, class labels, mixup or CutMix by epoch, label smoothing."""

from __future__ import annotations

import torch

from vitds.augment.mix import mix_batch
from vitds.batch import CropBatch, MixedBatch
from vitds.config.tree import Settings


def prepare(batch: CropBatch, settings: Settings, device: torch.device) -> MixedBatch:
    """Crops -> what enters the backbone, the target of a row being its image's class."""
    return mix_batch(batch, batch.label, settings.views, settings.mix, settings.seed, device)
