"""The instance head outside the engine: its rows are spread over the ranks, features travel.

Each rank holds a slice of the rows and their optimizer state. A step gathers the features and targets of all
ranks, takes the log-sum-exp over its own rows, and combines four numbers a crop over the ranks. Backward sums
the features' gradients. Bytes a step do not depend on N. With `sample_rate` a step uses a part of the rows
(sampling.py).

Letters of the shapes: m crops of this rank, M of all ranks, D the width, k rows in play.
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
from vitds.heads.logsumexp import check_widths, row_terms
from vitds.heads.loss import mixed_smoothed_loss, stacked_targets
from vitds.heads.sampling import drawn_rows
from vitds.heads.tiles import KEEP_BYTES


def row_range(rows: int, rank: int, ranks: int) -> tuple[int, int]:
    """The rows first..last-1 that a rank holds; ranges differ by at most one row."""
    return rank * rows // ranks, (rank + 1) * rows // ranks


def bytes_sent(features: int, width: int, ranks: int) -> int:
    """Bytes that one rank hands to collectives in a micro step; N does not enter.

    Args:
        features: M, of all ranks.
        width: D.
        ranks: R.
    """
    if ranks == 1:
        return 0
    # An all-gather counts what this rank puts in, an all-reduce the whole tensor.
    own = features // ranks * (width * 4 + 5 * 8)  # features in float32, five columns of targets in float64
    sums = features * (1 + 3) * 4  # the highest log-sum-exp, then three sums
    gradients = features * width * 4
    return own + sums + gradients


class _GatherFeatures(torch.autograd.Function):
    """The features of all ranks.

    Backward: the gradients' sum over ranks, of it the own crops, times R, which the engine's average over
    ranks takes out again.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        return dist.all_gather_rows(features)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        # Each rank's gradient comes from its own rows of the head: the whole is the sum over ranks.
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
    """The targets of all ranks' crops, in one collective: float64 holds indices and float32 alike exactly."""
    # (m, 5) -> (M, 5), then a column each, back in its own dtype.
    columns = [targets.a, targets.b, targets.lam, targets.weight, targets.group]
    everyone = dist.all_gather_rows(torch.stack([column.double() for column in columns], 1)).unbind(1)
    return Targets(
        *(got.to(column.dtype) for got, column in zip(everyone, columns, strict=True)), groups=targets.groups
    )


class ShardedHead(nn.Module):
    """Rows first..last-1 of a classifier of N; forward returns this rank's part of the loss, as DenseHead's.

    The backward pass puts the weight's gradient into memory that this module keeps, so that a step needs no
    second piece of that size.

    Args:
        rows: N over all ranks.
        width: D.
        bias: whether each row has one.
        label_smoothing: eps in [0, 1).
        seed: of the first weights and of the draws.
        temperature: as in DenseHead.
        sample_rate: the share of rows that stands for all negatives of a step; 1: all of them.
        dtype: of the weight and its gradient, float32 or bfloat16; biases are float32.
        keep_bytes: as in DenseHead.
    Raises: SettingsError if there are fewer rows than ranks, or so few that a rank may find none of its own
        drawn.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        *,
        bias: bool,
        label_smoothing: float,
        seed: int,
        temperature: float | None = None,
        sample_rate: float = 1.0,
        dtype: torch.dtype = torch.float32,
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        super().__init__()
        ranks = dist.world_size()
        if rows < ranks:
            raise SettingsError(
                f"head.kind sharded: {rows} instances cannot be spread over {ranks} ranks; use dense"
            )
        # One row of each stratum of 1 / rate rows is drawn. A slice of two strata's length holds a whole one,
        # wherever it is cut, and so at least one row that is drawn.
        if sample_rate < 1 and rows // ranks * sample_rate < 2:
            raise SettingsError(
                f"head.sample_rate {sample_rate:g} of {rows} instances over {ranks} ranks may leave a rank "
                f"without a row; take {2 * ranks / rows:.2g} or more, or 1"
            )
        self.rows = rows
        self.label_smoothing = label_smoothing
        self.temperature = temperature
        self.sample_rate = sample_rate
        self.seed = seed
        self.keep_bytes = keep_bytes
        self.first, self.last = row_range(rows, dist.rank(), ranks)
        self.weight = nn.Parameter(initial_rows(self.first, self.last, width, seed, dtype))
        self.bias = nn.Parameter(torch.zeros(self.last - self.first)) if bias else None
        # Made in the first forward pass, on the device that the head was moved to by then.
        self.gradient: Tensor | None = None
        # Set by engine/head_shard.py under `head.lazy`.
        self.lazy: LazyRows | None = None

    def forward(
        self, features_MD: Float[Tensor, "m D"], targets: Targets, step: int = 0
    ) -> Float[Tensor, "G"]:
        """This rank's part of the step's loss in each view group, float64.

        Args:
            targets: of this rank's own crops.
            step: as in `crop_losses`.
        Raises: as `crop_losses`.
        """
        # Every rank has the losses of all M crops, and answers for its own m.
        losses_M, everyone = self.crop_losses(features_MD, targets, step)
        own = len(features_MD)
        own_losses_m = losses_M[dist.rank() * own : (dist.rank() + 1) * own]
        return _OwnPart.apply(everyone.sums_by_group(losses_M), targets.sums_by_group(own_losses_m))

    def crop_losses(
        self, features_MD: Float[Tensor, "m D"], targets: Targets, step: int = 0
    ) -> tuple[Float[Tensor, "M"], Targets]:
        """Loss of each of the M = R·m crops of all ranks, the same on every rank; the targets of those crops.

        Args:
            targets: of this rank's own crops.
            step: number of the optimizer step, which with the seed says which rows are drawn.
        Raises: ShapeError if the features are not D wide. DataError if a target is no row of the head.
        """
        # 1. Features and targets of all ranks come together; m becomes M.
        check_widths(features_MD, self.weight)
        everyone = gather_targets(targets)
        target_M2, share_M2 = stacked_targets(everyone, self.rows)
        # A target is the row of one rank. On the others it gets some row, and own_M leaves that out.
        is_own_M2 = (target_M2 >= self.first) & (target_M2 < self.last)
        local_M2 = (target_M2 - self.first).clamp(0, self.last - self.first - 1)
        # float32 whatever the engine computes in: gradients are summed over ranks in it.
        x_MD = scaled_features(_GatherFeatures.apply(features_MD.float()), self.temperature)
        # 2. Over this rank's rows alone: log-sum-exp (M,), targets' logits (M, 2), sum of all logits (M,).
        if self.sample_rate == 1:
            lse_M, logit_M2, total_M = self._all_rows(x_MD, local_M2)
        else:
            lse_M, logit_M2, total_M = self._some_rows(x_MD, local_M2, is_own_M2, step)
        # 3. Joined over ranks: each target is counted by the rank that has its row, the mean in parts.
        own_M = (torch.where(is_own_M2, share_M2, 0.0) * logit_M2).sum(1)
        mean_M = torch.zeros_like(lse_M) if total_M is None else total_M / self.rows
        # Exponentials of differences from the highest of all ranks: none of them overflows.
        # It cancels in the result, so it carries no gradient. A copy, for the collective works in place.
        highest_M = dist.all_reduce_max(lse_M.detach().clone())
        sums_M3 = _SumOverRanks.apply(torch.stack([(lse_M - highest_M).exp(), own_M, mean_M], 1))
        # 4. Each rank now has the whole log-sum-exp, targets and mean of every crop.
        lse_M = highest_M + sums_M3[:, 0].log()
        return mixed_smoothed_loss(lse_M, sums_M3[:, 1], sums_M3[:, 2], self.label_smoothing), everyone

    def _all_rows(self, x_MD: Tensor, local_M2: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-sum-exp, the targets' logits and the sum of logits over this rank's rows."""
        if self.gradient is None:
            self.gradient = torch.empty_like(self.weight)
        return row_terms(
            x_MD,
            self.weight,
            self.bias,
            local_M2,
            sums_rows=self.label_smoothing > 0,
            is_cosine=self.temperature is not None,
            gradient=self.gradient,
            keep_bytes=self.keep_bytes,
        )

    def _some_rows(
        self, x_MD: Tensor, local_M2: Tensor, is_own_M2: Tensor, step: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the targets' rows and the drawn ones.

        A row that counts c times has log(c) added to its logits. So the sum over the exponentials is
        unbiased, and so is the sum of the logits; the log-sum-exp is a little too low.
        """
        key = {"rate": self.sample_rate, "seed": self.seed, "step": step}
        counts_n = drawn_rows(self.rows, self.first, self.last, **key).to(x_MD.device)
        # A target takes part in every case, and counts once.
        counts_n[local_M2[is_own_M2]] = 1.0
        # In ascending order, as searchsorted below and lazy rows need them.
        taken_k = counts_n.nonzero().squeeze(1)
        counts_k = counts_n[taken_k]
        # Lazy rows are copies that keep their own gradient. Else autograd puts it back into all n rows.
        if self.lazy:
            weight_kD, *bias = self.lazy.take(taken_k, step)
        else:
            weight_kD, *bias = (part.index_select(0, taken_k) for part in self.parameters())
        weight_kD = weight_kD.float()
        bias_k = bias[0] if bias else torch.zeros_like(counts_k)
        if self.temperature is not None:
            # Here and not in row_terms, for the sum of logits at the end needs the same rows.
            weight_kD = nn.functional.normalize(weight_kD, dim=1)
        # Targets of other ranks' rows get some place: their logits are left out afterwards.
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
            # (k,) @ (k, D) -> (D,), then (M, D) @ (D,) -> (M,): each row as often as it counts.
            return lse_M, logit_M2, x_MD @ (counts_k @ weight_kD) + counts_k @ bias_k
