"""What all ranks learn at the end of a step, before any of them takes it: one all-reduce, one question.

The numbers stay on the device until they are asked for, all at once: each question lets the host wait until a
card has done all it was given.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitds import dist


class Agreed(NamedTuple):
    """What all ranks know at the end of a step.

    Attributes:
        terms: each term of the loss, over all ranks and micro steps.
        norms: the gradient norms that were given; the same on every rank.
        is_sound: whether losses and gradients are finite everywhere.
        is_due: whether rank 0 wants a checkpoint by its clock.
        wants_stop: whether a rank was asked to stop.
    """

    terms: list[float]
    norms: list[float]
    is_sound: bool
    is_due: bool
    wants_stop: bool


def agree(
    sums_T: Float[Tensor, "T"], norms_k: Float[Tensor, "k"], *, is_due: bool, wants_stop: bool
) -> Agreed:
    """Called by every rank together, with what it knows itself.

    Args:
        sums_T: this rank's part of each term, float64, on the device.
        norms_k: gradient norms, float64, on the device.
        is_due: of rank 0 alone, for clocks differ.
        wants_stop: whether this rank was asked to.
    """
    is_unsound = (~norms_k.isfinite().all()).double()[None]
    # Of the sums of flags any above 0 counts.
    # Filled on the device and not copied there: a copy of so little would let the host wait.
    flags = [sums_T.new_full((1,), float(flag)) for flag in (is_due, wants_stop)]
    shared = dist.all_reduce_sum(torch.cat([sums_T, is_unsound, *flags]))
    numbers = torch.cat([shared, norms_k]).tolist()
    terms, norms = numbers[: len(sums_T)], numbers[len(shared) :]
    unsound, due, stop = numbers[len(sums_T) : len(shared)]
    # The sums show what is not finite in a loss, the norms what is not in a gradient.
    return Agreed(terms, norms, unsound == 0 and all(map(math.isfinite, terms)), due > 0, stop > 0)
