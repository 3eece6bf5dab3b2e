"""What softmax.c is on a CPU, on a GPU: two Triton kernels for the logits of a tile.

A tile's logits are read once in the forward pass and rewritten once in the backward pass. They are float32
or bfloat16. Everything in between is float32, whose exponents bfloat16 has too: a gradient of 10^-9 is as
exact there as one of 1. What is added up is added by one program in one order, so the same logits give the
same bits.

Triton compiles them at the first launch. With TRITON_INTERPRET=1 they run on tensors of the CPU.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Logits that a program holds at once.
FIND_NUMBERS = 4096
WEIGH_NUMBERS = 2048


def find_parts(logit_Mt: Tensor, highest_M: Tensor, exponentials_M: Tensor, total_M: Tensor) -> None:
    """Take the logits of a tile into what was found in the tiles before it, in one read.

    A NaN or +inf among the logits of a crop makes its exponentials NaN; -inf takes no part in them.

    Args:
        logit_Mt: contiguous.
        highest_M: each crop's highest logit so far, float32 as the other two; -inf before the first tile.
        exponentials_M: the sum of exp(logit - highest); 0 before the first tile.
        total_M: the sum of the logits; 0 before the first tile.
    """
    crops, columns = logit_Mt.shape
    _find_parts[(crops,)](logit_Mt, highest_M, exponentials_M, total_M, columns, FIND_NUMBERS, num_warps=8)


def weigh(logit_Mt: Tensor, highest_M: Tensor, above_M: Tensor, factor_M: Tensor, constant_M: Tensor) -> None:
    """Each logit s becomes exp(s - highest - above) · factor + constant, in place.

    Args:
        logit_Mt: contiguous.
        highest_M: float32, one a crop; so are the other three. With the parts over all rows the exponential
            is the logit's share of the softmax over all rows, whatever tile it is in.
    """
    crops, columns = logit_Mt.shape
    # A crop on the first axis: the others end at 65,535.
    grid = (crops, triton.cdiv(columns, WEIGH_NUMBERS))
    _weigh[grid](logit_Mt, highest_M, above_M, factor_M, constant_M, columns, WEIGH_NUMBERS)


@triton.jit
def _find_parts(logits, highest, exponentials, total, columns, NUMBERS: tl.constexpr):
    crop = tl.program_id(0)
    start = logits + crop.to(tl.int64) * columns
    most = tl.load(highest + crop)
    sum_of_exponentials = tl.load(exponentials + crop)
    sum_of_logits = tl.load(total + crop)
    for first in range(0, columns, NUMBERS):
        place = first + tl.arange(0, NUMBERS)
        is_here = place < columns
        s = tl.load(start + place, mask=is_here, other=-float("inf")).to(tl.float32)
        sum_of_logits += tl.sum(tl.where(is_here, s, 0.0), 0)
        before = most
        most = tl.maximum(before, tl.max(s, 0))
        # Where all so far are -inf: -inf - -inf would be NaN, and stay.
        base = tl.where(most == -float("inf"), 0.0, most)
        sum_of_exponentials = sum_of_exponentials * tl.exp(before - base) + tl.sum(tl.exp(s - base), 0)
    tl.store(highest + crop, most)
    tl.store(exponentials + crop, sum_of_exponentials)
    tl.store(total + crop, sum_of_logits)


@triton.jit
def _weigh(logits, highest, above, factor, constant, columns, NUMBERS: tl.constexpr):
    crop = tl.program_id(0)
    place = tl.program_id(1) * NUMBERS + tl.arange(0, NUMBERS)
    is_here = place < columns
    here = logits + crop.to(tl.int64) * columns + place
    s = tl.load(here, mask=is_here, other=0.0).to(tl.float32)
    # One after the other: highest + above would lose what is small beside a large logit.
    share = tl.exp(s - tl.load(highest + crop) - tl.load(above + crop))
    weighed = share * tl.load(factor + crop) + tl.load(constant + crop)
    tl.store(here, weighed.to(logits.dtype.element_ty), mask=is_here)
