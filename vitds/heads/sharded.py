"""The instance head outside the engine: its rows are spread over the ranks, features travel.

Each rank holds a slice of the rows and their optimizer state. A step gathers the features and targets of all ranks, takes the
log-sum-exp over its own rows, and combines four numbers a row over the ranks; backward sums the features' gradients. Bytes a step do
not depend on N. With `sample_rate` a step uses a part of the rows (sampling.py).
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds import dist
from vitds.batch import Targets
from vitds.errors import SettingsError
from vitds.heads.dense import initial_rows, scaled_features
from vitds.heads.lazy import LazyRows
from vitds.heads.logsumexp import KEEP_BYTES, check_widths, row_terms
from vitds.heads.loss import mixed_smoothed_loss, stacked_targets
from vitds.heads.sampling import drawn_rows


def row_range(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows first..last-1 that a rank holds; ranges differ by at most one row."""
    return rank * rows // ranks, (rank + 1) * rows // ranks


def bytes_sent(features: int, width: int, ranks: int) -> int:
    """Bytes that one rank hands to collectives in a micro step of M features over all ranks; N does not enter.

    Forward: its features (float32) and targets (five float64), M highest logits, M times three sums. Backward: M gradients.
    """
    if ranks == 1:
        return 0
    return features // ranks * (width * 4 + 5 * 8) + features * (1 + 3) * 4 + features * width * 4


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


class _OwnPart(torch.autograd.Function):
    """(sums over all ranks' crops, sums over the own) -> the own; the gradient goes to the whole.

    Every rank differentiates the sum of all ranks' parts with one factor, and every rank holds the losses of
    all crops. So each takes the gradient of the whole, and divides the factor by R for what it says alone.
    """

    @staticmethod
    def forward(ctx: Any, whole_G: Tensor, own_G: Tensor) -> Tensor:
        return own_G.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient / dist.world_size(), None


def gather_targets(targets: Targets) -> Targets:
    """The targets of all ranks' rows, in one collective: float64 holds indices and float32 alike exactly."""
    columns = [targets.a, targets.b, targets.lam, targets.weight, targets.group]
    everyone = dist.all_gather_rows(torch.stack([column.double() for column in columns], 1)).unbind(1)
    return Targets(
        *(got.to(column.dtype) for got, column in zip(everyone, columns, strict=True)), groups=targets.groups
    )


class ShardedHead(nn.Module):
    """Rows first..last-1 of an N-row classifier; forward returns this rank's part of the loss, as DenseHead's.

    The backward pass puts the weight's gradient into memory that this module keeps, so that a step needs no
    second piece of that size.

    Args:
        rows: N over all ranks.
        width: D.
        bias, label_smoothing, seed, temperature, keep_bytes: as in DenseHead.
        sample_rate: the share of rows that stands for all negatives of a step; 1: all of them.
        dtype: of the weight and its gradient, float32 or bfloat16; biases are float32.
    Raises: SettingsError if there are fewer rows than ranks, or so few that a rank may find none of its own drawn.
    """

    def __init__(
        self, rows: int, width: int, *, bias: bool, label_smoothing: float, seed: int, temperature: float | None = None,
        sample_rate: float = 1.0, dtype: torch.dtype = torch.float32, keep_bytes: int = KEEP_BYTES,
    ) -> None:  # fmt: skip
        super().__init__()
        if rows < dist.world_size():
            raise SettingsError(
                f"head.kind sharded: {rows} instances cannot be spread over {dist.world_size()} ranks; use dense"
            )
        if sample_rate < 1 and rows // dist.world_size() * sample_rate < 2:
            raise SettingsError(
                f"head.sample_rate {sample_rate:g} of {rows} instances over {dist.world_size()} ranks may leave a rank without a row; "
                f"take {2 * dist.world_size() / rows:.2g} or more, or 1"
            )
        self.rows, self.label_smoothing, self.temperature = rows, label_smoothing, temperature
        self.sample_rate, self.seed, self.keep_bytes = sample_rate, seed, keep_bytes
        self.first, self.last = row_range(rows, dist.rank(), dist.world_size())
        self.weight = nn.Parameter(initial_rows(self.first, self.last, width, seed, dtype))
        self.bias = nn.Parameter(torch.zeros(self.last - self.first)) if bias else None
        self.gradient: Tensor | None = None
        self.lazy: LazyRows | None = None

    def forward(self, features_MD: Float[Tensor, "m D"], targets: Targets, step: int = 0) -> Float[Tensor, "G"]:
        """This rank's part of the step's loss in each view group, float64.

        Args:
            targets: of this rank's own crops.
            step: as in `crop_losses`.
        Raises: as `crop_losses`.
        """
        losses_M, everyone = self.crop_losses(features_MD, targets, step)
        own = len(features_MD)
        own_losses_m = losses_M[dist.rank() * own : (dist.rank() + 1) * own]
        return _OwnPart.apply(everyone.sums_by_group(losses_M), targets.sums_by_group(own_losses_m))

    def crop_losses(
        self, features_MD: Float[Tensor, "m D"], targets: Targets, step: int = 0
    ) -> tuple[Float[Tensor, "M"], Targets]:
        """Loss of each of the M = R·m crops of all ranks, the same on every rank, and the targets of those crops.

        Args:
            targets: of this rank's own crops.
            step: number of the optimizer step, which with the seed says which rows are drawn.
        Raises: ShapeError if the features are not D wide. DataError if a target is no row of the head.
        """
        check_widths(features_MD, self.weight)
        everyone = gather_targets(targets)
        target_M2, share_M2 = stacked_targets(everyone, self.rows)
        is_own_M2 = (target_M2 >= self.first) & (target_M2 < self.last)
        local_M2 = (target_M2 - self.first).clamp(0, self.last - self.first - 1)
        x_MD = scaled_features(_GatherFeatures.apply(features_MD.float()), self.temperature)
        terms = (
            self._all_rows(x_MD, local_M2)
            if self.sample_rate == 1
            else self._some_rows(x_MD, local_M2, is_own_M2, step)
        )
        lse_M, logit_M2, total_M = terms
        own_M = (torch.where(is_own_M2, share_M2, 0.0) * logit_M2).sum(1)
        mean_M = torch.zeros_like(lse_M) if total_M is None else total_M / self.rows
        highest_M = dist.all_reduce_max(lse_M.detach().clone())
        sums_M3 = _SumOverRanks.apply(torch.stack([(lse_M - highest_M).exp(), own_M, mean_M], 1))
        lse_M = highest_M + sums_M3[:, 0].log()
        return mixed_smoothed_loss(lse_M, sums_M3[:, 1], sums_M3[:, 2], self.label_smoothing), everyone

    def _all_rows(self, x_MD: Tensor, local_M2: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        if self.gradient is None:
            self.gradient = torch.empty_like(self.weight)
        return row_terms(
            x_MD, self.weight, self.bias, local_M2,
            sums_rows=self.label_smoothing > 0, is_cosine=self.temperature is not None,
            gradient=self.gradient, keep_bytes=self.keep_bytes,
        )  # fmt: skip

    def _some_rows(
        self, x_MD: Tensor, local_M2: Tensor, is_own_M2: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the targets' rows and the drawn ones: a row that counts c times has log(c) added to its logits.

        Its sum over the exponentials is unbiased, and so is the sum of the logits; the log-sum-exp is a little too low.
        """
        counts_n = drawn_rows(
            self.rows, self.first, self.last, rate=self.sample_rate, seed=self.seed, step=step
        ).to(x_MD.device)
        counts_n[local_M2[is_own_M2]] = 1.0
        taken_k = counts_n.nonzero().squeeze(1)
        counts_k = counts_n[taken_k]
        weight_kD, *bias = (
            self.lazy.take(taken_k, step)
            if self.lazy
            else [part.index_select(0, taken_k) for part in self.parameters()]
        )
        weight_kD, bias_k = weight_kD.float(), bias[0] if bias else torch.zeros_like(counts_k)
        if self.temperature is not None:
            weight_kD = nn.functional.normalize(weight_kD, dim=1)
        place_M2 = torch.searchsorted(taken_k, local_M2).clamp_max(len(taken_k) - 1)
        lse_M, logit_M2, _ = row_terms(
            x_MD,
            weight_kD,
            bias_k + counts_k.log(),
            place_M2,
            sums_rows=False,
            is_cosine=False,
            keep_bytes=self.keep_bytes,
        )
        with torch.autocast(x_MD.device.type, enabled=False):
            return lse_M, logit_M2, x_MD @ (counts_k @ weight_kD) + counts_k @ bias_k
