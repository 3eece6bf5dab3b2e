"""How many images a GPU holds at once, found by trying; and what a person is told when memory runs out: the plan's numbers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from timm.layers import Mlp
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.errors import ResourceError
from vitds.models.build import patch_count
from vitds.models.stochastic import StochasticDraws
from vitds.plan.case import BackboneSizes, make_case
from vitds.plan.totals import plan_memory
from vitds.plan.vit import Vit

MEMORY_SHARE = 0.8  # of the card; the rest is for the optimizer's states, buckets and fragmentation


def largest_micro_on_gpu(
    backbone: nn.Module, settings: Settings, fits: list[int], device: torch.device, precision: str
) -> int:
    """The first of `fits` (images, descending) whose forward and backward pass stays within MEMORY_SHARE of the card on every rank.

    Raises: ResourceError if none does.
    """
    backbone.to(device).train()
    if settings.engine.activation_checkpointing:
        backbone.set_grad_checkpointing(True)
    limit = torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE
    found = next(
        (images for images in fits if _peak_bytes(backbone, settings, images, device, precision) <= limit), 0
    )
    backbone.to("cpu")
    torch.cuda.empty_cache()
    smallest = int(-dist.all_reduce_max(torch.tensor(-float(found), device=device)).item())
    if not smallest:
        raise ResourceError(
            f"not even {fits[-1]} images of {settings.views.count} views fit {device}; lower batch.chunk_images, views.crop_px, "
            "or set engine.activation_checkpointing=true"
        )
    return smallest


def _peak_bytes(
    backbone: nn.Module, settings: Settings, images: int, device: torch.device, precision: str
) -> float:
    rows = images * settings.views.count
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=rows, patches=patch_count(backbone))
    draws.fill(0, 0, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            features = backbone(
                torch.zeros(rows, 3, settings.views.crop_px, settings.views.crop_px, device=device)
            )
        features.float().sum().backward()
        return torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        backbone.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def backbone_sizes(
    backbone: nn.Module, settings: Settings, module: nn.Module | None = None
) -> BackboneSizes:
    """The numbers of a backbone that the plan needs; before DeepSpeed takes its weights apart.

    Args:
        backbone: on any device, also torch's meta.
        settings: of the run.
        module: what the engine owns besides a classifier, where that is more than the backbone: a projector, a teacher.
    """
    parameters = list((module or backbone).parameters())
    trained = tuple(parameter.numel() for parameter in parameters if parameter.requires_grad)
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    return BackboneSizes(trained, backbone.num_features, _vit(backbone, settings), frozen)


def _vit(backbone: nn.Module, settings: Settings) -> Vit | None:
    """The sizes of a plain Vision Transformer, whose blocks keep what vitds/plan/vit.py counts; None for any other model."""
    blocks = list(getattr(backbone, "blocks", []))
    if not isinstance(backbone, VisionTransformer) or not all(map(_is_plain, blocks)):
        return None
    patches, prefix, drop = patch_count(backbone), backbone.num_prefix_tokens, settings.backbone.patch_drop
    return Vit(
        width=backbone.embed_dim,
        depth=len(blocks),
        heads=blocks[0].attn.num_heads,
        hidden=blocks[0].mlp.fc1.out_features,
        tokens=max(1, int(patches * (1 - drop))) + prefix,
        before_drop=patches + prefix if drop else 0,
        pools_first=isinstance(backbone.norm, nn.Identity),
        scales_layers=not isinstance(blocks[0].ls1, nn.Identity),
    )


def _is_plain(block: nn.Module) -> bool:
    if (type(block), type(getattr(block, "attn", None)), type(getattr(block, "mlp", None))) != (
        Block,
        Attention,
        Mlp,
    ):
        return False
    return block.attn.fused_attn and isinstance(block.attn.q_norm, nn.Identity)


@contextmanager
def explains_out_of_memory(
    sizes: BackboneSizes, settings: Settings, ds: DsConfig, rows: int, device: torch.device
) -> Iterator[None]:
    """Turn whatever says that memory ran out into one message with the plan of this run.

    Args:
        settings: resolved; no `auto` is left. rows: N or C.
    Raises: ResourceError in place of torch's, NumPy's and Python's errors.
    """
    case = make_case(settings, ds, sizes, rows=rows, ranks=dist.world_size(), on_gpu=device.type == "cuda")
    plan = plan_memory(case)
    message = (
        f"out of memory on {device}. By the plan this run takes {plan.line()}, beside the libraries; {plan.remedy()}. The same command "
        f"with a smaller batch.micro_images (now {settings.batch.micro_images}), more ranks, or another --ds_config goes on from the last "
        "checkpoint, other settings need a new run. `vitds plan` has all parts"
    )  # made now: when memory has run out there may be none for it
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """CUDA's and Python's own classes, and torch's RuntimeError on a CPU; also as what another error came from (Inductor)."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "you tried to allocate" in str(error):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
