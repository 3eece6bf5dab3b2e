"""The learning rate of each step: linear warm-up from 0, then a cosine to 0 (METHOD 3.4, without its precedence slip)."""

from __future__ import annotations

import math

SAVING_SHARE = 0.02  # of the time


def warmup_steps(warmup_epochs: float, epochs: int, steps_per_epoch: int) -> int:
    """The recipe's warm-up, but at most a tenth of the run."""
    return round(min(warmup_epochs, epochs / 10) * steps_per_epoch)


def learning_rate(step: int, *, lr_peak: float, warmup: int, total: int) -> float:
    """The rate of step 0..total-1; 0 at step 0 when there is a warm-up, lr_peak at step `warmup`."""
    if step < warmup:
        return lr_peak * step / warmup
    return lr_peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


def save_is_due(since_s: float, *, every_minutes: float, last_save_s: float) -> bool:
    """Whether a checkpoint by the minute is due, since_s after the last one, which took last_save_s; every_minutes 0: never.

    Slow ones come more rarely, so that saving takes SAVING_SHARE of the time at most.
    """
    return every_minutes > 0 and since_s >= max(60 * every_minutes, last_save_s / SAVING_SHARE)
