"""The Python side of mix.c: uint8 crops become the network's input on a CPU."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import torch
from torch import Tensor

from vitds.batch import Mixing
from vitds.kernels.library import load_library

_POINTER, _LONG, _CHANNELS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float * 3
# The numbers are those of mix.c.
_KINDS = ("none", "cutmix", "mixup")


class _Batch(ctypes.Structure):
    _fields_ = (
        ("crops", _POINTER),
        *((name, _LONG) for name in ("image_stride", "view_stride", "rows", "views", "chunk_images", "side")),
        *((name, _LONG) for name in ("kind", "is_bf16")),
        *((name, _POINTER) for name in ("partner", "box", "lam")),
        ("scale", _CHANNELS),
        ("shift", _CHANNELS),
        ("images", _POINTER),
    )


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled kernel. Import torch first, so that it takes torch's OpenMP and with it torch's threads.

    Raises: ResourceError if the library was not built or cannot be loaded (names the command that builds it).
    """
    arguments = [ctypes.POINTER(_Batch), ctypes.c_int32]
    return load_library(Path(__file__).parent, "_mix", {"vitds_write_images": (None, arguments)})


def write_images(
    crops: Tensor,
    images: Tensor,
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    mixing: Mixing | None,
    *,
    chunk_images: int,
) -> None:
    """Each crop, mixed with its partner's, as level · scale + shift of its channel.

    Args:
        crops: uint8 (B, V, 3, S, S), the last three axes without gaps; B is a multiple of chunk_images.
        images: where they go: (B·V, 3, S, S) in the order (chunk, view, image); contiguous, float32 or
            bfloat16.
        scale, shift: of red, green and blue.
        mixing: contiguous tensors on the crops' device; lambdas are 1/2 or more. None mixes nothing.
        chunk_images: K.
    Raises: ResourceError if the library was not built or cannot be loaded; TypeError for another type of
        images, which would be written beyond their end.
    """
    if images.dtype not in (torch.float32, torch.bfloat16):
        raise TypeError(f"images of {images.dtype}; mix.c writes float32 and bfloat16")
    kind = "none" if mixing is None else mixing.kind
    draws = (None,) * 3 if mixing is None else (mixing.partner, mixing.box, mixing.lam)
    batch = _Batch(
        crops.data_ptr(),
        *crops.stride()[:2],
        *(len(images), crops.shape[1], chunk_images, crops.shape[-1]),
        *(_KINDS.index(kind), images.dtype == torch.bfloat16),
        *(table if table is None else table.data_ptr() for table in draws),
        *(_CHANNELS(*scale), _CHANNELS(*shift)),
        images.data_ptr(),
    )
    library().vitds_write_images(batch, torch.get_num_threads())
