"""Every `auto` becomes a value, once, at a run's first start; the reason for each stands here.

A resume uses the saved value, or says why this machine cannot.
"""

from __future__ import annotations

import time

import torch
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.order import accumulation_steps, steps_per_epoch
from vitds.engine.memory import largest_micro_on_gpu
from vitds.errors import ResourceError
from vitds.methods import method_class
from vitds.models.build import patch_count

# Of a micro batch: its activations stay within a few GB, and more is not faster on a CPU.
CPU_PIXELS = 4 << 20
# Compiling costs a minute or two and gains 13 % and more: it pays above some twenty minutes.
COMPILE_PAYS_S = 1200.0
MUCH_PADDING = 0.25  # of an epoch: so much of the work teaches nothing
CPU_FLOPS, GPU_FLOPS = 1e11, 5e13  # rough, for that decision only


def resolve_precision(wanted: str, device: torch.device) -> str:
    """fp32, bf16 or fp16 for `auto`; a saved or given value is checked against the device.

    On a GPU `auto` is bf16 where the hardware has it, else fp16. On a CPU it is bf16 only where the processor
    multiplies bf16 natively (a timed product decides: emulated bf16 is 25 times slower than fp32), else fp32.
    Raises: ResourceError if the device cannot do what was asked for.
    """
    native = (
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else _cpu_bf16_is_fast()
    )
    if wanted == "auto":
        return ("bf16" if native else "fp16") if device.type == "cuda" else ("bf16" if native else "fp32")
    if wanted == "bf16" and not native:
        raise ResourceError(
            "engine.precision is bf16, which this device lacks in hardware; use another machine, or a new "
            "run with fp32"
        )
    if wanted == "fp16" and device.type == "cpu":
        raise ResourceError(
            "engine.precision is fp16, which is for GPUs; use another machine, or a new run with fp32"
        )
    return wanted


def _cpu_bf16_is_fast() -> bool:
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(768, 768, dtype=dtype)
        matrix @ matrix
        start = time.perf_counter()
        for _ in range(3):
            matrix @ matrix
        seconds[dtype] = time.perf_counter() - start
    # Rank 0 decides: ranks must not train in different precisions because one was busy.
    return bool(dist.broadcast_object(seconds[torch.bfloat16] < 1.1 * seconds[torch.float32]))


def resolve_settings(
    settings: Settings, backbone: nn.Module, *, ds: DsConfig, device: torch.device, rows: int, images: int
) -> Settings:
    """Fill precision, micro batch, head and compile.

    Args:
        settings: as given; an `auto` stands for what is chosen here.
        backbone: built whole, on the host.
        ds: the user's DeepSpeed JSON.
        device: that trains.
        rows: N or C.
        images: in the training file.
    Raises: SettingsError if chunks, ranks and micro batch do not divide (lists the values that do).
    """
    wanted = settings.engine.precision
    # In this order: how many images fit depends on the precision. What the JSON switches on counts for auto.
    precision = resolve_precision(ds.precision or wanted if wanted == "auto" else wanted, device)
    micro = resolve_micro_images(settings, backbone, device, precision)
    compiled = resolve_compile(settings, backbone, device, images, ds.zero_stage)
    resolved = settings.model_copy(
        update={
            "engine": settings.engine.model_copy(update={"precision": precision, "compile": compiled}),
            "batch": settings.batch.model_copy(update={"micro_images": micro}),
        }
    )
    # The method last: a head's kind is its own business.
    return method_class(settings.method).resolve(resolved, rows, backbone.facts.width)


def resolve_micro_images(
    settings: Settings, backbone: nn.Module, device: torch.device, precision: str
) -> int:
    """The images of one micro batch: the most that fit a GPU (by trying), or a CPU's pixel limit."""
    chunk, ranks = settings.batch.chunk_images, dist.world_size()
    accumulation_steps(
        settings.batch.global_images, chunk_images=chunk, ranks=ranks, micro_images=chunk
    )  # do the ranks divide at all
    own = settings.batch.global_images // chunk // ranks
    # Whole chunks that divide a rank's share, the most first.
    fits = [chunk * m for m in range(own, 0, -1) if own % m == 0]
    if settings.batch.micro_images != "auto":
        accumulation_steps(
            settings.batch.global_images,
            chunk_images=chunk,
            ranks=ranks,
            micro_images=settings.batch.micro_images,
        )
        return settings.batch.micro_images
    if device.type == "cuda":
        return largest_micro_on_gpu(backbone, settings, fits, device, precision)
    pixels = settings.views.count * settings.views.crop_px**2
    # One chunk where even that has more pixels: a chunk is never cut.
    return next((micro for micro in fits if micro * pixels <= CPU_PIXELS), chunk)


def resolve_compile(
    settings: Settings, backbone: nn.Module, device: torch.device, images: int, zero_stage: int
) -> str:
    """`on` where the run is long enough to earn torch.compile's minute back.

    Off under ZeRO-3, whose hooks break the graph.
    """
    if settings.engine.compile != "auto":
        return settings.engine.compile
    # Two operations for each weight and token forward, four backward: enough to tell minutes from hours.
    tokens = max(1, patch_count(backbone)) * (1 - settings.backbone.patch_drop)
    rows = images * settings.views.count * settings.epochs / dist.world_size()
    flops = 6 * sum(parameter.numel() for parameter in backbone.parameters()) * tokens * rows
    seconds = flops / (GPU_FLOPS if device.type == "cuda" else CPU_FLOPS)
    return "on" if seconds > COMPILE_PAYS_S and zero_stage != 3 else "off"


def padding_note(images: int, global_images: int, chunk_images: int) -> str | None:
    """A line for the person if much of an epoch is padding, with the batch that fits the set.

    Args:
        images: N, of the training file.
        global_images: G, of a step.
        chunk_images: K, of a chunk.
    """
    steps = steps_per_epoch(images, global_images)
    share = 1 - images / (steps * global_images)
    if share < MUCH_PADDING:
        return None
    # As many steps as now, each filled by real images.
    per_step = -(-images // steps)
    chunks, ranks = global_images // chunk_images, dist.world_size()
    counts = [count for count in range(chunks, 0, -1) if chunks % count == 0 and count % ranks == 0]
    # As many chunks as keep their size; with fewer images than ranks x chunk, smaller ones.
    count = next((count for count in counts if per_step // count >= chunk_images), counts[-1])
    chunk = -(-per_step // count)
    return (
        f"{share:.0%} of each epoch is padding: {images:,} images in steps of {global_images}. What fits is "
        f"--set batch.global_images={count * chunk} --set batch.chunk_images={chunk}"
    )
