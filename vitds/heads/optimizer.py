"""AdamW for the rows of a sharded head: torch's, or a lean one with 2 bytes of state a number instead of 8.

Bytes a row of width D, beside weight and gradient (8 D): adamw 8 D; lean 2 D + 4. Neither makes a temporary of the weight's size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitds.config.tree import Optimizer as OptimizerSettings
from vitds.heads.logsumexp import chunk_numbers


class LeanAdamW(torch.optim.Optimizer):
    """AdamW whose first moment is bfloat16 and whose second moment is one float32 number a row: the mean of the row's squares.

    The update is worked out in float32 and from the first moment before it is rounded. A second moment in bfloat16 would stand still:
    with beta2 = 0.999 its steps are smaller than the rounding to nearest. Parameters are float32, (n, D) or (n,).

    Source: second moments by rows, Adafactor (arXiv:1804.04235); one a block, Adam-mini (arXiv:2406.16793).
    """

    def __init__(self, parameters: Any, *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every row whose parameter has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, **self.state[parameter])

    def _update(self, parameter: Tensor, group: dict[str, Any], step: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
        step += 1
        beta1, beta2 = group["betas"]
        correct1, correct2 = (1 - beta ** float(step) for beta in (beta1, beta2))
        rows_nD, gradient_nD, moment_nD = (tensor.view(len(parameter), -1) for tensor in (parameter, parameter.grad, exp_avg))
        block = max(1, chunk_numbers(parameter.device) // rows_nD.shape[1])
        for first in range(0, len(parameter), block):
            span = slice(first, first + block)
            g_cD, m_cD = gradient_nD[span], moment_nD[span].float()
            m_cD.lerp_(g_cD, 1 - beta1)
            moment_nD[span] = m_cD
            v_c = exp_avg_sq[span].lerp_(g_cD.square().mean(1), 1 - beta2)
            divisor_c1 = (v_c / correct2).sqrt_().add_(group["eps"])[:, None]
            rows_nD[span].mul_(1 - group["lr"] * group["weight_decay"]).addcdiv_(m_cD, divisor_c1, value=-group["lr"] / correct1)


def build_row_optimizer(module: nn.Module, kind: Literal["adamw", "lean"], settings: OptimizerSettings) -> torch.optim.Optimizer:
    """The optimizer of a sharded head with its states made: `step`, `exp_avg` and `exp_avg_sq` of each parameter, all zero."""
    options = dict(lr=settings.lr_peak, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay)
    is_lean = kind == "lean"
    # torch's plain AdamW makes two temporaries of the weight's size; the fused one makes none.
    optimizer = LeanAdamW(module.parameters(), **options) if is_lean else torch.optim.AdamW(module.parameters(), fused=True, **options)
    for parameter in module.parameters():
        optimizer.state[parameter] = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter, dtype=torch.bfloat16 if is_lean else parameter.dtype),
            "exp_avg_sq": parameter.new_zeros(len(parameter)) if is_lean else torch.zeros_like(parameter),
        }
    return optimizer
