"""How far a run is."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The counters of a run, which are also facts of its checkpoints' manifests.

    Attributes:
        step: steps done.
        updates: how many of them changed the weights; Adam counts these.
        skipped: how many did not, for a loss or gradient that was not finite.
        skipped_in_a_row: how many of the last ones did not.
    """

    step: int = 0
    updates: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0

    def after(self, did_update: bool) -> Progress:
        """One step later."""
        return Progress(
            self.step + 1,
            self.updates + did_update,
            self.skipped + (not did_update),
            0 if did_update else self.skipped_in_a_row + 1,
        )
