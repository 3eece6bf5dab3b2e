"""Which kernel torch's attention takes on a card: a setting, `auto` by a timed trial."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.backends import cuda

from vitds import dist
from vitds.engine.stages import AttentionShape
from vitds.errors import ResourceError

# What stays switched on beside the kernel that is wanted: for shapes and types that it does not take, such as
# an evaluation in float32.
FALLBACKS = {
    "flash": ("flash", "efficient", "math"),
    "efficient": ("efficient", "math"),
    "cudnn": ("cudnn", "math"),
    "math": ("math",),
}
SWITCHES = {
    "flash": (cuda.flash_sdp_enabled, cuda.enable_flash_sdp),
    "efficient": (cuda.mem_efficient_sdp_enabled, cuda.enable_mem_efficient_sdp),
    "cudnn": (cuda.cudnn_sdp_enabled, cuda.enable_cudnn_sdp),
    "math": (cuda.math_sdp_enabled, cuda.enable_math_sdp),
}
WORTH_IT = 0.95  # of the time of torch's own choice, which is kept above
TRIED = ("torch", "flash", "cudnn", "efficient")
WARM_UPS, REPEATS = 3, 10


def use_attention(kernel: str) -> None:
    """Let attention take a kernel, in the whole process; `torch` leaves the choice to torch, as it comes."""
    if kernel != "torch":
        for name, (_, switch) in SWITCHES.items():
            switch(name in FALLBACKS[kernel])


@contextmanager
def attention_as_before() -> Iterator[None]:
    """Put back at the end what torch could choose from at the beginning."""
    before = {name: is_on() for name, (is_on, _) in SWITCHES.items()}
    try:
        yield
    finally:
        for name, (_, switch) in SWITCHES.items():
            switch(before[name])


def require_attention(wanted: str, device: torch.device) -> None:
    """Raises: ResourceError if a kernel of cards is wanted on a CPU."""
    if wanted not in ("auto", "torch") and device.type == "cpu":
        raise ResourceError(
            f"engine.attention is {wanted}, which is for GPUs; use another machine, or a new run with torch"
        )


def resolve_attention(
    wanted: str,
    shape: AttentionShape | None,
    *,
    crops: int,
    precision: str,
    is_deterministic: bool,
    device: torch.device,
) -> str:
    """A kernel for `auto`: the fastest by trial on a card, torch's own choice elsewhere.

    Args:
        wanted: `auto`, `torch` or a kernel.
        shape: of the backbone's attention; None if it is no plain Vision Transformer.
        crops: M of a micro batch.
        precision: resolved.
        is_deterministic: torch's own choice then keeps to kernels that are.
        device: that trains.
    Raises: ResourceError if a kernel of cards is wanted on a CPU.
    """
    require_attention(wanted, device)
    if wanted != "auto":
        return wanted
    if device.type == "cpu" or shape is None or is_deterministic:
        return "torch"
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
    with attention_as_before():
        seconds = {kernel: _trial_s(kernel, (crops, *shape), dtype, device) for kernel in TRIED}
    torch.cuda.empty_cache()
    # Rank 0 decides: ranks must not round differently because one was busy.
    return str(dist.broadcast_object(fastest(seconds)))


def fastest(seconds: Mapping[str, float]) -> str:
    """The quickest kernel, if it is worth leaving torch's own choice for it."""
    best = min(seconds, key=seconds.__getitem__)
    return best if seconds[best] < WORTH_IT * seconds["torch"] else "torch"


def _trial_s(kernel: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> float:
    """Seconds of forward and backward passes; infinity where the kernel does not take the shape."""
    use_attention(kernel)
    inputs = [torch.randn(shape, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
    try:
        for repeat in range(WARM_UPS + REPEATS):
            if repeat == WARM_UPS:
                torch.cuda.synchronize(device)
                began = time.perf_counter()
            torch.nn.functional.scaled_dot_product_attention(*inputs).backward(inputs[0].detach())
        torch.cuda.synchronize(device)
    except RuntimeError:  # of memory too
        return float("inf")
    return time.perf_counter() - began
