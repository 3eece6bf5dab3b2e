"""Rank, world size, and the collectives that training uses.

One rank, with a process group or without: each call returns its input, and nothing is sent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch.distributed as td
from torch import Tensor

from vitds.errors import VitdsError

T = TypeVar("T")


def rank() -> int:
    """This process's number, 0..R-1.

    Words of the environment make no rank: only a group that was started does.
    """
    return td.get_rank() if td.is_initialized() else 0


def world_size() -> int:
    """R, the number of processes of the group; 1 before one was started."""
    return td.get_world_size() if td.is_initialized() else 1


def spread(sizes: Sequence[int], ranks: int) -> list[int]:
    """The rank that takes each of some pieces, in order: the one that has least so far."""
    held, owners = [0] * ranks, []
    # Greedy and in order, the first of equals: the same answer on every rank, with no word between them.
    for size in sizes:
        owners.append(held.index(min(held)))
        held[owners[-1]] += size
    return owners


def is_main() -> bool:
    """True on the rank that writes files and talks to the terminal."""
    return rank() == 0


def barrier() -> None:
    """Wait until every rank is here."""
    if world_size() > 1:
        td.barrier()


def broadcast_object(value: object) -> object:
    """Rank 0's value, on every rank.

    The value must be picklable; it comes from our own process, never from a file.
    """
    if world_size() == 1:
        return value
    # torch fills the list on the other ranks.
    box = [value]
    td.broadcast_object_list(box, src=0)
    return box[0]


def gather_objects(value: object) -> list[object]:
    """Every rank's value, in rank order, on every rank."""
    if world_size() == 1:
        return [value]
    box: list[object] = [None] * td.get_world_size()
    td.all_gather_object(box, value)
    return box


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks, in place; returns its argument."""
    if world_size() > 1:
        # In place: hand over a clone where autograd still needs the value.
        td.all_reduce(value)
    return value


def all_reduce_max(value: Tensor) -> Tensor:
    """The maximum over ranks, in place; returns its argument."""
    if world_size() > 1:
        td.all_reduce(value, op=td.ReduceOp.MAX)
    return value


def all_gather_rows(rows: Tensor) -> Tensor:
    """The rows of all ranks, (R·M, ...), in rank order; every rank must bring the same shape."""
    if world_size() == 1:
        return rows
    # One flat result, rank after rank, and no list of R tensors to join.
    out = rows.new_empty((td.get_world_size() * rows.shape[0], *rows.shape[1:]))
    td.all_gather_into_tensor(out, rows.contiguous())
    return out


def on_main(work: Callable[..., T], *arguments: object) -> T:
    """Do something on rank 0 alone and give its result, or its VitdsError, to every rank.

    So the ranks go on, or end, together.
    """
    outcome: tuple[object, VitdsError | None] = (None, None)
    if is_main():
        try:
            outcome = (work(*arguments), None)
        except VitdsError as error:
            # Nobody to tell: the traceback stays whole.
            if world_size() == 1:
                raise
            # Not raised yet: the others wait in the broadcast below.
            outcome = (None, error)
    # Also the barrier: no rank is past this before rank 0 has done its work.
    result, error = broadcast_object(outcome)
    if error is not None:
        # All ranks end by it, and one of them prints it.
        error.is_reported_by_main = not is_main()
        raise error
    return result
