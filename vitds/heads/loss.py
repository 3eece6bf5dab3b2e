"""Mixed, smoothed cross-entropy from a log-sum-exp and two numbers a row.

With logits s over N classes, targets a and b mixed by lam, and smoothing eps:
    loss = lse(s) - (1 - eps) (lam s_a + (1 - lam) s_b) - eps mean(s)
which equals lam CE(s, a) + (1 - lam) CE(s, b) with torch's label_smoothing=eps, by linearity.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitds.batch import Targets
from vitds.errors import DataError


def mixed_smoothed_loss(
    lse_M: Float[Tensor, "M"],
    target_M: Float[Tensor, "M"],
    mean_M: Float[Tensor, "M"] | None,
    label_smoothing: float,
) -> Float[Tensor, "M"]:
    """The loss of each crop; see the module's formula.

    Args:
        lse_M: log-sum-exp of a crop's logits.
        target_M: the two targets' logits, mixed.
        mean_M: mean of a crop's logits over all N classes; not used without smoothing.
        label_smoothing: eps.
    """
    if label_smoothing == 0:
        return lse_M - target_M
    # Smoothing gives eps / N to each class, which is eps times the mean logit.
    return lse_M - (1 - label_smoothing) * target_M - label_smoothing * mean_M


def stacked_targets(targets: Targets, rows: int) -> tuple[Int[Tensor, "M 2"], Float[Tensor, "M 2"]]:
    """(a, b) and (lam, 1 - lam) of each crop.

    Args:
        targets: of M crops.
        rows: of the head.
    Raises: DataError if a target lies outside 0..rows-1; it names the image, or class. On the host only: to
        ask a GPU would stop its queue at each step.
    """
    # Stacked, so that the head looks both targets up in one go.
    target_M2 = torch.stack([targets.a, targets.b], 1)
    if target_M2.device.type == "cpu":
        is_wrong_M2 = (target_M2 < 0) | (target_M2 >= rows)
        if is_wrong_M2.any():
            crop, column = is_wrong_M2.nonzero()[0].tolist()
            raise DataError(
                f"crop {crop} of the batch is of image, or class, number {int(target_M2[crop, column])}; the "
                f"head has rows 0 to {rows - 1}: this is not the data that it was built for"
            )
    return target_M2, torch.stack([targets.lam, 1 - targets.lam], 1)
