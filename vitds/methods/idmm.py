"""IDMM: parametric instance discrimination with multi-crop and CutMix (Cao, Yu, Wu 2022, arXiv:2201.10728).

Each training image is a class of its own. The loss of a step is the sum over view groups of the mean
cross-entropy of the group's mixed crops. All views go through the backbone in one pass, for all have one
size.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitds import dist
from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.tree import Mix, Settings
from vitds.heads import DenseHead, ShardedHead
from vitds.heads.dense import scaled_features
from vitds.heads.first_rows import set_rows_from_features
from vitds.heads.kind import head_reason, resolve_head
from vitds.heads.logsumexp import highest_logits
from vitds.methods import base
from vitds.methods.classifier import WithHead, group_names, mixed
from vitds.models.precision import AUTOCAST

ROW_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Featuring(nn.Module):
    """A backbone alone in the engine: a sharded head makes the losses outside."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "M D"]:
        """The features; the targets are the head's business."""
        return self.backbone(images)


class Method(base.Method):
    """One row an image, inside the engine (dense) or spread over the ranks beside it (sharded)."""

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        self.settings = settings
        self.terms = group_names(settings)
        # Read for a dense head, whose name in the module begins so; a sharded one gets it from HeadShard.
        self.lr_scales = {"head.": settings.head.lr_scale}
        width = backbone.facts.width
        # One seed for both kinds: they start from the same rows.
        form = settings.head.form | {"seed": settings.seed}
        if settings.head.kind == "sharded":
            dtype = ROW_DTYPES[settings.head.row_dtype]
            self.head = ShardedHead(rows, width, sample_rate=settings.head.sample_rate, dtype=dtype, **form)
            # The engine owns the backbone alone; the head steps beside it (`outside`).
            self.module = Featuring(backbone)
            self.outside = (self.head,)
        else:
            self.head = DenseHead(rows, width, **form)
            # The head is part of the engine's module, and its rows are saved and sharded with the backbone.
            self.module = WithHead(backbone, self.head)
        reason = head_reason(settings.head, rows, width)
        self.about = f"{settings.head.kind} head of {rows:,} instances ({reason})"

    @staticmethod
    def rows(size: base.SetSize) -> int:
        """N instances."""
        return size.images

    @staticmethod
    def resolve(settings: Settings, rows: int, width: int) -> Settings:
        """head.kind, by the head's size."""
        kind = resolve_head(settings.head, rows, width)
        return settings.model_copy(update={"head": settings.head.model_copy(update={"kind": kind})})

    @staticmethod
    def mix(settings: Settings) -> Mix:
        """As the settings say."""
        return settings.mix

    @staticmethod
    def prepare(
        batch: CropBatch, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> TrainBatch:
        """Each crop's row is its image's number."""
        return mixed(batch, batch.index, settings, device, dtype)

    def losses(self, forward: base.Forward, batch: TrainBatch, step: int) -> Float[Tensor, "T"]:
        """Mixed, smoothed cross-entropy over all instances."""
        # Dense: the terms. Sharded: features (M, D), of which the head makes the terms outside the engine.
        output = forward(batch.images, batch.targets)
        if not self.outside:
            return output
        # The engine's autocast ended with its forward pass; the head's products need it again.
        dtype = AUTOCAST.get(self.settings.engine.precision)
        with torch.autocast(output.device.type, dtype, enabled=dtype is not None):
            return self.head(output, batch.targets, step)

    def start_from(self, features_of: base.FeaturesOf, device: torch.device) -> None:
        """`head.init: features`: a rank reads the images of the rows that it holds."""
        if self.settings.head.init == "features":
            # Rows are images: row i of the head starts from image i.
            x_nD, index_n = features_of(np.arange(self.head.first, self.head.last))
            set_rows_from_features(self.head, x_nD, index_n, device)

    @torch.inference_mode()
    def probes(
        self, features_MD: Float[Tensor, "M D"], index_M: Int[Tensor, "M"], weights: dict[str, Tensor]
    ) -> dict[str, float]:
        """probe/instance_top1: percent of un-mixed views whose own image has the highest logit.

        Accuracy in training is of mixed crops against one of their two images, and understates.
        """
        # ZeRO-3 may have spread a dense head's weight over the ranks; a sharded head has its rows itself.
        held = (
            {"weight": self.head.weight, "bias": self.head.bias}
            if self.outside
            else {
                name.removeprefix("head."): value
                for name, value in weights.items()
                if name.startswith("head.")
            }
        )
        weight = held["weight"]
        x_MD = scaled_features(features_MD.to(weight.device), self.head.temperature)
        # Places among this rank's rows; those of other ranks lie outside and give -inf.
        local_M = (index_M - self.head.first).to(weight.device)
        is_cosine = self.head.temperature is not None
        found = highest_logits(x_MD, weight, held.get("bias"), local_M, is_cosine=is_cosine)
        # Over all rows of all ranks. Where the two are equal, no row is above the image's own.
        highest_M, own_M = map(dist.all_reduce_max, found)
        return {"probe/instance_top1": 100 * float((own_M == highest_M).double().mean())}
