"""Mixed, smoothed cross-entropy from a log-sum-exp and three numbers a row (DESIGN 5).

With logits s over N classes, targets a and b mixed by lam, and smoothing eps:
    loss = lse(s) - (1 - eps) (lam s_a + (1 - lam) s_b) - eps mean(s)
which equals lam CE(s, a) + (1 - lam) CE(s, b) with torch's label_smoothing=eps, by linearity.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def mixed_smoothed_loss(
    lse_M: Float[Tensor, "M"],
    logit_a_M: Float[Tensor, "M"],
    logit_b_M: Float[Tensor, "M"],
    mean_M: Float[Tensor, "M"],
    lam_M: Float[Tensor, "M"],
    label_smoothing: float,
) -> Float[Tensor, "M"]:
    """The loss of each row; see the module's formula. mean_M is the mean of a row's logits over all N classes."""
    target_M = lam_M * logit_a_M + (1 - lam_M) * logit_b_M
    return lse_M - (1 - label_smoothing) * target_M - label_smoothing * mean_M
