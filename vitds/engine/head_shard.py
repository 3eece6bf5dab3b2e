"""The sharded head in the loop: its rows, their own optimizer, its clipping and its part of a checkpoint. DeepSpeed never sees it."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vitds import dist
from vitds.batch import Targets
from vitds.config.tree import Settings
from vitds.engine.state import MOMENTS
from vitds.heads.lazy import LazyRows
from vitds.heads.logsumexp import chunk_numbers
from vitds.heads.optimizer import build_row_optimizer
from vitds.heads.sharded import ShardedHead, row_range
from vitds.models.precision import AUTOCAST
from vitds.runs.checkpoint import CheckpointReader

ROWS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class HeadShard:
    """This rank's rows of the instance head, stepping together with the engine.

    Args:
        rates: the backbone's learning rate in each step of the run; only rows that are updated lazily need it.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        settings: Settings,
        device: torch.device,
        rates: NDArray[np.float64] | None = None,
    ) -> None:
        form = settings.head.form | {
            "sample_rate": settings.head.sample_rate,
            "dtype": ROWS[settings.head.row_dtype],
        }
        self.module = ShardedHead(rows, width, seed=settings.seed, **form).to(device)
        key = {"seed": settings.seed, "first_row": self.module.first}
        self.optimizer = build_row_optimizer(self.module, settings.head.optimizer, settings.optimizer, **key)
        self.optimizer.param_groups[0]["lr_scale"] = settings.head.lr_scale
        self.lazy = (
            LazyRows(self.module, self.optimizer, rates * settings.head.lr_scale, **key)
            if settings.head.lazy
            else None
        )
        self.module.lazy = self.lazy
        self.clip_norm, self.dtype = settings.optimizer.clip_norm, AUTOCAST.get(settings.engine.precision)
        self.ranges = [row_range(rows, rank, dist.world_size()) for rank in range(dist.world_size())]

    def __call__(self, features: Tensor, targets: Targets, step: int) -> tuple[Tensor, Targets]:
        """Losses (R·m,) and targets of all ranks' rows; see ShardedHead.forward."""
        with torch.autocast(features.device.type, self.dtype, enabled=self.dtype is not None):
            self.step = step
            return self.module(features, targets, step)

    def gradient_norm(self) -> float:
        """The joint norm of all ranks' rows, with the loss scale still in it."""
        if self.lazy:
            self.rows_k, self.gradients = self.lazy.gradients()
        else:
            self.gradients = [parameter.grad for parameter in self.module.parameters()]
        own = torch.nn.utils.get_total_norm(self.gradients)
        self.norm = float(dist.all_reduce_sum(own.double() ** 2).sqrt())
        return self.norm

    def update(self, may_step: bool, loss_scale: float) -> float:
        """Step or not, with the engine; returns the gradient norm before clipping."""
        norm = self.norm / loss_scale
        if may_step:
            factor = min(1.0, self.clip_norm / (norm + 1e-6)) if self.clip_norm else 1.0
            if factor / loss_scale != 1.0:
                for gradient in self.gradients:
                    gradient.mul_(factor / loss_scale)
            if self.lazy:
                self.lazy.step(self.rows_k, self.gradients, self.step)
            else:
                self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def read(self) -> dict[str, Tensor]:
        """weight, bias and their moments, and where rows are lazy the steps that each has had; this rank's rows."""
        tensors = {}
        for name, parameter in self.module.named_parameters():
            tensors[name] = parameter
            tensors |= {f"{name}.{moment}": self.optimizer.state[parameter][moment] for moment in MOMENTS}
        return tensors | ({"seen": self.lazy.seen_n} if self.lazy else {})

    @torch.no_grad()
    def write(self, saved: CheckpointReader, updates: int) -> None:
        """Set this rank's rows from a checkpoint that any number of ranks wrote, a block at a time.

        Raises: RunError if it does not hold all rows.
        """
        first, last = self.module.first, self.module.last
        block = max(1, chunk_numbers(self.module.weight.device) // self.module.weight.shape[1])
        for name, tensor in self.read().items():
            for start in range(first, last, block):
                stop = min(start + block, last)
                tensor[start - first : stop - first] = saved.rows(name, start, stop)
        for state in self.optimizer.state.values():
            state["step"].fill_(updates)
