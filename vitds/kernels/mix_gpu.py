"""What mix.c is on a CPU, on a GPU: one Triton kernel from uint8 crops to the network's input.

Every pixel is read once, a partner's only where it is needed, and written once. Products and sums are
rounded one by one, but for mixup's one fused multiply-add: the same bits as on a CPU.

Triton compiles it at the first launch. With TRITON_INTERPRET=1 it runs on tensors of the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from vitds.batch import Mixing

# Pixels that a program holds at once.
PIXELS = 1024


def write_images(
    crops: Tensor,
    images: Tensor,
    scale: tuple[float, ...],
    shift: tuple[float, ...],
    mixing: Mixing | None,
    *,
    chunk_images: int,
) -> None:
    """See vitds/kernels/mix.py; images may be float16 too."""
    side = crops.shape[-1]
    kind = "none" if mixing is None else mixing.kind
    # Without mixing nothing is read of them.
    draws = (images,) * 3 if mixing is None else (mixing.partner, mixing.box, mixing.lam)
    # A crop on the first axis: the others end at 65,535.
    grid = (len(images), 3, triton.cdiv(side * side, PIXELS))
    _write_images[grid](
        crops,
        images,
        *draws,
        *(*crops.stride()[:2], len(images), crops.shape[1], chunk_images),
        *(*scale, *shift),
        *(kind, side, PIXELS),
        # Else Triton makes one rounding of level * scale + shift.
        enable_fp_fusion=False,
    )


@triton.jit
def _start(crops, row, image_stride, view_stride, views, chunk_images):
    image = row % chunk_images + row // (chunk_images * views) * chunk_images
    view = row // chunk_images % views
    return crops + image.to(tl.int64) * image_stride + view.to(tl.int64) * view_stride


@triton.jit
def _write_images(
    crops,
    images,
    partner,
    box,
    lam,
    image_stride,
    view_stride,
    rows,
    views,
    chunk_images,
    scale_red,
    scale_green,
    scale_blue,
    shift_red,
    shift_green,
    shift_blue,
    KIND: tl.constexpr,
    SIDE: tl.constexpr,
    NUMBERS: tl.constexpr,
):
    row, channel = tl.program_id(0), tl.program_id(1)
    scale = tl.where(channel == 0, scale_red, tl.where(channel == 1, scale_green, scale_blue))
    shift = tl.where(channel == 0, shift_red, tl.where(channel == 1, shift_green, shift_blue))
    place = tl.program_id(2) * NUMBERS + tl.arange(0, NUMBERS)
    is_here = place < SIDE * SIDE
    in_crop = channel * SIDE * SIDE + place
    own = _start(crops, row, image_stride, view_stride, views, chunk_images) + in_crop
    level = tl.load(own, mask=is_here, other=0)
    if KIND != "none":
        other_row = tl.load(partner + row)
        other = _start(crops, other_row, image_stride, view_stride, views, chunk_images) + in_crop
    if KIND == "cutmix":
        y, x = place // SIDE, place % SIDE
        in_y = (y >= tl.load(box + row)) & (y < tl.load(box + rows + row))
        in_x = (x >= tl.load(box + 2 * rows + row)) & (x < tl.load(box + 3 * rows + row))
        level = tl.where(in_y & in_x, tl.load(other, mask=is_here & in_y & in_x, other=0), level)
    number = level.to(tl.float32) * scale + shift
    if KIND == "mixup":
        theirs = tl.load(other, mask=is_here, other=0).to(tl.float32) * scale + shift
        number = tl.fma(tl.load(lam + row) - 1, number - theirs, number)
    out = images + row.to(tl.int64) * (3 * SIDE * SIDE) + in_crop
    tl.store(out, number.to(images.dtype.element_ty), mask=is_here)
