"""SimCLR: two views of an image find each other among all views of their chunk.

Source: Chen et al. 2020, arXiv:2002.05709, with the projector of arXiv:2006.10029.

The backbone's features pass a projector whose batch norm is over the chunk, as the negatives are. So
`batch.chunk_images` is what SimCLR's authors call the batch: as large as memory allows.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds.batch import Targets
from vitds.config.tree import Settings
from vitds.heads.bytes import Activations, contrast_bytes, projector_bytes
from vitds.heads.contrast import among_all_views
from vitds.heads.projector import Projector
from vitds.methods import base


class Contrasting(nn.Module):
    """Backbone and projector; forward returns this rank's part of the mean over all crops, (1,)."""

    def __init__(
        self, backbone: nn.Module, projector: Projector, *, temperature: float, chunk_images: int
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.temperature = temperature
        self.chunk_images = chunk_images

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "1"]:
        """See the class."""
        # Rows stand in the order (chunk, view, image): a chunk is 2 K crops, first views before second ones.
        is_real_cA = targets.is_real.view(-1, 2 * self.chunk_images)
        z_MD = self.projector(self.backbone(images), is_real_cA)
        # Similarities and softmax in float32: divided by a small temperature, they magnify rounding.
        with torch.autocast(images.device.type, enabled=False):
            losses_M = among_all_views(z_MD, is_real_cA, self.temperature)
        # () -> (1,): a single term.
        return targets.part_of_mean(losses_M)[None]


def _widths(settings: Settings, width: int) -> list[int]:
    """Of the projector's input, hidden layers and output."""
    own = settings.simclr
    # `layers` linear layers, so one hidden width less.
    return [width, *[own.hidden] * (own.layers - 1), own.width]


class Method(base.Method):
    """See the module."""

    terms = ("contrast",)

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        own = settings.simclr
        widths = _widths(settings, backbone.facts.width)
        with base.added_parts(settings):
            projector = Projector(widths, last="scale")
        self.module = Contrasting(
            backbone, projector, temperature=own.temperature, chunk_images=settings.batch.chunk_images
        )
        self.about = f"projector {'-'.join(map(str, widths))}, chunks of {settings.batch.chunk_images} images"

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """Of the projector, and of the similarities of all crops of each chunk."""
        widths = _widths(settings, width)
        # Two views of each image.
        crops = 2 * settings.batch.micro_images
        # Each crop meets all 2 K of its chunk.
        pairs = crops * 2 * settings.batch.chunk_images
        return {
            "activations of the projector": projector_bytes(widths, crops, product=product, last_scales=True),
            "similarities": contrast_bytes(pairs, crops, widths[-1]),
        }
