"""SupCon: two views of an image find the crops of their class among all crops of their chunk.

Source: Khosla et al. 2020, arXiv:2004.11362, the form with the sum outside the logarithm, and the authors'
code.

It trains on class labels, although it is a pretraining: the class head comes later. Images without a label
are left out, as in fine-tuning. A chunk has to hold more than one image of a class, or the other view of an
image is all that it finds: `batch.chunk_images` is what the authors call the batch.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds.augment.mix import plain_batch
from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.tree import Settings
from vitds.heads.bytes import FLOAT, Activations, contrast_bytes
from vitds.heads.contrast import among_class
from vitds.methods import base

BASE_TEMPERATURE = 0.07  # the authors' loss is this many times smaller than its gradient's natural size


class Classing(nn.Module):
    """Backbone and projector; forward returns this rank's part of the mean over all crops, (1,)."""

    def __init__(
        self, backbone: nn.Module, projector: nn.Module, *, temperature: float, chunk_images: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.temperature = temperature
        self.chunk_images = chunk_images

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "1"]:
        """See the class."""
        # Rows stand in the order (chunk, view, image): a chunk is 2 K crops.
        form = (-1, 2 * self.chunk_images)
        z_MD = self.projector(self.backbone(images))
        # Similarities and softmax in float32: divided by a small temperature, they magnify rounding.
        with torch.autocast(images.device.type, enabled=False):
            z_MD = z_MD.to(torch.promote_types(z_MD.dtype, torch.float32))
            losses_M = among_class(z_MD, targets.a.view(form), targets.is_real.view(form), self.temperature)
        return self.temperature / BASE_TEMPERATURE * targets.part_of_mean(losses_M)[None]


class Method(base.Method):
    """See the module."""

    needs_labels: ClassVar[bool] = True
    terms = ("contrast",)

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        width, own = backbone.facts.width, settings.supcon
        with base.added_parts(settings):
            # The authors' projector: no norm, so no image sees another before the loss.
            projector = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, own.width))
        self.module = Classing(
            backbone, projector, temperature=own.temperature, chunk_images=settings.batch.chunk_images
        )
        self.about = (
            f"class labels, projector {width}-{width}-{own.width}, chunks of {settings.batch.chunk_images} "
            "images"
        )

    @staticmethod
    def prepare(
        batch: CropBatch, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> TrainBatch:
        """The crops as they are, with the classes of their images."""
        chunk_images = settings.batch.chunk_images
        return plain_batch(
            batch,
            settings.views,
            labels=batch.label,
            chunk_images=chunk_images,
            device=device,
            dtype=dtype,
        )

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """Of the projector, and of the similarities of all crops of each chunk."""
        # Two views of each image.
        crops = 2 * settings.batch.micro_images
        # Each crop meets all 2 K of its chunk.
        pairs = crops * 2 * settings.batch.chunk_images
        # The projector's input, and its middle after ReLU.
        kept = 2 * crops * width * product
        return {
            "activations of the projector": Activations(kept, crops * width * FLOAT),
            "similarities": contrast_bytes(pairs, crops, settings.supcon.width, marks=2),
        }
