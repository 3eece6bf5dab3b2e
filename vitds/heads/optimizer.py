"""AdamW for the rows of a sharded head: torch's, or a lean one with 2 bytes of state a number instead of 8.

Bytes a row of width D, beside weight and gradient: adamw 8 D; lean 2 D + 4. Neither makes a temporary of the weight's size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitds import rng
from vitds.config.tree import Optimizer as OptimizerSettings
from vitds.heads.logsumexp import chunk_numbers
from vitds.rng import Purpose


class LeanAdamW(torch.optim.Optimizer):
    """AdamW whose first moment is bfloat16 and whose second moment is one float32 number a row: the mean of the row's squares.

    The update is worked out in float32 and from the first moment before it is rounded. A second moment in bfloat16 would stand still:
    with beta2 = 0.999 its steps are smaller than the rounding to nearest. So would a bfloat16 weight: it is rounded by chance.

    Args:
        parameters: (n, D) or (n,), float32 or bfloat16. seed, first_row: with the step they are the key of that chance.
    Source: second moments by rows, Adafactor (arXiv:1804.04235); one a block, Adam-mini (arXiv:2406.16793).
    """

    def __init__(
        self,
        parameters: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        seed: int = 0,
        first_row: int = 0,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        self.seed, self.first_row = seed, first_row

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every row whose parameter has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, **self.state[parameter])

    def _update(
        self, parameter: Tensor, group: dict[str, Any], step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor
    ) -> None:
        step += 1
        rows_nD, gradient_nD, moment_nD = (
            tensor.view(len(parameter), -1) for tensor in (parameter, parameter.grad, exp_avg)
        )
        block = max(1, chunk_numbers(parameter.device) // rows_nD.shape[1])
        for first in range(0, len(parameter), block):
            span = slice(first, first + block)
            rows_cD, moment_cD = rows_nD[span].float(), moment_nD[span].float()
            step_rows(rows_cD, gradient_nD[span].float(), moment_cD, exp_avg_sq[span, None], group, int(step))
            moment_nD[span] = moment_cD
            if parameter.dtype == torch.bfloat16:
                rows_nD[span] = rounded_by_chance(rows_cD, self.seed, int(step), self.first_row + first)


def step_rows(
    w_cD: Tensor, g_cD: Tensor, m_cD: Tensor, v_cd: Tensor, group: dict[str, Any], step: int
) -> None:
    """AdamW's update number `step` (from 1) of some rows, in place and in float32.

    Args:
        v_cd: the second moment of each number (c, D), or of each row (c, 1): then the mean of its squares.
    """
    beta1, beta2 = group["betas"]
    m_cD.lerp_(g_cD, 1 - beta1)
    squares_cd = g_cD.square()
    v_cd.lerp_(squares_cd if v_cd.shape == g_cD.shape else squares_cd.mean(1, keepdim=True), 1 - beta2)
    divisor_cd = (v_cd / (1 - beta2**step)).sqrt_().add_(group["eps"])
    w_cD.mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(
        m_cD, divisor_cd, value=-group["lr"] / (1 - beta1**step)
    )


def rounded_by_chance(value: Tensor, seed: int, *key: int) -> Tensor:
    """float32 as bfloat16, up or down with the chance that makes the mean right: updates below the rounding are not lost.

    The draw is a function of (seed, key) and the shape.
    """
    generator = torch.Generator(value.device).manual_seed(rng.seed_of(Purpose.ROUNDING, seed, *key))
    below = torch.empty(value.shape, dtype=torch.int32, device=value.device).random_(
        0, 1 << 16, generator=generator
    )
    return (
        below.add_(value.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()
    )  # the upper half of the bits


def build_row_optimizer(
    module: nn.Module,
    kind: Literal["adamw", "lean"],
    settings: OptimizerSettings,
    *,
    seed: int = 0,
    first_row: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer of a sharded head with its states made: `step`, `exp_avg` and `exp_avg_sq` of each parameter, all zero."""
    options: dict[str, Any] = dict(
        lr=settings.lr_peak, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    is_lean = kind == "lean"
    optimizer = (
        LeanAdamW(module.parameters(), seed=seed, first_row=first_row, **options)
        if is_lean
        else torch.optim.AdamW(
            module.parameters(), fused=True, **options
        )  # the plain one makes two temporaries of the weight's size
    )
    for parameter in module.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16 if is_lean else parameter.dtype),
            "exp_avg_sq": parameter.new_zeros(len(parameter), dtype=torch.float32)
            if is_lean
            else torch.zeros_like(parameter),
        }
    return optimizer
