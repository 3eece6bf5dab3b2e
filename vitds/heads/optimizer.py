"""AdamW for the rows of a sharded head: torch's, or a lean one with 2 bytes of state a number instead of 8.

Bytes a row of width D, beside weight and gradient: adamw 8 D; lean 2 D + 4. Neither makes a temporary of the
weight's size.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vitds import rng
from vitds.config.tree import Optimizer as OptimizerSettings
from vitds.heads.tiles import tile_numbers
from vitds.rng import Purpose


class LeanAdamW(torch.optim.Optimizer):
    """AdamW whose first moment is bfloat16, and whose second is one float32 number a row, of the mean square.

    The update is worked out in float32 and from the first moment before it is rounded. A second moment in
    bfloat16 would stand still: with beta2 = 0.999 its steps are smaller than the rounding to nearest. So
    would a bfloat16 weight: it is rounded by chance.

    Args:
        parameters: (n, D) or (n,), float32 or bfloat16.
        lr: the learning rate, until a group has another.
        betas: by which the moments fade.
        eps: added to the root of the second moment.
        weight_decay: times the rate, the share of a weight that a step takes away.
        seed: with the step and the row the key of the chance.
        first_row: of this rank.
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
        # In place: this is the tensor in the optimizer's state.
        step += 1
        # A bias (n,) is taken for n rows of one number.
        rows_nD, gradient_nD, moment_nD = (
            tensor.view(len(parameter), -1) for tensor in (parameter, parameter.grad, exp_avg)
        )
        # Tile by tile, so that the float32 copies stay in the cache and no temporary has the weight's size.
        tile_rows = max(1, tile_numbers(parameter.device) // rows_nD.shape[1])
        for first in range(0, len(parameter), tile_rows):
            span = slice(first, first + tile_rows)
            rows_tD = rows_nD[span].float()
            moment_tD = moment_nD[span].float()
            # exp_avg_sq[span, None] is a view (t, 1): what step_rows writes there is in the state.
            step_rows(rows_tD, gradient_nD[span].float(), moment_tD, exp_avg_sq[span, None], group, int(step))
            moment_nD[span] = moment_tD
            # Of float32 rows `float()` is the memory itself, which is updated already.
            if parameter.dtype == torch.bfloat16:
                rows_nD[span] = rounded_by_chance(rows_tD, self.seed, int(step), self.first_row + first)


def step_rows(
    w_tD: Tensor, g_tD: Tensor, m_tD: Tensor, v_td: Tensor, group: dict[str, Any], step: int
) -> None:
    """AdamW's update of a tile of t rows, in place and in float32.

    Args:
        w_tD: the weight.
        g_tD: its gradient.
        m_tD: the first moment.
        v_td: the second moment of each number (t, D), or of each row (t, 1): then the mean of its squares.
        group: the optimizer's parameter group: lr, betas, eps, weight_decay.
        step: number of the update, from 1.
    """
    beta1, beta2 = group["betas"]
    # m = beta1 · m + (1 - beta1) · g, and v likewise of g² or of its mean over a row.
    m_tD.lerp_(g_tD, 1 - beta1)
    squares_td = g_tD.square()
    v_td.lerp_(squares_td if v_td.shape == g_tD.shape else squares_td.mean(1, keepdim=True), 1 - beta2)
    # Corrected for the zeros that both moments started from; eps comes after the root, as in Adam.
    divisor_td = (v_td / (1 - beta2**step)).sqrt_().add_(group["eps"])
    # Decoupled decay: of the weight itself, before the move, and never through the moments.
    w_tD.mul_(1 - group["lr"] * group["weight_decay"])
    w_tD.addcdiv_(m_tD, divisor_td, value=-group["lr"] / (1 - beta1**step))


def rounded_by_chance(value: Tensor, seed: int, *key: int) -> Tensor:
    """float32 as bfloat16, up or down with the chance that makes the mean right: no small update is lost.

    The draw is a function of (seed, key) and the shape.
    """
    generator = torch.Generator(value.device).manual_seed(rng.seed_of(Purpose.ROUNDING, seed, *key))
    below = torch.empty(value.shape, dtype=torch.int32, device=value.device)
    below.random_(0, 1 << 16, generator=generator)
    # bfloat16 is the upper half of a float32's bits. A draw below 2^16 carries into it with the chance that
    # the lower half says.
    return below.add_(value.view(torch.int32)).bitwise_and_(-1 << 16).view(torch.float32).bfloat16()


def build_row_optimizer(
    module: nn.Module,
    kind: Literal["adamw", "lean"],
    settings: OptimizerSettings,
    *,
    seed: int = 0,
    first_row: int = 0,
) -> torch.optim.Optimizer:
    """The optimizer of a sharded head, with `step`, `exp_avg` and `exp_avg_sq` of each parameter made, all 0.

    Args:
        module: whose parameters are the rows.
        kind: `head.optimizer`.
        settings: of the run's optimizer.
        seed: of the chance by which bfloat16 rows are rounded.
        first_row: of this rank.
    """
    # As in the engine's groups; `decays` is read by set_groups.
    parameters = list(module.parameters())
    groups: list[dict[str, Any]] = [{"params": parameters}]
    if settings.decay == "matrices":
        groups = [
            {"params": part, "decays": decays}
            for decays in (True, False)
            if (part := [parameter for parameter in parameters if (parameter.dim() > 1) == decays])
        ]
    # Made here, and not in a first step: a resume writes into them, and step 0 can be saved.
    options: dict[str, Any] = dict(
        lr=settings.lr_peak, betas=settings.betas, eps=settings.eps, weight_decay=settings.weight_decay
    )
    if kind == "lean":
        optimizer = LeanAdamW(groups, seed=seed, first_row=first_row, **options)
    else:
        # The plain one makes two temporaries of the weight's size.
        optimizer = torch.optim.AdamW(groups, fused=True, **options)
    for parameter in module.parameters():
        # Where each wants it: a fused step reads it on the device, a lean one in Python, which must not wait.
        state = {"step": torch.zeros((), device="cpu" if kind == "lean" else parameter.device)}
        if kind == "lean":
            # First moment 2 bytes a number, second moment 4 bytes a row.
            state["exp_avg"] = torch.zeros_like(parameter, dtype=torch.bfloat16)
            state["exp_avg_sq"] = parameter.new_zeros(len(parameter), dtype=torch.float32)
        else:
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        optimizer.state[parameter] = state
    return optimizer
