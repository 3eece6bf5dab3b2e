"""What all ranks learn at the end of a step: one all-reduce, and one question to the device.

The numbers stay on the device until they are asked for, all at once: each question lets the host wait until a
card has done all it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from vitds import dist
from vitds.data.sheet import HostMemory


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

    @classmethod
    def of(cls, numbers: Sequence[float], terms: int) -> Agreed:
        """What the numbers of `agree` mean; of them `terms` are terms."""
        unsound, due, stop, *others = numbers
        return cls(others[:terms], others[terms:], unsound == 0, due > 0, stop > 0)


def agree(
    sums_T: Float[Tensor, "T"], norms_k: Float[Tensor, "k"], *, is_due: bool, wants_stop: bool
) -> Float[Tensor, "n"]:
    """Called by every rank together, with what it knows itself.

    Args:
        sums_T: this rank's part of each term, float64, on the device.
        norms_k: gradient norms, float64, on the device.
        is_due: of rank 0 alone, for clocks differ.
        wants_stop: whether this rank was asked to.
    Returns: the numbers of `Agreed`, on the device; the first is 1 where the step is not sound, else 0.
    """
    is_unsound = (~norms_k.isfinite().all()).double()[None]
    # Filled on the device and not copied there: a copy of so little would let the host wait.
    flags = [sums_T.new_full((1,), float(flag)) for flag in (is_due, wants_stop)]
    # Of the sums of flags any above 0 counts.
    shared = dist.all_reduce_sum(torch.cat([is_unsound, *flags, sums_T]))
    # The sums show what is not finite in a loss, the norms what is not in a gradient.
    is_unsound = (shared[:1] > 0) | ~shared[3:].isfinite().all()
    return torch.cat([is_unsound.double(), shared[1:], norms_k])


class Reading:
    """Numbers of the device on their way to the host, which need not wait for them at once.

    Args:
        numbers: on the device.
        memory: of the host.
    """

    def __init__(self, numbers: Float[Tensor, "n"], memory: HostMemory) -> None:
        self.numbers_n = memory(numbers.nbytes).view(numbers.dtype).copy_(numbers, non_blocking=True)
        self.arrived = torch.cuda.Event() if numbers.is_cuda else None
        if self.arrived is not None:
            self.arrived.record()

    def numbers(self) -> list[float]:
        """Waits for them."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.numbers_n.tolist()
