"""Supervised training and fine-tuning: one view, class labels, mixup or CutMix by epoch, label smoothing."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds.batch import CropBatch, TrainBatch
from vitds.config.tree import Settings
from vitds.errors import SettingsError
from vitds.heads import DenseHead
from vitds.methods import base
from vitds.methods.classifier import WithHead, group_names, mixed


class Method(base.Method):
    """A class head inside the engine; its row count is the number of classes."""

    needs_labels: ClassVar[bool] = True
    leaves_class_head: ClassVar[bool] = True

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        head = DenseHead(rows, backbone.facts.width, seed=settings.seed, **settings.head.form)
        self.module = WithHead(backbone, head)
        self.terms = group_names(settings)
        self.lr_scales = {"head.": settings.head.lr_scale}

    @staticmethod
    def rows(size: base.SetSize) -> int:
        """C classes."""
        return size.classes

    @staticmethod
    def resolve(settings: Settings, rows: int, width: int) -> Settings:
        """The head is dense: C rows are few.

        Raises: SettingsError if a sharded one is asked for.
        """
        if settings.head.kind == "sharded":
            raise SettingsError("head.kind sharded is for the instance head of pretraining; leave it out")
        return settings.model_copy(update={"head": settings.head.model_copy(update={"kind": "dense"})})

    @staticmethod
    def prepare(batch: CropBatch, settings: Settings, device: torch.device) -> TrainBatch:
        """Each crop's row is its image's class."""
        return mixed(batch, batch.label, settings, device)

    def losses(self, forward: base.Forward, batch: TrainBatch, step: int) -> Float[Tensor, "T"]:
        """Mixed, smoothed cross-entropy."""
        return forward(batch.images, batch.targets)

    @property
    def about(self) -> str:
        return f"dense head of {self.module.head.last:,} classes"
