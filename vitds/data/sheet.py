"""A batch's way to a card: its draws lie in one piece of memory, the sheet, so two copies bring all of it.

The copies run on a stream of their own, into two pieces of the card's memory in turn: one is filled while the
card still computes with the other.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import accumulate

import torch
from jaxtyping import UInt8
from torch import Tensor

from vitds.batch import CropBatch, Draws, each_tensor

ALIGNMENT = 16  # bytes, at which each tensor of a sheet begins

_log = logging.getLogger(__name__)


class HostMemory:
    """Gives memory for what is copied to a card or from it.

    Args:
        is_pinned: for copies that the host need not wait for. torch keeps what was pinned once, and gives it
            again when copies of it are done.
    """

    def __init__(self, is_pinned: bool) -> None:
        self.is_pinned = is_pinned

    def __call__(self, size: int) -> UInt8[Tensor, "bytes"]:
        """So many bytes; not pinned where that fails, which is said once."""
        if self.is_pinned:
            try:
                return torch.empty(size, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                self.is_pinned = False
                _log.warning(
                    "memory for a batch's draws, or a step's numbers, could not be pinned, so the host waits "
                    "for their copies; `ulimit -l` may be low, or the host's memory full: %s",
                    error,
                )
        return torch.empty(size, dtype=torch.uint8)


def on_sheet(
    draws: Draws, memory: Callable[[int], UInt8[Tensor, "bytes"]]
) -> tuple[Draws, UInt8[Tensor, "bytes"]]:
    """The same draws in one piece of memory, and that."""
    tensors: list[Tensor] = []
    # Noted in the order in which they are copied below.
    each_tensor(draws, lambda tensor: tensors.append(tensor) or tensor)
    starts = list(accumulate((-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in tensors), initial=0))
    sheet, place = memory(starts.pop()), iter(starts)
    return each_tensor(draws, lambda tensor: _part(sheet, next(place), tensor).copy_(tensor)), sheet


def from_copy(draws: Draws, copy: UInt8[Tensor, "bytes"]) -> Draws:
    """The draws of a sheet as they lie in a copy of it, on whatever device."""
    return each_tensor(draws, lambda tensor: _part(copy, tensor.storage_offset() * tensor.itemsize, tensor))


def _part(sheet: UInt8[Tensor, "bytes"], start: int, like: Tensor) -> Tensor:
    return sheet[start : start + like.nbytes].view(like.dtype).view(like.shape)


def copied_ahead(
    batches: Iterator[CropBatch], device: torch.device, stream: torch.cuda.Stream
) -> Iterator[CropBatch]:
    """The batches, their crops and draws on a card.

    The host only asks for the copies, and what it asks of the current stream from then on waits for them. A
    batch is valid until the next one is asked for.

    Args:
        batches: on the host, with draws on a sheet, all of the same shapes.
        device: the card.
        stream: that copies.
    """
    # Of each piece of memory: crops and sheet, and when the current stream has done with them.
    memory: list[tuple[Tensor, Tensor]] = []
    done: list[torch.cuda.Event] = []
    for number, batch in enumerate(batches):
        hosts, place = (batch.crops, batch.sheet), number % 2
        if number < 2:
            memory.append(tuple(torch.empty_like(host, device=device) for host in hosts))
            done.append(torch.cuda.Event())
            # The memory may have been another tensor's, which the current stream still works with.
            done[place].record()
        stream.wait_event(done[place])
        with torch.cuda.stream(stream):
            for there, host in zip(memory[place], hosts, strict=True):
                there.copy_(host, non_blocking=True)
        torch.cuda.current_stream(device).wait_stream(stream)
        crops, sheet = memory[place]
        yield replace(batch, crops=crops, draws=from_copy(batch.draws, sheet), sheet=sheet)
        # By now all that reads it was asked of the current stream.
        done[place].record()
