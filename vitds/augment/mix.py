"""Crops and labels -> normalised, mixed images and their targets, on the device that trains.

One draw of lambda, box and partners a chunk and group (METHOD 3.3, 4.1), keyed by (seed, step, chunk, group): so the mixing is the
same however chunks are spread over ranks and micro steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from vitds import rng
from vitds.batch import CropBatch, MixedBatch, Targets
from vitds.config.tree import Mix, Views
from vitds.rng import Purpose


@dataclass(frozen=True)
class CutMixBox:
    """Rows top:bottom and columns left:right come from the partner; `lam` is the share of pixels that stay."""

    top: int
    bottom: int
    left: int
    right: int
    lam: float


def draw_lambda(alpha: float, *key: int) -> float:
    """Beta(alpha, alpha), folded to 0.5 and above (METHOD 3.3)."""
    lam = float(rng.beta(alpha, Purpose.MIX, *key, 0))
    return max(lam, 1 - lam)


def draw_cutmix_box(side_px: int, alpha: float, *key: int) -> CutMixBox:
    """A square box about a uniform centre, clipped to the image; lambda is recomputed from the clipped area (METHOD 3.3)."""
    side = int(side_px * math.sqrt(1 - draw_lambda(alpha, *key)))
    centre_y, centre_x = (int(side_px * rng.uniform(Purpose.MIX, *key, axis)) for axis in (1, 2))
    top, bottom = max(centre_y - side // 2, 0), min(centre_y + side // 2, side_px)
    left, right = max(centre_x - side // 2, 0), min(centre_x + side // 2, side_px)
    return CutMixBox(top, bottom, left, right, 1 - (bottom - top) * (right - left) / side_px**2)


def draw_partners(is_real: np.ndarray, *key: int) -> np.ndarray:
    """For each row of a group its partner's row: a permutation of the real rows; a padded row is its own partner.

    Args:
        is_real: bool (rows,).
    Returns: int64 (rows,).
    """
    partners = np.arange(len(is_real))
    real = partners[is_real]
    partners[real] = real[rng.permutation(len(real), Purpose.PARTNERS, *key)]
    return partners


def kind_in_epoch(mix: Mix, epoch: int) -> str:
    """The mixing of an epoch: `alternate` is mixup in even epochs, CutMix in odd ones (METHOD 4.1)."""
    if mix.kind == "alternate":
        return "cutmix" if epoch % 2 else "mixup"
    return mix.kind


def mix_batch(batch: CropBatch, labels: Int[Tensor, "B"], views: Views, mix: Mix, seed: int, device: torch.device) -> MixedBatch:
    """Mix each chunk and group of a micro batch, then normalise.

    Args:
        batch: uint8 crops (B, V, 3, S, S) on the host; B is a multiple of mix.chunk_images.
        labels: the target of each image: its instance in pretraining, its class in fine-tuning.
    Returns: images (B·V, 3, S, S) float32 on `device` and targets, rows in the order (chunk, view, image).
    """
    chunk_images, side_px = mix.chunk_images, batch.crops.shape[-1]
    chunks = batch.crops.shape[0] // chunk_images
    crops = batch.crops.to(device, non_blocking=True).unflatten(0, (chunks, chunk_images)).transpose(1, 2)  # chunk, view, image
    is_real = batch.is_real.view(chunks, 1, chunk_images).expand(-1, views.count, -1).numpy()
    kind = kind_in_epoch(mix, batch.epoch)
    images = normalise(crops.reshape(-1, 3, side_px, side_px), views)
    rows = images.view(chunks, views.count * chunk_images, 3, side_px, side_px)
    partner = np.tile(np.arange(views.count * chunk_images), (chunks, 1))
    lam = np.ones((chunks, views.count * chunk_images), np.float32)
    for chunk in range(chunks if kind != "none" else 0):
        first_view = 0
        for number, group in enumerate(views.groups):
            own = slice(first_view * chunk_images, (first_view + group.views) * chunk_images)
            first_view += group.views
            key = (seed, batch.step, batch.first_chunk + chunk, number)
            partners = draw_partners(is_real[chunk].reshape(-1)[own], *key)
            partner[chunk, own] = own.start + partners
            lam[chunk, own] = _mix_rows(rows[chunk, own], torch.from_numpy(partners).to(device), kind, mix.alpha, key)
    return MixedBatch(images, _targets(batch, labels, views, partner, lam, device))


def _mix_rows(rows: Float[Tensor, "r 3 S S"], partners: Int[Tensor, "r"], kind: str, alpha: float, key: tuple[int, ...]) -> float:
    """Mix rows with their partners in place; returns lambda. Mixed after normalising: it is per channel, so they commute."""
    if kind == "mixup":
        lam = draw_lambda(alpha, *key)
        rows.copy_(torch.lerp(rows[partners], rows, lam))
        return lam
    box = draw_cutmix_box(rows.shape[-1], alpha, *key)
    inside = (..., slice(box.top, box.bottom), slice(box.left, box.right))
    rows[inside] = rows[inside][partners]
    return box.lam


def normalise(crops: UInt8[Tensor, "M 3 S S"], views: Views) -> Float[Tensor, "M 3 S S"]:
    """uint8 pixels -> float32, (pixel / 255 - mean) / std a channel."""
    mean, std = (torch.tensor(value, dtype=torch.float64).view(3, 1, 1) for value in (views.mean, views.std))
    scale, shift = ((1 / (255 * std)).float().to(crops.device), (-mean / std).float().to(crops.device))
    return crops.float().mul_(scale).add_(shift)


def _targets(
    batch: CropBatch, labels: Int[Tensor, "B"], views: Views, partner: np.ndarray, lam: np.ndarray, device: torch.device
) -> Targets:
    chunks = partner.shape[0]
    per_row = labels.view(chunks, 1, -1).expand(-1, views.count, -1).reshape(chunks, -1)
    group_of_view = torch.tensor([number for number, group in enumerate(views.groups) for _ in range(group.views)])
    group = group_of_view.view(1, -1, 1).expand(chunks, -1, per_row.shape[1] // views.count).reshape(-1)
    views_in_group = torch.tensor([group.views for group in views.groups])[group]
    is_real = batch.is_real.view(chunks, 1, -1).expand(-1, views.count, -1).reshape(-1)
    weight = is_real.float() / (views_in_group * batch.real_images)
    other = per_row.gather(1, torch.from_numpy(partner))
    columns = (per_row.reshape(-1), other.reshape(-1), torch.from_numpy(lam).reshape(-1), weight, group)
    return Targets(*(column.to(device, non_blocking=True) for column in columns))
