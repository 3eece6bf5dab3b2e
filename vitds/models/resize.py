"""Weights that belong to a grid of patches, made fit for the grid of another side.

Nothing else of a backbone changes its shape with the side of the crops. Rotary embeddings, convolutions and
tables made by a small network have no such weights.
"""

from __future__ import annotations

import math

import torch
from timm.layers import (
    resample_abs_pos_embed,
    resample_abs_pos_embed_nhwc,
    resize_rel_pos_bias_table_simple,
)
from timm.models.nest import resize_pos_embed as resample_blocks
from torch import Tensor
from torch.nn.functional import interpolate

from vitds.config.tree import Backbone
from vitds.errors import SettingsError, ShapeError
from vitds.models.create import create_model
from vitds.models.facts import trains

MOST_PREFIX = 9  # class, distillation and register tokens in a position embedding


def resized(name: str, value: Tensor, own: Tensor) -> Tensor:
    """A position embedding or bias table of one grid for another; grids are square, values interpolated.

    Args:
        name: of the parameter; timm's names say what kind it is.
        value: as the weights have it.
        own: the backbone's, whose shape is wanted.
    Raises: ShapeError if it is of no such kind, or of another width.
    """
    kind = name.rpartition(".")[2]
    try:
        if kind == "relative_position_bias_table":
            fitted = _bias_table(value, own)
        elif kind == "attention_biases":
            fitted = _distance_table(value, own)
        elif kind in ("rel_pos_h", "rel_pos_w"):  # (2·side - 1, D), one line of distances
            fitted = interpolate(value.float().T[None], size=len(own), mode="linear")[0].T
        elif "pos" in kind:
            fitted = _positions(value, own)
        else:
            fitted = value
    except (RuntimeError, ValueError, AssertionError, IndexError, ZeroDivisionError):  # timm's, of odd shapes
        fitted = value
    # Also catches what was passed on unchanged, and tables whose resizing went wrong without an error.
    if fitted.shape != own.shape or not torch.isfinite(fitted).all():
        raise ShapeError(f"{name} has shape {list(value.shape)}, the backbone's has {list(own.shape)}")
    # Interpolated in float32, stored as it was.
    return fitted.to(value.dtype)


def _positions(value: Tensor, own: Tensor) -> Tensor:
    """An embedding a position: tokens (1, T, D), a map (1, D, H, W) or (1, H, W, D), blocks (1, B, T, D)."""
    if value.dim() == 3:
        # (1, prefix + side², D): class and register tokens stay as they are, the rest is a square.
        prefix, side = _prefix_and_side(value.shape[1], own.shape[1])
        return resample_abs_pos_embed(value, [side, side], num_prefix_tokens=prefix, antialias=False)
    # A second axis that differs is a side: (1, H, W, D).
    if value.shape[1] != own.shape[1]:
        return resample_abs_pos_embed_nhwc(value, list(own.shape[1:3]), antialias=False)
    if value.shape[3] == own.shape[3]:  # NesT keeps the number of blocks and lets them grow
        return resample_blocks(value, own)
    # (1, D, H, W)
    return interpolate(value.float(), size=own.shape[2:], mode="bicubic")


def _prefix_and_side(before: int, after: int) -> tuple[int, int]:
    """The fewest prefix tokens with which both numbers of tokens are squares, and the new square's side.

    Raises: ValueError if there is no such number.
    """
    # The fewest first: with more of them other squares may fit by chance.
    for prefix in range(min(MOST_PREFIX, before, after)):
        side = math.isqrt(after - prefix)
        if math.isqrt(before - prefix) ** 2 == before - prefix and side**2 == after - prefix:
            return prefix, side
    raise ValueError("no square grids")


def _bias_table(value: Tensor, own: Tensor) -> Tensor:
    """A bias a head and offset of two tokens of a window: (offsets, heads), or a map of offsets a head."""
    # BEiT's table ends in three offsets from and to the class token.
    # 2 · window - 1 offsets along an axis.
    across = own.shape[1] if own.dim() == 3 else math.isqrt(len(own))
    window = (across + 1) // 2
    return resize_rel_pos_bias_table_simple(value.float(), (window, window), own.shape)


def _distance_table(value: Tensor, own: Tensor) -> Tensor:
    """LeViT's bias a head and distance, (heads, side · side)."""
    before, after = (math.isqrt(table.shape[1]) for table in (value, own))
    # (heads, side²) -> (1, heads, side, side) and back.
    maps = interpolate(value.float().view(1, -1, before, before), size=(after, after), mode="bicubic")
    return maps.view(-1, after * after)


def why_not_at(settings: Backbone, crop_px: int, side_px: int) -> str:
    """Why weights trained on crops of one side cannot go on at another; empty where they can.

    Cheap: it looks at shapes alone.

    Args:
        settings: with which the model trains at crop_px.
        crop_px: the side at first.
        side_px: the side then.
    """
    if not trains(settings, side_px):
        return f"{settings.name} does not take crops of {side_px} pixels"
    try:
        with torch.device("meta"):
            # Names and shapes alone, on the meta device.
            before, after = (create_model(settings, side).state_dict() for side in (crop_px, side_px))
        for name, own in after.items():
            if before[name].shape != own.shape:
                resized(name, torch.zeros(before[name].shape), torch.zeros(own.shape))
    except (SettingsError, ShapeError) as error:
        return f"weights of {settings.name} do not go from {crop_px} to {side_px} pixels: {error}"
    return ""
