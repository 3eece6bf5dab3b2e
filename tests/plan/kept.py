"""What torch keeps for a backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch


def kept_bytes(
    forward: Callable[[], object], without: Iterable[torch.Size], autocast: torch.dtype | None
) -> int:
    """Bytes of all storages that a forward pass keeps.

    Args:
        forward: the pass.
        without: shapes that are not counted: those of weights and of what enters.
        autocast: dtype of products; None: that of the numbers.
    """
    left_out = {tuple(shape) for shape in without}
    kept: dict[int, torch.Tensor] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in left_out:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", autocast, enabled=autocast is not None),
    ):
        forward()
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
