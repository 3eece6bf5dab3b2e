"""How many images a GPU holds at once, found by trying; and the message when memory runs out: the plan's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from vitds import dist
from vitds.config.deepspeed import DsConfig
from vitds.config.tree import Settings
from vitds.engine.stages import stages_of
from vitds.errors import ResourceError
from vitds.methods import method_class
from vitds.methods.base import SetSize
from vitds.models.build import build_backbone, checkpoint_activations, patch_count
from vitds.models.stochastic import StochasticDraws
from vitds.plan.case import ModuleSizes, make_case
from vitds.plan.totals import GB, MemoryPlan, plan_memory

# Of the card; the rest is for the CUDA context, the libraries' workspaces and fragmentation.
MEMORY_SHARE = 0.9
# The plan's parts that the trial of a micro batch holds itself.
IN_TRIAL = frozenset(
    {
        "backbone: weights",
        "backbone: frozen weights",
        "backbone: gradients",
        "bf16 copies of weights",
        "crops, float32",
        "crops, float32 and cast",
        "activations",
        "activations, checkpointed",
        "gradients of activations",
    }
)


def largest_micro_on_gpu(
    backbone: nn.Module, settings: Settings, ds: DsConfig, *, rows: int, fits: list[int], device: torch.device
) -> int:
    """The most images of a micro batch with which every rank stays within MEMORY_SHARE of its card.

    What the backbone takes is tried. Head, optimizer and buckets do not depend on it, and are the plan's.

    Args:
        backbone: on the host, and there again afterwards.
        settings: of the run, resolved but for batch.micro_images.
        ds: the user's DeepSpeed JSON.
        rows: of the classifier.
        fits: images of a micro batch that divide the step, the most first.
        device: the card.
    Raises: ResourceError if none does (with the plan).
    """
    sizes = module_sizes(backbone, settings)
    plans = {}
    for images in fits:
        batch = settings.batch.model_copy(update={"micro_images": images})
        tried = settings.model_copy(update={"batch": batch})
        ranks = dist.world_size()
        plans[images] = plan_memory(make_case(tried, ds, sizes, rows=rows, ranks=ranks, on_gpu=True))
    limit = torch.cuda.get_device_properties(device).total_memory * MEMORY_SHARE
    # A trial moves a BatchNorm's statistics as training does.
    buffers = {name: buffer.clone() for name, buffer in backbone.named_buffers()}
    backbone.to(device).train()
    if settings.engine.activation_checkpointing:
        checkpoint_activations(backbone, settings.backbone.name)
    # The largest first, so the first that fits is the answer; 0 if none does.
    found = next(
        (
            images
            for images in fits
            if run_bytes(_peak_bytes(backbone, settings, images, device), plans[images]) <= limit
        ),
        0,
    )
    # As it came: DeepSpeed moves it to the card itself, with everything else.
    backbone.to("cpu")
    for name, buffer in backbone.named_buffers():
        buffer.copy_(buffers[name])
    torch.cuda.empty_cache()
    # The least of all ranks, as the maximum of negatives: they need one value, and cards may differ.
    smallest = int(-dist.all_reduce_max(torch.tensor(-float(found), device=device)).item())
    if not smallest:
        plan = plans[fits[-1]]
        raise ResourceError(
            f"not even {fits[-1]} images of {settings.views.count} views fit {device}, of which "
            f"{limit / GB:.1f} GB may be taken. By the plan this run takes {plan.line()}; {plan.remedy()}"
        )
    return smallest


def run_bytes(trial_bytes: float, plan: MemoryPlan) -> float:
    """The most that a run takes at any moment.

    Args:
        trial_bytes: what forward and backward pass of the backbone took.
        plan: of the run with this micro batch.
    """
    beside = sum(
        part.bytes for part in plan.parts if "backward" in part.moments and part.name not in IN_TRIAL
    )
    others = max(held for moment, held in plan.moments.items() if moment != "backward")
    return float(max(trial_bytes + beside, others))


def _peak_bytes(backbone: nn.Module, settings: Settings, images: int, device: torch.device) -> float:
    rows = images * settings.views.count
    # All crops as one chunk, for memory does not depend on what is drawn.
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=rows, patches=patch_count(backbone))
    draws.fill(0, 0, 1)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(settings.engine.precision)
    torch.cuda.reset_peak_memory_stats(device)
    try:
        with torch.autocast("cuda", dtype, enabled=dtype is not None):
            # Zeros do: memory depends on shapes alone.
            features = backbone(
                torch.zeros(rows, 3, settings.views.crop_px, settings.views.crop_px, device=device)
            )
        if features.requires_grad:  # of a frozen backbone they do not
            # Any loss serves that reaches every feature.
            features.float().sum().backward()
        return torch.cuda.max_memory_allocated(device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        backbone.zero_grad(set_to_none=True)
        torch.cuda.empty_cache()


def module_sizes(backbone: nn.Module, settings: Settings) -> ModuleSizes:
    """What the plan needs of the module that the engine will own, without a classifier.

    Args:
        backbone: before DeepSpeed takes its weights apart; on any device, also torch's meta.
        settings: of the run.
    """
    parameters = {f"backbone.{name}": parameter for name, parameter in backbone.named_parameters()}
    method = method_class(settings.method)
    if not method.rows(SetSize(images=1, classes=1)):
        # No classifier of so many rows, but something whose size only the method knows, such as a projector.
        # It is asked on the meta device, where a teacher's copy of the backbone takes no memory.
        with torch.device("meta"):
            twin = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
            parameters = dict(method(settings, twin, 0).module.named_parameters())
    trained: dict[str, tuple[int, ...]] = {}
    frozen: dict[str, int] = {}
    for name, parameter in parameters.items():
        # The first word of a name is the part: backbone, projector, teacher.
        part = name.partition(".")[0]
        if parameter.requires_grad:
            trained[part] = (*trained.get(part, ()), parameter.numel())
        else:
            frozen[part] = frozen.get(part, 0) + parameter.numel()
    return ModuleSizes(trained, backbone.facts.width, stages_of(backbone, settings), frozen)


@contextmanager
def explains_out_of_memory(
    sizes: ModuleSizes, settings: Settings, ds: DsConfig, rows: int, device: torch.device
) -> Iterator[None]:
    """Turn whatever says that memory ran out into one message with the plan of this run.

    Args:
        sizes: of what the engine will own, without a classifier.
        settings: resolved; no `auto` is left.
        ds: the user's DeepSpeed JSON.
        rows: of the classifier: N, C, or 0 where there is none.
        device: that trains.
    Raises: ResourceError in place of torch's, NumPy's and Python's errors.
    """
    case = make_case(settings, ds, sizes, rows=rows, ranks=dist.world_size(), on_gpu=device.type == "cuda")
    plan = plan_memory(case)
    # Made now: when memory has run out there may be none for it.
    message = (
        f"out of memory on {device}. By the plan this run takes {plan.line()}, beside the libraries; "
        f"{plan.remedy()}. The same command with a smaller batch.micro_images (now "
        f"{settings.batch.micro_images}), more ranks, or another --ds_config goes on from the last "
        "checkpoint, other settings need a new run. `vitds plan` has all parts"
    )
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise ResourceError(message) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it is CUDA's or Python's class, torch's RuntimeError on a CPU, or came from one of these."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "you tried to allocate" in str(error):
        return True
    return error.__cause__ is not None and is_out_of_memory(error.__cause__)
