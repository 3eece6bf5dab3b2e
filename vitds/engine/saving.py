"""When a checkpoint is due: by steps, by epochs, by the clock of rank 0."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from vitds.config.tree import Checkpoint

SAVING_SHARE = 0.02  # of the time


class SaveClock:
    """Knows when the last checkpoint was written and what it took.

    Attributes:
        last_step: steps done at the last checkpoint of this start; -1 before the first.
        last_s: seconds that it took.
        total_s: seconds of all of this start's checkpoints.
    """

    def __init__(self, rules: Checkpoint, steps_per_epoch: int) -> None:
        self.rules = rules
        periods = (rules.every_steps, rules.every_epochs * steps_per_epoch, rules.keep_every_steps)
        self.periods = [period for period in periods if period]  # 0 switches a rule off
        self.since = time.monotonic()
        self.last_step = -1
        self.last_s = 0.0
        self.total_s = 0.0

    def is_due_by_steps(self, done: int) -> bool:
        """Whether a checkpoint belongs after this many steps; the same on every rank."""
        return any(done % period == 0 for period in self.periods)

    def is_due_by_time(self) -> bool:
        """Whether one is due by this process's clock; rank 0 decides for all."""
        since_s = time.monotonic() - self.since
        return time_is_up(since_s, every_minutes=self.rules.every_minutes, last_save_s=self.last_s)

    @contextmanager
    def saving(self, done: int) -> Iterator[None]:
        """Around the writing of a checkpoint; only one that succeeds counts."""
        # Monotonic: a clock that is set back would put the next save off.
        began = time.monotonic()
        # No finally: a save that fails leaves these as they are.
        yield
        self.since = time.monotonic()
        self.last_step = done
        self.last_s = self.since - began
        self.total_s += self.last_s


def time_is_up(since_s: float, *, every_minutes: float, last_save_s: float) -> bool:
    """Whether a checkpoint by the minute is due.

    Slow ones come more rarely, so that saving takes SAVING_SHARE of the time at most.

    Args:
        since_s: seconds since the last one.
        every_minutes: 0: never.
        last_save_s: seconds that the last one took.
    """
    return every_minutes > 0 and since_s >= max(60 * every_minutes, last_save_s / SAVING_SHARE)
