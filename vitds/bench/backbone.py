"""`vitds bench backbone`: a backbone's forward and backward as timm makes it, and with what a run adds."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitds import dist
from vitds.bench.report import print_rows
from vitds.config.load import load_settings
from vitds.engine.process import (
    LARGEST_IN_OLD_HEAP,
    M_MMAP_THRESHOLD,
    M_TRIM_THRESHOLD,
    keep_freed_memory,
    start_ranks,
)
from vitds.engine.resolve import resolve_precision
from vitds.models.build import build_backbone
from vitds.models.create import create_model

RECIPE = "finetune_photos_cpu"


def bench_backbone(
    *,
    recipe: str | None = None,
    set: Sequence[str] = (),  # noqa: A002 (the command's word)
    images: int = 64,
    rounds: int = 5,
    as_json: bool = False,
) -> list[dict[str, float | str]]:
    """Milliseconds of forward and backward on synthetic crops, in turn.

    Args:
        recipe: whose backbone and side of crops are taken.
        set: settings, `key=value`.
        images: in a batch, one crop each.
        rounds: of one pass each way.
        as_json: print one JSON object.
    Returns: rows, each with what those above have, and one thing more; ratio is to the first. bf16 only where
        the device multiplies it natively.
    Raises: SettingsError for a recipe or settings that are wrong.
    """
    settings = load_settings(recipe=recipe or RECIPE, command=None, assignments=set, flags={})
    device, side = start_ranks(), settings.views.crop_px
    ours = build_backbone(settings.backbone, crop_px=side, seed=0).to(device)
    of_timm = create_model(settings.backbone, side).to(device)
    ways = {"as timm makes it": (of_timm, False, False)}
    if device.type == "cpu":
        ways["freed memory kept"] = (of_timm, True, False)
    ways["channels last"] = (ours, True, False)
    if resolve_precision("auto", device) == "bf16":
        ways["bf16"] = (ours, True, True)
    crops = torch.randn(images, 3, side, side, device=device)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, (backbone, keeps, is_bf16) in ways.items():
            if keeps:
                keep_freed_memory()
            else:
                give_freed_memory_back()
            times[name].append(seconds_of_a_pass(backbone, crops, is_bf16))
    medians = {name: 1000 * statistics.median(seconds[1:]) for name, seconds in times.items()}
    floor = medians["as timm makes it"]
    found = [
        {"name": name, "ms": round(ms, 2), "ratio": round(ms / floor, 3)} for name, ms in medians.items()
    ]
    if dist.is_main():
        title = f"{settings.backbone.name}, {images} crops of {side} px: forward and backward"
        print_rows(title, found, as_json=as_json)
    return found


def give_freed_memory_back() -> None:
    """What glibc's own rule grows to in a process that has freed large blocks."""
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_OLD_HEAP)
    libc.mallopt(M_TRIM_THRESHOLD, 2 * LARGEST_IN_OLD_HEAP)


def seconds_of_a_pass(backbone: nn.Module, crops: Tensor, is_bf16: bool) -> float:
    """Of forward and backward, the gradients dropped after."""
    started = time.perf_counter()
    with torch.autocast(crops.device.type, torch.bfloat16, enabled=is_bf16):
        features = backbone(crops)
    features.float().square().mean().backward()
    for parameter in backbone.parameters():
        parameter.grad = None
    if crops.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
