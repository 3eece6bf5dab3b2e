"""Supervised training and fine-tuning: one view, class labels, mixup or CutMix by epoch, label smoothing."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.tree import Mix, Settings
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
        self.is_balanced = settings.head.class_weight == "balanced"
        self.class_weight_C = torch.ones(rows)
        self.about = f"dense head of {rows:,} classes"

    def learn_labels(self, label_N: NDArray[np.int64]) -> None:
        """With head.class_weight balanced an image of class c weighs N / (C · n_c): on average 1.

        So the weights are fixed for the run, and a step's loss keeps its divisor, which every rank knows.
        """
        if self.is_balanced:
            from sklearn.utils.class_weight import (
                compute_class_weight,  # at the top it costs every start a second
            )

            present = np.unique(label_N)
            weight = compute_class_weight("balanced", classes=present, y=label_N)
            self.class_weight_C[torch.from_numpy(present)] = torch.from_numpy(weight).float()

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
    def mix(settings: Settings) -> Mix:
        """As the settings say."""
        return settings.mix

    @staticmethod
    def prepare(
        batch: CropBatch, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> TrainBatch:
        """Each crop's row is its image's class."""
        return mixed(batch, batch.label, settings, device, dtype)

    def losses(self, forward: base.Forward, batch: TrainBatch, step: int) -> Float[Tensor, "T"]:
        """Mixed, smoothed cross-entropy, each target weighing as much as its class."""
        if not self.is_balanced:
            return forward(batch.images, batch.targets)
        # Copied there once: a copy in each step would let the host wait for the card.
        self.class_weight_C = self.class_weight_C.to(batch.device)
        return forward(batch.images, weighted(batch.targets, self.class_weight_C))


def weighted(targets: Targets, class_weight_C: Float[Tensor, "C"]) -> Targets:
    """The targets of a loss in which each of a crop's two classes counts by its weight.

    lam · w_a · loss_a + (1 - lam) · w_b · loss_b is the mixed loss at another lam, times another weight; so
    the head need not know. The smoothed part of the loss weighs as much as the crop.
    """
    weight_C = class_weight_C.to(targets.weight.device)
    first_M, second_M = targets.lam * weight_C[targets.a], (1 - targets.lam) * weight_C[targets.b]
    both_M = first_M + second_M
    return replace(targets, lam=first_M / both_M, weight=targets.weight * both_M)
