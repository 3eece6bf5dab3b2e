"""What the methods with a linear classifier share: every crop belongs to a row of it, mixed crops to two."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitds.augment.mix import mix_batch
from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.tree import Settings
from vitds.heads import DenseHead


class WithHead(nn.Module):
    """A backbone and its dense head; forward returns this rank's part of each view group's loss."""

    def __init__(self, backbone: nn.Module, head: DenseHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "G"]:
        """See the class."""
        # One call of the engine for features and loss: ZeRO's and autocast's hooks see both.
        return self.head(self.backbone(images), targets)


def mixed(
    batch: CropBatch, labels: Int[Tensor, "B"], settings: Settings, device: torch.device, dtype: torch.dtype
) -> TrainBatch:
    """The batch mixed as the settings say, `labels` being the row that each image belongs to."""
    # Classifiers differ in what a label is, and in nothing else.
    return mix_batch(
        batch,
        labels,
        settings.views,
        settings.mix,
        chunk_images=settings.batch.chunk_images,
        seed=settings.seed,
        device=device,
        dtype=dtype,
    )


def group_names(settings: Settings) -> tuple[str, ...]:
    """The terms of such a loss: one a view group."""
    # In the order of Targets.group, by which the head sums.
    return tuple(group.name for group in settings.views.groups)
