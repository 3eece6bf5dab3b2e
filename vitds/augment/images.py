"""uint8 crops -> the network's input, in one pass over them, on the device that trains.

A kernel gathers each crop and its partner, mixes, scales and writes: vitds/kernels/mix.c on a CPU, mix_gpu.py
on a GPU. Where Triton does not run, torch's operations make the same in several passes.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from importlib import import_module

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from vitds.batch import Mixing
from vitds.config.tree import Views
from vitds.kernels import mix

# See write_images of vitds/kernels/mix.py.
Writer = Callable[..., None]

_log = logging.getLogger(__name__)


def to_images(
    crops: UInt8[Tensor, "B V 3 S S"],
    views: Views,
    mixing: Mixing | None,
    *,
    chunk_images: int,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, "M 3 S S"]:
    """(pixel / 255 - mean) / std a channel, mixed, in the order (chunk, view, image).

    Args:
        crops: B is a multiple of chunk_images.
        views: has mean and std.
        mixing: on the crops' device; None mixes nothing.
        chunk_images: K.
        dtype: float32, bfloat16 or float16: rounded to it last.
    Raises: ResourceError if the kernels were not built.
    """
    side = crops.shape[-1]
    if crops.stride()[2:] != (side * side, side, 1):
        crops = crops.contiguous()
    on_cpu = crops.device.type == "cpu"
    writer = mix.write_images if on_cpu else gpu_writer()
    # The CPU's kernel knows no float16, which only tests compute with there.
    written = torch.float32 if on_cpu and dtype == torch.float16 else dtype
    images = crops.new_empty(crops.shape[:2].numel(), *crops.shape[2:], dtype=written)
    # Both kinds of mixing commute with the factors: cutmix is of bytes, a quarter of the traffic, mixup of
    # scaled numbers.
    writer(crops, images, *factors(views), mixing, chunk_images=chunk_images)
    return images.to(dtype)


def factors(views: Views) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """scale and shift of each channel, made in float64: a pixel is level · scale + shift."""
    scale = tuple(1 / (255 * std) for std in views.std)
    return scale, tuple(-mean / std for mean, std in zip(views.mean, views.std, strict=True))


def normalise(crops: UInt8[Tensor, "M 3 S S"], views: Views) -> Float[Tensor, "M 3 S S"]:
    """uint8 pixels -> float32, (pixel / 255 - mean) / std a channel."""
    return to_images(crops[:, None], views, None, chunk_images=1)


@functools.cache
def gpu_writer() -> Writer:
    """The Triton kernel, or torch's operations where it does not run, which the log then says."""
    try:
        kernel = import_module("vitds.kernels.mix_gpu").write_images
        crop = torch.zeros(1, 1, 3, 1, 1, dtype=torch.uint8, device="cuda")
        kernel(crop, crop[0].float(), (1.0,) * 3, (0.0,) * 3, None, chunk_images=1)
    except Exception as error:  # whatever it lacks: Triton, a C compiler, a GPU it knows
        _log.warning(
            "The GPU kernel that makes images of crops does not run here, and torch's operations, which are "
            "slower, take its place: %s: %s. It needs Triton, a C compiler and Python's headers.",
            type(error).__name__,
            error,
        )
        return write_by_torch
    return kernel


def write_by_torch(
    crops: Tensor,
    images: Tensor,
    scale: Sequence[float],
    shift: Sequence[float],
    mixing: Mixing | None,
    *,
    chunk_images: int,
) -> None:
    """The same bits in several passes; see write_images of vitds/kernels/mix.py."""
    # (B, V, 3, S, S) -> (chunk, view, image, 3, S, S) -> (M, 3, S, S)
    crops = crops.unflatten(0, (-1, chunk_images)).transpose(1, 2).reshape(images.shape)
    kind = "none" if mixing is None else mixing.kind
    if kind == "cutmix":
        crops = torch.where(_inside(mixing.box, images.shape[-1]), crops[mixing.partner], crops)
    numbers = crops.float().mul_(_of_channels(scale, crops.device)).add_(_of_channels(shift, crops.device))
    if kind == "mixup":
        # others + lam · (images - others): lam of the own image.
        numbers = torch.lerp(numbers[mixing.partner], numbers, mixing.lam.view(-1, 1, 1, 1))
    images.copy_(numbers)


def _inside(box: Int[Tensor, "4 M"], side_px: int) -> Bool[Tensor, "M 1 S S"]:
    """Which pixels of each row lie in its box."""
    # (M, 1) against (S,) gives (M, S) for each axis; their outer product (M, 1, S, S) is the box.
    top, bottom, left, right = box[:, :, None]
    place = torch.arange(side_px, device=box.device)
    in_y, in_x = (place >= top) & (place < bottom), (place >= left) & (place < right)
    return (in_y[:, :, None] & in_x[:, None, :])[:, None]


def _of_channels(values: Sequence[float], device: torch.device) -> Float[Tensor, "3 1 1"]:
    # Filled there and not copied: a copy of so little would let the host wait for the card.
    return torch.stack([torch.full((1, 1), value, device=device) for value in values])
