"""Crops and labels -> normalised, mixed images and their targets, on the device that trains.

One draw of lambda, box and partners a chunk and group (as in the paper's code), keyed by (seed, step, chunk,
group): so the mixing is the same however chunks are spread over ranks and micro steps.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Int
from numpy.typing import NDArray
from torch import Tensor

from vitds import rng
from vitds.augment.images import to_images
from vitds.batch import CropBatch, CutMixBox, Mixing, Targets, TrainBatch, each_tensor
from vitds.config.tree import Mix, Views
from vitds.rng import Purpose

NO_MIX = Mix(kind="none")


def draw_lambda(alpha: float, *key: rng.Key) -> NDArray[np.float64]:
    """Beta(alpha, alpha), folded to 0.5 and above, as the paper's code does; one a key."""
    # The last part of the key, 0, is the number of the draw; 1 and 2 are the centre's coordinates.
    lam = rng.beta(alpha, Purpose.MIX, *key, 0)
    return np.asarray(np.maximum(lam, 1 - lam))


def draw_cutmix_box(side_px: int, alpha: float, *key: rng.Key) -> CutMixBox:
    """A square box about a uniform centre, clipped to the image.

    Lambda is recomputed from the clipped area.
    """
    # docs/method.md, "CutMix", has the formulas. // 2 after floor: an odd side loses a pixel.
    half = np.floor(side_px * np.sqrt(1 - draw_lambda(alpha, *key))).astype(np.int64) // 2
    # Any pixel may be the centre, so boxes at the border are cut.
    centre_y, centre_x = (
        np.floor(side_px * rng.uniform(Purpose.MIX, *key, axis)).astype(np.int64) for axis in (1, 2)
    )
    top, bottom = np.maximum(centre_y - half, 0), np.minimum(centre_y + half, side_px)
    left, right = np.maximum(centre_x - half, 0), np.minimum(centre_x + half, side_px)
    # lam is the share that is left after clipping, not what was drawn.
    return CutMixBox(
        *map(np.asarray, (top, bottom, left, right, 1 - (bottom - top) * (right - left) / side_px**2))
    )


def draw_partners(is_real: NDArray[np.bool_], *key: rng.Key) -> NDArray[np.int64]:
    """For each row of each chunk its partner's row in the chunk.

    It is a permutation of the real rows; a padded row is its own partner.

    Args:
        is_real: (chunks, rows).
        key: integers, or (chunks, 1) arrays.
    Returns: (chunks, rows).
    """
    # Keyed by a row's number among the real ones of its chunk: rows that are left out take no key.
    words = rng.words(Purpose.PARTNERS, *key, np.cumsum(is_real, 1) - 1)
    # Padded rows get the largest word and so sort last; the first of the order are the real rows, shuffled.
    order = np.argsort(np.where(is_real, words, np.iinfo(np.uint64).max), axis=1, kind="stable")
    # Everyone is its own partner first, and padded rows remain so.
    partners = np.broadcast_to(np.arange(is_real.shape[1]), is_real.shape).copy()
    for chunk, real in enumerate(is_real):
        partners[chunk, real] = order[chunk, : real.sum()]
    return partners


def kind_in_epoch(mix: Mix, epoch: int) -> str:
    """The mixing of an epoch: `alternate` is mixup in even epochs, CutMix in odd ones."""
    if mix.kind == "alternate":
        return "cutmix" if epoch % 2 else "mixup"
    return mix.kind


def mix_batch(
    batch: CropBatch,
    labels: Int[Tensor, "B"],
    views: Views,
    mix: Mix,
    *,
    chunk_images: int,
    seed: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> TrainBatch:
    """Mix each chunk and group of a micro batch, and normalise.

    Args:
        batch: uint8 crops (B, V, 3, S, S); B is a multiple of chunk_images. Its draws, where it has them, are
            of these `labels`, this `mix` and `seed`.
        labels: the target of each image: its instance in pretraining, its class in fine-tuning.
        mix: kind `none` leaves every row its own, as methods that mix nothing want it.
        chunk_images: K, the images that share a draw.
        dtype: of the images.
    Returns: images (B·V, 3, S, S) on `device` and targets, rows in the order (chunk, view, image).
    """
    # Made ahead in a run, and then on the device already.
    drawn = (
        (batch.draws.mixing, batch.draws.targets)
        if batch.draws
        else draw_mixed(batch, labels, views, mix, chunk_images=chunk_images, seed=seed)
    )
    mixing, targets = each_tensor(drawn, lambda table: table.to(device, non_blocking=True))
    crops = batch.crops.to(device, non_blocking=True)
    return TrainBatch(to_images(crops, views, mixing, chunk_images=chunk_images, dtype=dtype), targets)


def plain_batch(
    batch: CropBatch,
    views: Views,
    *,
    chunk_images: int,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    labels: Int[Tensor, "B"] | None = None,
) -> TrainBatch:
    """The crops normalised and not mixed, each image its own target if it has no other by `labels`: for
    methods that compare crops."""
    labels = batch.index if labels is None else labels
    # No draw is made for kind none, so any seed does.
    form = {"chunk_images": chunk_images, "device": device, "dtype": dtype}
    return mix_batch(batch, labels, views, NO_MIX, seed=0, **form)


def draw_mixed(
    batch: CropBatch, labels: Int[Tensor, "B"], views: Views, mix: Mix, *, chunk_images: int, seed: int
) -> tuple[Mixing, Targets]:
    """How a batch is mixed, and its targets: on the host, for neither asks for pixels.

    Args: see `mix_batch`.
    """
    place = (batch.epoch, batch.step, batch.first_chunk)
    mixing = draw_mixing(batch.is_real.numpy(), *place, views, mix, chunk_images=chunk_images, seed=seed)
    return mixing, _targets(batch, labels, views, mixing, len(labels) // chunk_images)


def draw_mixing(
    is_real: NDArray[np.bool_],
    epoch: int,
    step: int,
    first_chunk: int,
    views: Views,
    mix: Mix,
    *,
    chunk_images: int,
    seed: int,
) -> Mixing:
    """Each row's partner within its chunk, its box and lambda: one draw of them a chunk and group.

    Args:
        is_real: (B,) False for images that pad or are damaged.
        epoch: decides the kind of `alternate`.
        step: of the run.
        first_chunk: number of the batch's first chunk within the step, over all ranks.
    """
    kind = kind_in_epoch(mix, epoch)
    chunks = len(is_real) // chunk_images
    # (B,) -> (chunks, V·K): each view of a real image is real.
    is_real = np.tile(is_real.reshape(chunks, 1, chunk_images), (1, views.count, 1)).reshape(chunks, -1)
    rows = is_real.shape[1]
    # Without mixing: everyone its own partner, empty boxes, lambda 1.
    partner = np.tile(np.arange(rows), (chunks, 1))
    edges = [np.zeros((chunks, rows), np.int64) for _ in range(4)]
    lam, first = np.ones((chunks, rows)), 0
    for number, group in enumerate(views.groups if kind != "none" else ()):
        # A group's views stand together, so its rows in a chunk are one slice.
        own = slice(first, first + group.views * chunk_images)
        first = own.stop
        # Chunks are numbered over all ranks of a step, (chunks, 1): the draw is the same on any of them.
        key = (seed, step, first_chunk + np.arange(chunks)[:, None], number)
        # Places within the group, moved to places within the chunk: crops mix within their group alone.
        partner[:, own] = own.start + draw_partners(is_real[:, own], *key)
        if kind == "mixup":
            # (chunks, 1) fills all rows of the group in a chunk: one draw for them all.
            lam[:, own] = draw_lambda(mix.alpha, *key)
            continue
        box = draw_cutmix_box(views.crop_px, mix.alpha, *key)
        lam[:, own] = box.lam
        for edge, drawn in zip(edges, (box.top, box.bottom, box.left, box.right), strict=True):
            edge[:, own] = drawn
    # From places within a chunk to places among all M rows.
    partner += rows * np.arange(chunks)[:, None]
    columns = (partner.reshape(-1), np.reshape(edges, (4, -1)), lam.astype(np.float32).reshape(-1))
    return Mixing(kind, *map(torch.from_numpy, columns))


def _targets(
    batch: CropBatch,
    labels: Int[Tensor, "B"],
    views: Views,
    mixing: Mixing,
    chunks: int,
) -> Targets:
    # (B,) -> (chunks, V·K): each view has its image's label.
    per_row = labels.view(chunks, 1, -1).expand(-1, views.count, -1).reshape(chunks, -1)
    # View number -> group number, then for each of the M rows.
    group_of_view = torch.tensor(
        [number for number, group in enumerate(views.groups) for _ in range(group.views)]
    )
    group = group_of_view.view(1, -1, 1).expand(chunks, -1, per_row.shape[1] // views.count).reshape(-1)
    views_in_group = torch.tensor([group.views for group in views.groups])[group]
    is_real = batch.is_real.view(chunks, 1, -1).expand(-1, views.count, -1).reshape(-1)
    # 1 / (v · real images of the step): rows of a group weigh 1 together, over all ranks and micro steps.
    weight = is_real.float() / (views_in_group * batch.real_images)
    label = per_row.reshape(-1)
    # The partner's label; with lambda 1 it counts for nothing.
    return Targets(label, label[mixing.partner], mixing.lam, weight, group, groups=len(views.groups))
