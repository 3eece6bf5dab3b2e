"""The classifier inside the engine: N instances in pretraining, C classes in fine-tuning.

ZeRO shards it like any other layer.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds import rng
from vitds.batch import Targets
from vitds.heads.logsumexp import check_widths, row_terms
from vitds.heads.loss import mixed_smoothed_loss, stacked_targets
from vitds.heads.tiles import KEEP_BYTES
from vitds.rng import Purpose

INIT_STD = 0.02
# Rows drawn by one generator: a rank makes only the blocks that it holds.
INIT_BLOCK_ROWS = 1024


def initial_rows(
    first: int, last: int, width: int, seed: int, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n D"]:
    """Rows first..last-1 of the initial weight, truncated normal; the same whichever rank makes them."""
    found = torch.empty(last - first, width, dtype=dtype)
    for block in range(first // INIT_BLOCK_ROWS, -(-last // INIT_BLOCK_ROWS)):
        # Blocks are drawn whole, so a row does not depend on where a rank's slice begins or ends.
        generator = torch.Generator().manual_seed(rng.seed_of(Purpose.INIT, seed, 1, block))
        rows = torch.empty(INIT_BLOCK_ROWS, width)
        # a and b are values, not deviations: 100 of them away, they cut nothing. As in timm.
        nn.init.trunc_normal_(rows, std=INIT_STD, a=-2.0, b=2.0, generator=generator)
        start = block * INIT_BLOCK_ROWS
        # The part of the block that was asked for.
        low, high = max(first, start), min(last, start + INIT_BLOCK_ROWS)
        found[low - first : high - first] = rows[low - start : high - start]
    return found


def scaled_features(features_MD: Float[Tensor, "M D"], temperature: float | None) -> Float[Tensor, "M D"]:
    """Features as the rows are multiplied with: of length 1 / temperature in the cosine form."""
    if temperature is None:
        return features_MD
    return nn.functional.normalize(features_MD, dim=1) / temperature


class DenseHead(nn.Module):
    """Linear classifier whose forward returns this rank's part of the loss. Its logits are never held whole.

    Args:
        rows: N or C.
        width: D.
        bias: whether each row has one.
        label_smoothing: eps in [0, 1).
        seed: of the first weights.
        temperature: of the cosine form, in which features and rows have length one and their products are
            divided by it; None: linear.
        keep_bytes: logits up to this size are kept for the backward pass, which then makes no second product
            of them.
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
        keep_bytes: int = KEEP_BYTES,
    ) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.temperature = temperature
        self.keep_bytes = keep_bytes
        # The rows that it holds, as a sharded head says it: all of them.
        self.first = 0
        self.last = rows
        # Parameters of this module itself, not of a layer in it: under ZeRO-3 the weight is there while this
        # module runs, forward and backward, and only then.
        self.weight = nn.Parameter(initial_rows(0, rows, width, seed))
        self.bias = nn.Parameter(torch.zeros(rows)) if bias else None

    def forward(
        self, features_MD: Float[Tensor, "M D"], targets: Targets, step: int = 0
    ) -> Float[Tensor, "G"]:
        """This rank's part of the step's loss in each view group, float64; `step` decides nothing here.

        Raises: as `crop_losses`.
        """
        return targets.sums_by_group(self.crop_losses(features_MD, targets))

    def crop_losses(self, features_MD: Float[Tensor, "M D"], targets: Targets) -> Float[Tensor, "M"]:
        """The mixed, smoothed cross-entropy of each crop, float32.

        Raises: ShapeError if the features are not D wide. DataError if a target is no row of the head.
        """
        check_widths(features_MD, self.weight)
        rows = self.weight.shape[0]
        target_M2, share_M2 = stacked_targets(targets, rows)
        # Over all rows: log-sum-exp (M,), the two targets' logits (M, 2), the sum of all logits (M,).
        lse_M, logit_M2, total_M = row_terms(
            scaled_features(features_MD, self.temperature),
            self.weight,
            self.bias,
            target_M2,
            sums_rows=self.label_smoothing > 0,
            is_cosine=self.temperature is not None,
            keep_bytes=self.keep_bytes,
        )
        mean_M = None if total_M is None else total_M / rows
        # lam · s_a + (1 - lam) · s_b: (M, 2) -> (M,)
        return mixed_smoothed_loss(lse_M, (share_M2 * logit_M2).sum(1), mean_M, self.label_smoothing)
