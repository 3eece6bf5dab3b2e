"""LeJEPA: the views of an image have one feature, and the features of all images are normally distributed.

Source: Balestriero, LeCun 2025, arXiv:2511.08544, and the authors' code.

There is no teacher, no predictor and no stopped gradient. What keeps features from collapsing is SIGReg:
along random directions, the Epps-Pulley test of a standard normal distribution. Features are not of length
one.

The authors test the features of all ranks together, along directions that are drawn for the step. Here it is
those of a chunk, along directions of its own; so `batch.chunk_images` is what they call the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from vitds import rng
from vitds.augment.mix import plain_batch
from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.tree import Settings
from vitds.heads.bytes import FLOAT, Activations, projector_bytes
from vitds.heads.projector import Projector
from vitds.methods import base
from vitds.rng import Purpose

POINTS, STEP = 16, 3 / 16  # the authors' points t of the characteristic function: 3/16, 6/16, ... 3


@dataclass(frozen=True)
class SlicedBatch(TrainBatch):
    """A batch with the directions along which each of its chunks is tested, of length one."""

    directions: Float[Tensor, "c d s"]


def draw_directions(width: int, count: int, *key: rng.Key) -> Float[Tensor, "c d s"]:
    """Directions of length one in `width` dimensions, evenly spread over the sphere: `count` for each chunk.

    Args:
        key: integers, or (c,) arrays, one of which has the chunks' numbers.
    """
    keys = [np.asarray(part)[..., None, None] for part in key]
    # Normal numbers have no direction of their own, so their quotient by the length has none.
    drawn_cds = rng.normal(Purpose.DIRECTIONS, *keys, np.arange(width)[:, None], np.arange(count))
    return torch.from_numpy(drawn_cds / np.linalg.norm(drawn_cds, axis=1, keepdims=True)).float()


def invariance(z_cVKD: Float[Tensor, "c V K d"], global_views: int) -> Float[Tensor, "c K"]:
    """Of each image the mean squared distance of its views to the mean of the first `global_views`, by d."""
    centre_c1KD = z_cVKD[:, :global_views].mean(1, keepdim=True)
    return (z_cVKD - centre_c1KD).square().mean((1, 3))


def sigreg(
    z_cVKD: Float[Tensor, "c V K d"], is_real_cK: Bool[Tensor, "c K"], directions_cds: Float[Tensor, "c d s"]
) -> Float[Tensor, "c"]:
    """Epps-Pulley's statistic of each chunk's real images, the mean over views and directions.

    n ∫ |mean exp(i t x) - exp(-t² / 2)|² exp(-t² / 2) dt over -3..3, by the trapezoid rule, for n images with
    the coordinates x along a direction. It is near 1 where x is standard normal, and 0.4 n where all x are 0.
    """
    n_c = is_real_cK.sum(1)
    # (c, 1, 1, K): the product with it is the mean over real images; a chunk of padding divides by no 0.
    mean_c11K = (is_real_cK / n_c.clamp_min(1)[:, None]).to(z_cVKD.dtype)[:, None, None]
    x_cVKs = z_cVKD @ directions_cds[:, None].to(z_cVKD.dtype)
    distance_cV1s = torch.zeros((), dtype=z_cVKD.dtype, device=z_cVKD.device)
    # From 1: at t = 0 both functions are 1. Both are symmetric, so each point stands for two.
    for number in range(1, POINTS + 1):
        t = number * STEP
        normal = math.exp(-(t**2) / 2)
        angle_cVKs = x_cVKs * t
        real_cV1s, imaginary_cV1s = mean_c11K @ angle_cVKs.cos(), mean_c11K @ angle_cVKs.sin()
        width = STEP if number == POINTS else 2 * STEP
        distance_cV1s = distance_cV1s + width * normal * (
            (real_cV1s - normal).square() + imaginary_cV1s.square()
        )
    return n_c * distance_cV1s.mean((1, 2, 3))


class Slicing(nn.Module):
    """Backbone and projector; forward returns this rank's part of both terms, (2,).

    Args:
        views: V, of an image.
        global_views: how many of them, the first ones, the others have to agree with.
        share: of SIGReg in the loss.
        chunk_images: K.
    """

    def __init__(
        self,
        backbone: nn.Module,
        projector: Projector,
        *,
        views: int,
        global_views: int,
        share: float,
        chunk_images: int,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.views = views
        self.global_views = global_views
        self.share = share
        self.chunk_images = chunk_images

    def forward(
        self, images: Float[Tensor, "M 3 S S"], targets: Targets, directions: Float[Tensor, "c d s"]
    ) -> Float[Tensor, "2"]:
        """See the class."""
        # Rows stand in the order (chunk, view, image).
        form = (-1, self.views, self.chunk_images)
        is_real_cVK, weight_cVK = targets.is_real.view(form), targets.weight.view(form)
        z_MD = self.projector(self.backbone(images), is_real_cVK.flatten(1))
        with torch.autocast(images.device.type, enabled=False):
            # (M, d) -> (c, V, K, d), in float32 or wider: the last layer has no norm that would see to it.
            z_cVKD = z_MD.to(torch.promote_types(z_MD.dtype, torch.float32)).unflatten(0, is_real_cVK.shape)
            distance_cK = invariance(z_cVKD, self.global_views)
            statistic_c = sigreg(z_cVKD, is_real_cVK[:, 0], directions)
        # Of n real images in the step each weighs 1 / n here, whatever the sizes of the groups.
        weight_cK = self.global_views * weight_cVK[:, 0]
        # A chunk's statistic weighs as much as its images.
        terms = (distance_cK * weight_cK).double().sum(), (statistic_c * weight_cK.sum(1)).double().sum()
        return torch.stack([(1 - self.share) * terms[0], self.share * terms[1]])


def _widths(settings: Settings, width: int) -> list[int]:
    """Of the projector's input, hidden layers and output."""
    own = settings.lejepa
    return [width, own.hidden, own.hidden, own.width]


class Method(base.Method):
    """See the module."""

    terms = ("invariance", "sigreg")

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        own = settings.lejepa
        widths = _widths(settings, backbone.facts.width)
        with base.added_parts(settings):
            projector = Projector(widths, last=None)
        self.module = Slicing(
            backbone,
            projector,
            views=settings.views.count,
            global_views=settings.views.groups[0].views,
            share=own.sigreg,
            chunk_images=settings.batch.chunk_images,
        )
        self.about = (
            f"projector {'-'.join(map(str, widths))}, {own.directions:,} directions for each chunk of "
            f"{settings.batch.chunk_images} images"
        )

    @staticmethod
    def prepare(
        batch: CropBatch, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> SlicedBatch:
        """The crops as they are, and the directions of their chunks."""
        own, chunk_images = settings.lejepa, settings.batch.chunk_images
        plain = plain_batch(batch, settings.views, chunk_images=chunk_images, device=device, dtype=dtype)
        # Chunks are numbered over all ranks of a step.
        chunk_c = batch.first_chunk + np.arange(len(batch.index) // chunk_images)
        directions = draw_directions(own.width, own.directions, settings.seed, batch.step, chunk_c)
        return SlicedBatch(plain.images, plain.targets, directions.to(device, non_blocking=True))

    def losses(self, forward: base.Forward, batch: TrainBatch, step: int) -> Float[Tensor, "T"]:
        """How far apart the views of an image are, and how far from normal the features."""
        return forward(batch.images, batch.targets, batch.directions)

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """Of the projector, and of the coordinates along all directions at each point."""
        crops = settings.views.count * settings.batch.micro_images
        # An angle a point, from which cosine and sine are differentiated.
        coordinates = FLOAT * crops * settings.lejepa.directions
        return {
            "activations of the projector": projector_bytes(
                _widths(settings, width), crops, product=product, last_scales=False
            ),
            "activations of the directions": Activations(POINTS * coordinates, 3 * coordinates),
        }
