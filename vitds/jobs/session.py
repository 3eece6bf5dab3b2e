"""What every training command does around the training: ranks, run directory, lock, saved settings."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vitds import dist
from vitds.config.tree import Settings
from vitds.engine.peers import Peers
from vitds.engine.process import start_ranks
from vitds.runs.directory import Run, given_settings, next_run_path
from vitds.runs.lock import RunLock


@dataclass(frozen=True)
class Session:
    """One rank's part of a training command.

    Attributes:
        run: the run directory.
        settings: with which the run goes on; not resolved yet at its first start.
        device: that trains.
        lock: this process's hold on the run, on rank 0.
        started: time.perf_counter() at the start.
        peers: the other ranks.
    """

    run: Run
    settings: Settings
    device: torch.device
    lock: RunLock | None
    started: float
    peers: Peers

    def say(self, text: str) -> None:
        """A line for the person, once. A reader that is gone (`| head`) ends no training."""
        if dist.is_main():
            with contextlib.suppress(OSError):
                print(text, flush=True)


@contextmanager
def open_session(run: str | None, recipe: str, given: Settings) -> Iterator[Session]:
    """Join the ranks, take the run directory, and go on with its saved settings if it was started before.

    Args:
        run: the run directory; None takes runs/RECIPE-N with the next free number.
        recipe: its name, for that.
        given: settings that the person asks for.
    Raises: RunLockedError if another process writes to it; RunError if it cannot be written or was started with other settings;
        ResourceError if another rank ends (names it and its cause).
    """
    started = time.perf_counter()
    device = start_ranks()
    path = Path(run) if run else dist.on_main(next_run_path, recipe)
    lock = dist.on_main(RunLock, path)
    try:
        with Peers(path / "log.txt").watched() as peers:
            settings = given_settings(Run(path), given)
            yield Session(Run(path), settings, device, lock if dist.is_main() else None, started, peers)
    finally:
        if dist.is_main():
            lock.release()
