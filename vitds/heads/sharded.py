"""The instance head outside the engine: its rows are spread over the ranks, features travel (DESIGN 6).

Each rank holds a slice of the rows and their optimizer state. A step gathers the features of all ranks, takes the log-sum-exp over
its own rows, and combines three numbers a row over the ranks. Bytes a step do not depend on N.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from vitds import dist
from vitds.batch import Targets
from vitds.errors import SettingsError, ShapeError
from vitds.heads.dense import initial_rows
from vitds.heads.loss import mixed_smoothed_loss


def row_range(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows first..last-1 that a rank holds; ranges differ by at most one row."""
    return rank * rows // ranks, (rank + 1) * rows // ranks


class _GatherFeatures(torch.autograd.Function):
    """Rows of all ranks. Backward: sum over ranks, own rows, times R, which the engine's average over ranks takes out again."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return dist.all_gather_rows(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        own = gradient.shape[0] // dist.world_size()
        total = dist.all_reduce_sum(gradient.contiguous())
        return total[dist.rank() * own : (dist.rank() + 1) * own] * dist.world_size()


class _SumOverRanks(torch.autograd.Function):
    """Sum forward, identity backward: every rank holds the whole loss and differentiates its own part."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return dist.all_reduce_sum(value.clone())

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


class ShardedHead(nn.Module):
    """Rows first..last-1 of an N-row classifier; forward returns the loss of every row of every rank.

    Args:
        rows: N over all ranks. width: D.
    Raises: SettingsError if there are fewer rows than ranks.
    """

    def __init__(self, rows: int, width: int, *, bias: bool, label_smoothing: float, seed: int) -> None:
        super().__init__()
        if rows < dist.world_size():
            raise SettingsError(f"head.kind sharded: {rows} instances cannot be spread over {dist.world_size()} ranks; use dense")
        self.rows, self.label_smoothing = rows, label_smoothing
        self.first, self.last = row_range(rows, dist.rank(), dist.world_size())
        self.weight = nn.Parameter(initial_rows(self.first, self.last, width, seed))
        self.bias = nn.Parameter(torch.zeros(self.last - self.first)) if bias else None

    def forward(self, features_MD: Float[Tensor, "m D"], targets: Targets) -> tuple[Float[Tensor, "M"], Targets]:
        """Loss of each of the R·m rows, the same on every rank, and the targets of those rows.

        Raises: ShapeError if the features are not D wide.
        """
        if features_MD.shape[1] != self.weight.shape[1]:
            raise ShapeError(
                f"features are {features_MD.shape[1]} wide, the head's rows {self.weight.shape[1]}; was it built for another backbone?"
            )
        everyone = Targets(*(dist.all_gather_rows(getattr(targets, name)) for name in ("a", "b", "lam", "weight", "group")))
        x_MD = _GatherFeatures.apply(features_MD.float())
        logits_Mn = nn.functional.linear(x_MD, self.weight, self.bias).float()
        maximum_M = dist.all_reduce_max(logits_Mn.detach().amax(1))
        sums_M4 = torch.stack(
            [
                (logits_Mn - maximum_M[:, None]).exp().sum(1),
                self._owned_logit(logits_Mn, everyone.a),
                self._owned_logit(logits_Mn, everyone.b),
                logits_Mn.sum(1) / self.rows,
            ],
            1,
        )
        exp_M, a_M, b_M, mean_M = _SumOverRanks.apply(sums_M4).unbind(1)
        return mixed_smoothed_loss(exp_M.log() + maximum_M, a_M, b_M, mean_M, everyone.lam, self.label_smoothing), everyone

    def _owned_logit(self, logits_Mn: Float[Tensor, "M n"], target_M: Int[Tensor, "M"]) -> Float[Tensor, "M"]:
        """The target's logit where this rank holds the target's row, 0 elsewhere."""
        local = target_M - self.first
        is_own = (local >= 0) & (local < self.last - self.first)
        picked = logits_Mn.gather(1, local.clamp(0, self.last - self.first - 1)[:, None])[:, 0]
        return torch.where(is_own, picked, 0.0)
