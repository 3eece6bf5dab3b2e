"""What changes along a run, each a pure function of the step.

So a resume repeats it, and nothing of it is saved.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from vitds.config.tree import Optimizer, Settings


def warmup_steps(warmup_epochs: float, epochs: int, steps_per_epoch: int) -> int:
    """The recipe's warm-up, but at most a tenth of the run."""
    # A tenth, or a short try of a long recipe would be all warm-up.
    return round(min(warmup_epochs, epochs / 10) * steps_per_epoch)


@dataclass(frozen=True)
class LearningRate:
    """Linear warm-up from 0, then a cosine to 0.

    The paper's code has a slip of precedence in its cosine, worth 0.003 of the peak in its own runs; this is
    the clean one.

    Attributes:
        peak: the rate at step `warmup`.
        warmup: steps.
        total: steps of the whole run.
    """

    peak: float
    warmup: int
    total: int

    @classmethod
    def of(cls, settings: Settings, steps_per_epoch: int) -> LearningRate:
        """The schedule that a run's settings ask for."""
        warmup = warmup_steps(settings.schedule.warmup_epochs, settings.epochs, steps_per_epoch)
        return cls(settings.optimizer.lr_peak, warmup, settings.epochs * steps_per_epoch)

    def at(self, step: int) -> float:
        """The rate of step 0..total-1; 0 at step 0 when there is a warm-up."""
        # Step 0 moves nothing: its rate is 0. Without a warm-up this branch is never taken.
        if step < self.warmup:
            return self.peak * step / self.warmup
        # From the peak at step `warmup` to just above 0 at the last step.
        return self.peak * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / (self.total - self.warmup)))


def teacher_momentum(done: int, *, start: float, total: int) -> float:
    """The share of itself that a teacher keeps after update `done` (from 1); to 1 by a cosine."""
    # `start` at first, 1 at the end, where the teacher stands still.
    return 1 - (1 - start) * 0.5 * (1 + math.cos(math.pi * done / total))


def teacher_temperature(epoch: int, first: float, last: float, *, warmup_epochs: int) -> float:
    """What a teacher's logits are divided by in an epoch: in a line from `first` to `last`, then that."""
    return last if epoch >= warmup_epochs else first + (last - first) * epoch / warmup_epochs


def weight_decay(settings: Optimizer, step: int, total: int) -> float:
    """The weight decay of step 0..total-1: by a cosine to `weight_decay_end`, or the same throughout."""
    start, end = settings.weight_decay, settings.weight_decay_end
    if end is None:
        return start
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * step / total))
