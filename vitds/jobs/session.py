"""What every training command does around the training: ranks, data, run directory, settings."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from vitds import dist
from vitds.config.flags import TrainFlags
from vitds.config.methods import Command
from vitds.config.names import NO_TEXT, is_text
from vitds.config.recipes import DEFAULT_RECIPES
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.engine.peers import Peers
from vitds.engine.process import joined_ranks
from vitds.errors import SettingsError, ShapeError, UsageError, VitdsError
from vitds.jobs.data_files import check_recipe, training_files
from vitds.runs.directory import Run, contents_of, given_settings, save_data_facts, save_inputs
from vitds.runs.lock import RunLock, next_run
from vitds.terminal import say


@dataclass(frozen=True)
class Session:
    """One rank's part of a training command.

    Attributes:
        run: the run directory.
        settings: with which the run goes on; not resolved yet at its first start.
        files: the training file, and the test file if there is one; None of a finished run.
        device: that trains.
        lock: this process's hold on the run, on rank 0.
        started: time.perf_counter() at the start.
        peers: the other ranks.
    """

    run: Run
    settings: Settings
    files: tuple[BetonFile, BetonFile | None] | None
    device: torch.device
    lock: RunLock | None
    started: float
    peers: Peers

    def say(self, text: str) -> None:
        """A line for the person, once."""
        if dist.is_main():
            say(text)


@contextmanager
def open_session(command: Command, flags: TrainFlags, given: Settings) -> Iterator[Session]:
    """Join the ranks, open the data, take the run directory; go on with its settings if it was begun.

    Whatever is refused before the first step leaves no run directory behind.

    Args:
        command: pretrain or finetune.
        flags: which run; without one runs/RECIPE-N with the next free number.
        given: settings that the person asks for.
    Raises: DataError, SettingsError for data that do not fit; RunLockedError if another process writes to the
        run; RunError if it cannot be written or was started with other settings; ResourceError if another
        rank ends (names it and its cause).
    """
    started = time.perf_counter()
    with joined_ranks() as device:
        files = None
        if flags.run is None or not Run(Path(flags.run).expanduser()).is_finished:
            files = training_files(given)
            if flags.recipe is None:
                check_recipe(command, files[0])
        contents = _contents(given, files)
        with _held_run(flags.run, flags.recipe or DEFAULT_RECIPES[command]) as (run, lock):
            with Peers(run.path / "log.txt").watched(is_refusal) as peers:
                settings = given_settings(run, given, contents)
                if lock is not None and files is not None:
                    save_inputs(run, settings, contents)
                    save_data_facts(run, files[0].manifest)
                yield Session(run, settings, files, device, lock, started, peers)


@contextmanager
def _held_run(path: str | None, recipe: str) -> Iterator[tuple[Run, RunLock | None]]:
    """The run directory and rank 0's lock on it; a new one is removed where nothing was trained in it."""
    if path is not None and not is_text(path):
        raise UsageError(f"--run {path!r} {NO_TEXT}")
    held: list[RunLock] = []

    def take() -> Path:
        held.append(next_run(recipe) if path is None else RunLock(Path(path).expanduser()))
        return held[0].path.parent

    run = Run(dist.on_main(take))
    lock = held[0] if held else None
    try:
        if lock is not None and not lock.has_flock:
            say(
                f"the file system of {run.path} has no locks: start no two runs there at one moment with one "
                "--run"
            )
        yield run, lock
    except VitdsError as error:
        # Where one rank alone fails, the others read why in the run's log.
        if lock is not None and not run.has_begun and (dist.world_size() == 1 or is_refusal(error)):
            lock.discard()
        raise
    finally:
        if lock is not None:
            lock.release()


def is_refusal(error: Exception) -> bool:
    """Whether every rank meets this error alike."""
    return isinstance(error, SettingsError | ShapeError)


def _contents(given: Settings, files: tuple[BetonFile, BetonFile | None] | None) -> dict[str, str]:
    """The hash of what is in each file, by the setting that names it.

    Of a finished run's files, those that are there.
    """
    if files is not None:
        opened = zip(("data.train", "data.test"), files, strict=True)
        return {key: file.manifest.content_hash for key, file in opened if file is not None}
    return contents_of(given)
