"""How many images a GPU holds at once, found by trying."""

from __future__ import annotations

import torch
from torch import nn

from vitds import dist
from vitds.config.tree import Settings
from vitds.errors import ResourceError
from vitds.models.build import patch_count
from vitds.models.stochastic import StochasticDraws

MEMORY_SHARE = 0.8  # of the card; the rest is for the optimizer's states, buckets and fragmentation


def largest_micro_on_gpu(backbone: nn.Module, settings: Settings, fits: list[int], device: torch.device, precision: str) -> int:
    """The first of `fits` (images, descending) whose forward and backward pass stays within MEMORY_SHARE of the card on every rank.

    Raises: ResourceError if none does.
    """
    backbone.to(device).train()
    limit = torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE
    found = next((images for images in fits if _peak_bytes(backbone, settings, images, device, precision) <= limit), 0)
    backbone.to("cpu")
    torch.cuda.empty_cache()
    smallest = int(-dist.all_reduce_max(torch.tensor(-float(found), device=device)).item())
    if not smallest:
        raise ResourceError(
            f"not even {fits[-1]} images of {settings.views.count} views fit {device}; lower mix.chunk_images, views.crop_px, "
            "or set engine.activation_checkpointing=true"
        )
    return smallest


def _peak_bytes(backbone: nn.Module, settings: Settings, images: int, device: torch.device, precision: str) -> float:
    rows = images * settings.views.count
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=rows, patches=patch_count(backbone))
    draws.fill(0, 0, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            features = backbone(torch.zeros(rows, 3, settings.views.crop_px, settings.views.crop_px, device=device))
        features.float().sum().backward()
        return torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        backbone.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()
