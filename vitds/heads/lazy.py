"""Rows that are read and updated only in the steps in which they are in play (`head.lazy`).

A step of AdamW without a gradient only decays a row and moves it by its fading momentum. Both have a closed
form, so what a row missed is made up for when it is next in play. No step touches, or holds a gradient of,
more than the drawn rows and the targets.

Letters of the shapes: n rows on this rank, k rows in play, D their width; d is D, or 1 where a row has one
second moment.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from vitds.heads.optimizer import rounded_by_chance, step_rows
from vitds.heads.tiles import tile_numbers

# A momentum that has faded below this share of itself moves nothing any more.
FADED = 1e-12


class LazyRows:
    """The rows of `module`, under the states of its optimizer, whose own `step` is not used.

    Against AdamW on all rows the result differs by rounding and by eps: where a number's root of the second
    moment is not far above eps, the made-up moves are a little too long. A step that is skipped counts as one
    without a gradient for all rows.

    Args:
        module: whose parameters are the rows.
        optimizer: made by build_row_optimizer.
        rates: learning rate of each step of the run.
        seed: of the chance by which bfloat16 rows are rounded.
        first_row: of this rank, a part of that chance's key.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        rates: NDArray[np.float64],
        *,
        seed: int,
        first_row: int,
    ) -> None:
        self.optimizer = optimizer
        self.group = optimizer.param_groups[0]
        self.rates = rates
        self.parameters = list(module.parameters())
        self.seed = seed
        self.first_row = first_row
        # Logarithm of what the first 0, 1, 2, ... steps' decays leave of a weight.
        self.log_decay = np.concatenate([[0.0], np.cumsum(np.log1p(-rates * self.group["weight_decay"]))])
        rows, device = len(self.parameters[0]), self.parameters[0].device
        # The steps that each row has had.
        self.seen_n = torch.zeros(rows, dtype=torch.int32, device=device)
        # The rows of each micro step since the last update, and their copies.
        self.taken: list[tuple[Tensor, list[Tensor]]] = []

    def take(self, rows_k: Tensor, step: int) -> list[Tensor]:
        """Float32 copies of the rows (k, D) and of their biases (k,), which collect gradients.

        Args:
            rows_k: the rows in play, in order, each once.
            step: number of the step, from 0; the copies are as they are before it.
        """
        self._make_up(rows_k, step)
        # Leaves of the graph: the backward pass fills their .grad, and the rows themselves need none.
        copies = [
            parameter.detach().index_select(0, rows_k).float().requires_grad_()
            for parameter in self.parameters
        ]
        self.taken.append((rows_k, copies))
        return copies

    def gradients(self) -> tuple[Tensor, list[Tensor]]:
        """The rows taken since the last call (k,), and each parameter's gradient there, of all micro steps.

        A row that several micro steps took stands there once.
        """
        # Where each taken row stands among the distinct ones, cut again by micro step.
        rows_k, place = torch.unique(torch.cat([rows for rows, _ in self.taken]), return_inverse=True)
        places = place.split([len(rows) for rows, _ in self.taken])
        found = [copy.new_zeros(len(rows_k), *copy.shape[1:]) for copy in self.taken[0][1]]
        for here, (_, copies) in zip(places, self.taken, strict=True):
            for total, copy in zip(found, copies, strict=True):
                # Within a micro step each row is there once, so `here` has no repeats.
                total.index_add_(0, here, copy.grad)
        self.taken = []
        return rows_k, found

    @torch.no_grad()
    def step(self, rows_k: Tensor, gradients: list[Tensor], step: int) -> None:
        """Update the rows.

        Args:
            rows_k: as `gradients` gave them.
            gradients: likewise, of each parameter.
            step: number of the step, from 0.
        """
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            w_kD, m_kD, v_kd = self._gathered(parameter, rows_k)
            # Adam's counter, from 1, is that of all rows: a row's moments fade in every step.
            step_rows(w_kD, gradient.view(len(rows_k), -1), m_kD, v_kd, self.group, step + 1)
            self._put(parameter, rows_k, w_kD, m_kD, v_kd, (step, 0))
        self.seen_n[rows_k] = step + 1

    def settle(self, step: int) -> None:
        """Make up for what every row has missed before the step."""
        rows_n = torch.arange(len(self.seen_n), device=self.seen_n.device)
        # Tile by tile: the float32 copies of all rows at once would be as large as the head.
        for rows_t in rows_n.split(max(1, tile_numbers(rows_n.device) // self.parameters[0].shape[1])):
            self._make_up(rows_t, step)

    @torch.no_grad()
    def _make_up(self, rows_k: Tensor, step: int) -> None:
        """Do for the rows what the steps before `step` would have done without a gradient."""
        # Only those that missed something: another micro step of this step may have made up for them.
        rows_k = rows_k[self.seen_n[rows_k] < step]
        if not len(rows_k):
            return
        # Many rows were last seen in the same step, so the sums are made once for each such step.
        last_u, which_k = np.unique(self.seen_n[rows_k].cpu().numpy(), return_inverse=True)
        decay_u, drift_u = self._missed(last_u.astype(np.int64), step)
        beta1, beta2 = self.group["betas"]
        numbers = (decay_u, drift_u, beta1 ** (step - last_u), beta2 ** (step - last_u))
        # From each distinct step back to each row, (u,) -> (k, 1).
        decay_k1, drift_k1, fade_k1, fade_sq_k1 = (
            torch.from_numpy(of_u[which_k]).float().to(rows_k.device)[:, None] for of_u in numbers
        )
        for parameter in self.parameters:
            w_kD, m_kD, v_kd = self._gathered(parameter, rows_k)
            # m / sqrt(v) as last seen; drift_k1 has all that happened to it since.
            w_kD.mul_(decay_k1).sub_(m_kD / (v_kd.sqrt() + self.group["eps"]) * drift_k1)
            self._put(parameter, rows_k, w_kD, m_kD.mul_(fade_k1), v_kd.mul_(fade_sq_k1), (step, 1))
        self.seen_n[rows_k] = step

    def _missed(
        self, last_u: NDArray[np.int64], step: int
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """The factor of all decays until `step`, and how far m / sqrt(v) has moved a row by then.

        Step s moves a row by rate_s · m beta1^j / (1 - beta1^s) / sqrt(v beta2^j / (1 - beta2^s)), with
        j = s - last, and later steps decay that.

        Args:
            last_u: after how many steps rows were last seen: u different numbers.
            step: before which they are looked at.
        """
        beta1, beta2 = self.group["betas"]
        # In a step m shrinks by beta1 and sqrt(v) by sqrt(beta2): what is left of their ratio.
        fade = beta1 / math.sqrt(beta2) if beta2 else math.inf
        # The row that has waited longest decides how many terms the sum of all has.
        longest = step - int(last_u.min())
        terms = longest
        if fade < 1:
            # fade^j falls below FADED after so many steps: who missed thousands needs a few hundred terms.
            terms = min(longest, math.ceil(math.log(FADED) / math.log(max(fade, FADED))))
        # (u, terms): numbers of the missed steps, from 1. Rows that waited less have terms beyond `step`,
        # which the last factor sets to 0.
        j_s = np.arange(1, terms + 1)
        s_us = np.minimum(last_u[:, None] + j_s, step)
        moves_us = self.rates[s_us - 1] * fade**j_s * np.sqrt(1 - beta2**s_us) / (1 - beta1**s_us)
        # What later steps' decays leave of each move.
        moves_us *= np.exp(self.log_decay[step] - self.log_decay[s_us]) * (last_u[:, None] + j_s <= step)
        return np.exp(self.log_decay[step] - self.log_decay[last_u]), moves_us.sum(1)

    def _gathered(self, parameter: Tensor, rows_k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weight (k, D), first moment (k, D), second moment (k, D) or (k, 1), float32."""
        state = self.optimizer.state[parameter]
        # A bias (k,) becomes (k, 1), and so does a second moment by rows: one code for all.
        held = (parameter, state["exp_avg"], state["exp_avg_sq"])
        w_kD, m_kD, v_kd = (tensor.index_select(0, rows_k).float().view(len(rows_k), -1) for tensor in held)
        return w_kD, m_kD, v_kd

    def _put(
        self,
        parameter: Tensor,
        rows_k: Tensor,
        w_kD: Tensor,
        m_kD: Tensor,
        v_kd: Tensor,
        key: tuple[int, int],
    ) -> None:
        """Write back what `_gathered` gave, changed.

        Args:
            key: step, and which of its two writes this is: each rounds by a draw of its own.
        """
        state = self.optimizer.state[parameter]
        if parameter.dtype == torch.bfloat16:
            # The first row stands for the block, so that two blocks of a step get different draws.
            w_kD = rounded_by_chance(w_kD, self.seed, self.first_row + int(rows_k[0]), *key)
        for tensor, value in ((parameter, w_kD), (state["exp_avg"], m_kD), (state["exp_avg_sq"], v_kd)):
            tensor.index_copy_(0, rows_k, value.view(len(rows_k), *tensor.shape[1:]).to(tensor.dtype))
