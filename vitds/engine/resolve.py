"""Every `auto` becomes a value, once, at a run's first start; the reason for each stands here.

A resume uses the saved value, or says why this machine cannot.
"""

from __future__ import annotations

import os
import time

import torch
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.data.order import accumulation_steps, steps_per_epoch
from vitds.engine.attention import resolve_attention
from vitds.engine.memory import largest_micro_on_gpu
from vitds.engine.process import own_cores
from vitds.engine.stages import attention_shape
from vitds.errors import ResourceError
from vitds.launcher import read_place
from vitds.methods import method_class
from vitds.models.build import patch_count

# Of a micro batch: its activations stay within a few GB, and more is not faster on a CPU.
CPU_PIXELS = 4 << 20
# Compiling costs a minute or two and gains 13 % and more: it pays above some twenty minutes.
COMPILE_PAYS_S = 1200.0
# One thread of the loader cuts 2,200 images of six crops a second (docs/benchmarks.md). No card is expected
# to train on more than eight of them cut, and each holds one more micro batch of pinned memory.
MOST_WORKERS = 8
OTHER_THREADS = 2  # of a rank on a card: the one that launches its work, and autograd's
MUCH_PADDING = 0.25  # of an epoch: so much of the work teaches nothing
# Operations a second, rough and for that decision only. A card's products of small matrices wait for its
# memory: what it reaches grows with the backbone's width, until it is full.
CPU_FLOPS, CARD_FLOPS_A_WIDTH, MOST_CARD_FLOPS = 1e11, 5e10, 2e14


def resolve_precision(wanted: str, device: torch.device, has_teacher: bool = False) -> str:
    """fp32, bf16 or fp16 for `auto`; a saved or given value is checked against the device.

    On a GPU `auto` is bf16 where the hardware has it, else fp16. On a CPU it is bf16 only where the processor
    multiplies bf16 natively (a timed product decides: emulated bf16 is 25 times slower than fp32), else fp32.

    Args:
        wanted: `auto` or a precision.
        device: that trains.
        has_teacher: of the method; `auto` is never fp16 then, whose weights would round the teacher's small
            steps away.
    Raises: ResourceError if the device cannot do what was asked for.
    """
    # Rank 0 decides: ranks must not train in different precisions because one was busy or has another card.
    native = dist.broadcast_object(
        torch.cuda.is_bf16_supported(including_emulation=False)
        if device.type == "cuda"
        else _cpu_bf16_is_fast()
    )
    if wanted == "auto":
        if native:
            return "bf16"
        return "fp16" if device.type == "cuda" and not has_teacher else "fp32"
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
    return seconds[torch.bfloat16] < 1.1 * seconds[torch.float32]


def resolve_settings(
    settings: Settings, backbone: nn.Module, *, ds: DsConfig, device: torch.device, rows: int, images: int
) -> Settings:
    """Fill precision, micro batch, head, compile, attention and the loader's threads.

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
    workers = resolve_workers(settings.data.workers, device, own_cores(read_place(os.environ)))
    settings = settings.model_copy(update={"data": settings.data.model_copy(update={"workers": workers})})
    # In this order: how many images fit depends on the precision. What the JSON switches on counts for auto.
    method = method_class(settings.method)
    precision = resolve_precision(
        ds.precision or wanted if wanted == "auto" else wanted, device, has_teacher=method.has_teacher
    )
    compiled = resolve_compile(settings, backbone, device, images, ds.zero_stage)
    engine = settings.engine.model_copy(update={"precision": precision, "compile": compiled})
    # A head's kind is the method's own business.
    resolved = method.resolve(settings.model_copy(update={"engine": engine}), rows, backbone.facts.width)
    # The micro batch last: it gets what all else leaves of the memory.
    micro = resolve_micro_images(resolved, backbone, ds, device, rows)
    attention = resolve_attention(
        engine.attention,
        attention_shape(backbone, resolved),
        crops=micro * settings.views.count,
        precision=precision,
        is_deterministic=engine.deterministic,
        device=device,
    )
    return resolved.model_copy(
        update={
            "batch": settings.batch.model_copy(update={"micro_images": micro}),
            "engine": engine.model_copy(update={"attention": attention}),
        }
    )


def resolve_workers(wanted: int | str, device: torch.device, cores: int) -> int:
    """The loader's threads.

    On a card the rank's cores less OTHER_THREADS, at least 1, at most MOST_WORKERS. On a CPU 1: one cuts more
    than a CPU trains on, and the network needs the cores.

    Args:
        wanted: `auto` or a number.
        cores: of this rank alone.
    """
    if wanted != "auto":
        return wanted
    return 1 if device.type == "cpu" else min(max(1, cores - OTHER_THREADS), MOST_WORKERS)


def resolve_micro_images(
    settings: Settings, backbone: nn.Module, ds: DsConfig, device: torch.device, rows: int
) -> int:
    """The images of one micro batch: the most that fit a GPU (by trying), or a CPU's pixel limit.

    Args:
        settings: resolved but for this.
        rows: of the classifier.
    """
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
        return largest_micro_on_gpu(backbone, settings, ds, rows=rows, fits=fits, device=device)
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
    seconds = training_seconds(
        numbers=sum(parameter.numel() for parameter in backbone.parameters()),
        width=backbone.facts.width,
        tokens=max(1, patch_count(backbone)) * (1 - settings.backbone.patch_drop),
        crops=images * settings.views.count * settings.epochs / dist.world_size(),
        on_gpu=device.type == "cuda",
    )
    return "on" if seconds > COMPILE_PAYS_S and zero_stage != 3 else "off"


def training_seconds(*, numbers: int, width: int, tokens: float, crops: float, on_gpu: bool) -> float:
    """A guess of what a training takes on one device: enough to tell minutes from hours.

    Args:
        numbers: of the backbone's weights.
        width: D.
        tokens: of a crop.
        crops: that one rank sees in the whole run.
        on_gpu: of no known kind.
    """
    # Two operations for each weight and token forward, four backward.
    flops = 6 * numbers * tokens * crops
    return flops / (min(CARD_FLOPS_A_WIDTH * width, MOST_CARD_FLOPS) if on_gpu else CPU_FLOPS)


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
