"""The instance loss written plainly: full logits, torch's own cross-entropy."""

from __future__ import annotations

import torch
from torch import Tensor


def mixed_cross_entropy(
    features: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, lam: Tensor, label_smoothing: float
) -> Tensor:
    """lam CE(logits, a) + (1 - lam) CE(logits, b), a value a row."""
    logits = features @ weight.T + (0 if bias is None else bias)
    loss = torch.nn.functional.cross_entropy
    return lam * loss(logits, a, reduction="none", label_smoothing=label_smoothing) + (1 - lam) * loss(
        logits, b, reduction="none", label_smoothing=label_smoothing
    )
