"""The classifier inside the engine: N instances in pretraining, C classes in fine-tuning. ZeRO shards it like any other layer."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds import rng
from vitds.batch import Targets
from vitds.errors import ShapeError
from vitds.heads.loss import mixed_smoothed_loss
from vitds.rng import Purpose

INIT_BLOCK_ROWS = 1024  # rows drawn by one generator: a rank makes only the blocks that it holds


def initial_rows(first: int, last: int, width: int, seed: int) -> Float[Tensor, "n D"]:
    """Rows first..last-1 of the initial weight: truncated normal, std 0.02, the same whichever rank makes them (METHOD 5)."""
    blocks = []
    for block in range(first // INIT_BLOCK_ROWS, -(-last // INIT_BLOCK_ROWS)):
        generator = torch.Generator().manual_seed(rng.seed_of(Purpose.INIT, seed, 1, block))
        rows = torch.empty(INIT_BLOCK_ROWS, width)
        nn.init.trunc_normal_(rows, std=0.02, a=-2.0, b=2.0, generator=generator)
        start = block * INIT_BLOCK_ROWS
        blocks.append(rows[max(first - start, 0) : max(last - start, 0)])
    return torch.cat(blocks)


class DenseHead(nn.Module):
    """Linear classifier whose forward returns a loss a row.

    Args:
        rows: N or C. width: D. label_smoothing: eps in [0, 1).
    """

    def __init__(self, rows: int, width: int, *, bias: bool, label_smoothing: float, seed: int) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.linear = nn.Linear(width, rows, bias=bias)
        with torch.no_grad():
            self.linear.weight.copy_(initial_rows(0, rows, width, seed))
            if bias:
                self.linear.bias.zero_()

    def forward(self, features_MD: Float[Tensor, "M D"], targets: Targets) -> Float[Tensor, "M"]:
        """The mixed, smoothed cross-entropy of each row, float32.

        Raises: ShapeError if the features are not D wide.
        """
        if features_MD.shape[1] != self.linear.in_features:
            raise ShapeError(
                f"features are {features_MD.shape[1]} wide, the head's rows {self.linear.in_features}; was it built for another backbone?"
            )
        logits_MN = self.linear(features_MD).float()
        picked = logits_MN.gather(1, torch.stack([targets.a, targets.b], 1))
        return mixed_smoothed_loss(
            logits_MN.logsumexp(1), picked[:, 0], picked[:, 1], logits_MN.mean(1), targets.lam, self.label_smoothing
        )
