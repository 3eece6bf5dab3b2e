"""A sharded head in a step: the optimizer of its rows, their clipping, their part of a checkpoint.

DeepSpeed never sees it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from vitds import dist
from vitds.config.tree import Settings
from vitds.engine.state import MOMENTS
from vitds.heads.lazy import LazyRows
from vitds.heads.optimizer import build_row_optimizer
from vitds.heads.sharded import ShardedHead, row_range
from vitds.heads.tiles import tile_numbers
from vitds.runs.checkpoint import CheckpointReader
from vitds.schedule import LearningRate


class HeadShard:
    """This rank's rows of a head that lies beside the engine, stepping together with it.

    Args:
        head: moved to `device`.
        settings: of the run: optimizer, clipping, seed.
        device: that trains.
        rate: the engine's; rows that are updated lazily need that of every step.
    """

    def __init__(
        self,
        head: ShardedHead,
        settings: Settings,
        device: torch.device,
        rate: LearningRate,
    ) -> None:
        self.head = head.to(device)
        key = {"seed": settings.seed, "first_row": head.first}
        self.optimizer = build_row_optimizer(head, settings.head.optimizer, settings.optimizer, **key)
        # Read by set_groups, as in the engine's groups.
        for group in self.optimizer.param_groups:
            group["lr_scale"] = settings.head.lr_scale
        self.lazy: LazyRows | None = None
        if settings.head.lazy:
            # Of the whole run at once: a row makes up for missed steps at the rates that those had.
            rates = np.array([rate.at(step) for step in range(rate.total)]) * settings.head.lr_scale
            self.lazy = LazyRows(head, self.optimizer, rates, **key)
        # The head takes copies of rows from it in its forward pass.
        head.lazy = self.lazy
        self.clip_norm = settings.optimizer.clip_norm
        # For the manifest: a resume on other ranks finds rows by it.
        self.ranges = [row_range(head.rows, rank, dist.world_size()) for rank in range(dist.world_size())]

    def gradient_norm(self) -> Float[Tensor, ""]:
        """The joint norm of all ranks' rows, loss scale included, float64, on the device.

        Called once after the backward passes.
        """
        if self.lazy:
            self.rows_k, self.gradients = self.lazy.gradients()
        else:
            self.gradients = [parameter.grad for parameter in self.head.parameters()]
        # Each row is on one rank, so squares add up over ranks and nothing counts twice.
        own = total_norm(self.gradients)
        return dist.all_reduce_sum(own.double() ** 2).sqrt()

    def update(self, may_step: bool, *, norm: float, step: int, loss_scale: float) -> None:
        """Step, with the engine, or drop the gradients.

        Args:
            norm: what `gradient_norm` found.
            step: number of the optimizer step, from 0.
            loss_scale: that the gradients carry.
        """
        if may_step:
            # As torch's clip_grad_norm_, on the norm without the loss scale.
            factor = min(1.0, self.clip_norm / (norm / loss_scale + 1e-6)) if self.clip_norm else 1.0
            # One pass both takes out the loss scale and clips.
            if factor / loss_scale != 1.0:
                for gradient in self.gradients:
                    gradient.mul_(factor / loss_scale)
            if self.lazy:
                self.lazy.step(self.rows_k, self.gradients, step)
            else:
                self.optimizer.step()
        # After a skipped step too: row_terms adds to a gradient that is still set.
        self.optimizer.zero_grad(set_to_none=True)

    def settle(self, done: int) -> None:
        """Bring every row to where it is after `done` steps, before it is looked at."""
        if self.lazy:
            self.lazy.settle(done)

    def snapshot(self) -> dict[str, Tensor]:
        """This rank's rows: weight, bias, their moments; the steps each row has had where rows are lazy."""
        # The tensors themselves, not copies: restore writes into them.
        tensors = {}
        for name, parameter in self.head.named_parameters():
            tensors[name] = parameter
            tensors |= {f"{name}.{moment}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        return tensors | ({"seen": self.lazy.seen_n} if self.lazy else {})

    @torch.no_grad()
    def restore(self, saved: CheckpointReader, updates: int) -> None:
        """Set this rank's rows from a checkpoint that any number of ranks wrote, a block at a time.

        Raises: RunError if it does not hold all rows.
        """
        first, last = self.head.first, self.head.last
        # Blocks, so that a resume never holds the rows a second time.
        block = max(1, tile_numbers(self.head.weight.device) // self.head.weight.shape[1])
        for name, tensor in self.snapshot().items():
            for start in range(first, last, block):
                stop = min(start + block, last)
                tensor[start - first : stop - first] = saved.rows(name, start, stop)
        for state in self.optimizer.state.values():
            # As in the engine: steps that changed the weights.
            state["step"].fill_(updates)


def total_norm(gradients: Sequence[Tensor]) -> Tensor:
    """The norm of all gradients, in float32 or wider: bfloat16's eight bits are too few to clip by."""
    norms = [
        torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        for gradient in gradients
    ]
    return torch.linalg.vector_norm(torch.stack(norms))
