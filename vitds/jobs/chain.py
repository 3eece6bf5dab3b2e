"""`vitds chain FILE`: stages one after the other, each a run directory.

A finished one is skipped, a stopped one goes on.

FILE is YAML: a list of `{run: DIRECTORY, command: "..."}`. The command gets `--run DIRECTORY` and is run
without a shell. All stages are checked before the first one runs.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from vitds.config.deepspeed import load_ds_config
from vitds.config.flags import TrainFlags
from vitds.config.load import settings_of
from vitds.config.methods import Command
from vitds.config.yaml_text import parse_yaml
from vitds.errors import DataError, SettingsError, VitdsError
from vitds.runs.directory import Run, contents_of, given_settings

TRAINING_SCRIPTS = {"pretrain.py": "pretrain", "finetune.py": "finetune"}  # of launch/, under a launcher
DIGITS = "digits"
# What asks this process to stop -> what it tells the stage. TERM and USR1 are SLURM's, and may come here
# alone. Of Ctrl-C the terminal tells the stage too, which takes TERM as the same wish, and a second INT as
# "at once".
PASSED_ON = {
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGINT: signal.SIGTERM,
}

# Words of `vitds` and the run directories of the stages before -> nothing, or an error.
CheckWords = Callable[[Sequence[str], Sequence[Path]], None]


@dataclass(frozen=True)
class Stage:
    """One run and the command that makes it.

    Attributes:
        run: its directory.
        command: its words, without `--run`.
        work: how much it computes, in a unit that the stages share; 0 where that is not known.
    """

    run: Path
    command: tuple[str, ...]
    work: float = 0.0

    @property
    def words(self) -> list[str] | None:
        """What `vitds` is given, also behind a launcher; None of a command in which no `vitds` is found."""
        names = [Path(word).name for word in self.command]
        for place, name in enumerate(names):
            rest = [*self.command[place + 1 :], "--run", str(self.run)]
            if name in TRAINING_SCRIPTS:
                return [TRAINING_SCRIPTS[name], *rest]
            if name == "vitds":
                return rest
        return None


@dataclass(frozen=True)
class StageResult:
    """A finished stage; seconds of the whole process, 0 if it was finished before."""

    run: Run
    seconds: float


def run_stages(stages: Sequence[Stage]) -> list[StageResult]:
    """Run what is not finished, in order; where the stages' work is known, say after each when all will be.

    Raises: VitdsError with the stage's exit status if a command fails; the stages before stay finished.
    """
    results, work, spent_s = [], 0.0, 0.0  # of the stages that ran here
    for number, stage in enumerate(stages, 1):
        run, seconds = Run(stage.run), 0.0
        if run.is_finished:
            print(f"stage {number}/{len(stages)}: {stage.run} is finished, skipped", flush=True)
        else:
            command = [*stage.command, "--run", str(stage.run)]
            print(f"stage {number}/{len(stages)}: {shlex.join(command)}", flush=True)
            started = time.perf_counter()
            status = _status(command)
            seconds = time.perf_counter() - started
            if status or not run.is_finished:
                log = stage.run / "log.txt"
                where = (
                    f"its message stands above, more in {log}" if log.exists() else "its message stands above"
                )
                error = VitdsError(f"stage {number} ({stage.run}) ended with status {status}; {where}")
                error.exit_code = status or 1
                raise error
            work, spent_s = work + stage.work, spent_s + seconds
        results.append(StageResult(run, round(seconds, 1)))
        if work:
            _say_end(stages[number:], spent_s / work)
    return results


def _say_end(stages: Sequence[Stage], pace_s: float) -> None:
    """When these stages will be done, at a pace in seconds for a unit of work."""
    left = [stage for stage in stages if not Run(stage.run).is_finished]
    if left:
        minutes = pace_s * sum(stage.work for stage in left) / 60
        ends = datetime.now() + timedelta(minutes=minutes)
        what = "the last stage" if len(left) == 1 else f"the {len(left)} stages that are left"
        print(f"about {minutes:,.0f} minutes for {what}, until {ends:%Y-%m-%d %H:%M}", flush=True)


def _status(command: Sequence[str]) -> int:
    """Run a stage. What asks this process to stop is passed on, for a training saves then, and says 75.

    Returns: its status as a shell says it: 138 where USR1 ended it.
    """
    with subprocess.Popen(command) as stage:
        is_main = threading.current_thread() is threading.main_thread()  # others may set no handler
        before = {
            number: signal.signal(number, lambda number, _: stage.send_signal(PASSED_ON[number]))
            for number in (PASSED_ON if is_main else ())
        }
        try:
            status = stage.wait()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def read_stages(path: Path) -> list[Stage]:
    """The stages of a YAML file.

    Raises: SettingsError if the file is missing or no text, or an entry is not `{run: ..., command: ...}`
        (names the file and the entry).
    """
    if not path.is_file():
        raise SettingsError(
            f"{path} does not exist; chain takes a YAML list of {{run: DIRECTORY, command: COMMAND}}"
        )
    try:
        entries = parse_yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as text: {error}") from error
    if not isinstance(entries, list) or not entries:
        raise SettingsError(f"{path}: must be a list of stages, each with the keys run and command")
    stages = []
    for number, entry in enumerate(entries, 1):
        if (
            not isinstance(entry, dict)
            or set(entry) != {"run", "command"}
            or not all(isinstance(value, str) and value.strip() for value in entry.values())
        ):
            raise SettingsError(
                f"{path}: stage {number} must have just the keys run and command, both text; got {entry!r}"
            )
        try:
            words = shlex.split(entry["command"])
        except ValueError as error:
            raise SettingsError(
                f"{path}: stage {number}: {error} in the command {entry['command']!r}"
            ) from None
        stages.append(Stage(Path(os.path.expanduser(entry["run"])), tuple(words)))
    return stages


def check_stages(stages: Sequence[Stage], check_words: CheckWords) -> None:
    """Look at every stage before the first one runs: hours may lie between them.

    Args:
        check_words: raises what is wrong with the words of `vitds`.
    Raises: SettingsError for two stages of one run, or a program that is not there; what `check_words`
        raises. Each names the stage.
    """
    runs = [stage.run for stage in stages]
    for number, stage in enumerate(stages, 1):
        if stage.run in runs[: number - 1]:
            raise SettingsError(
                f"stages {runs.index(stage.run) + 1} and {number} have one run, {stage.run}; give two"
            )
        if shutil.which(stage.command[0]) is None:
            raise SettingsError(f"stage {number} ({stage.run}): there is no program {stage.command[0]}")
        if stage.words is None:
            continue
        try:
            check_words(stage.words, runs[: number - 1])
        except VitdsError as error:
            raise type(error)(f"stage {number} ({stage.run}), before anything ran: {error}") from None


def check_training(command: Command, flags: TrainFlags, made: Sequence[Path]) -> None:
    """What can be known of a training before it starts: its settings, and that its files are there. Of one
    that is finished: that it is the one that is asked for.

    Args:
        command: pretrain or finetune.
        flags: its flags.
        made: run directories of the stages before it, which need not be there yet.
    Raises: SettingsError, DataError; RunError if the run is finished with other settings.
    """
    given = settings_of(command, flags)
    load_ds_config(flags.ds_config)
    if flags.run is not None and (run := Run(Path(flags.run))).is_finished:
        given_settings(run, given, contents_of(given))
        return
    named = [("data.train", name) for name in given.data.train_files]
    for key, name in (*named, ("data.test", given.data.test), ("init", given.init)):
        is_made = name is not None and any(Path(name).is_relative_to(run) for run in made)
        if name not in (None, DIGITS) and not is_made and not Path(name).exists():
            raise DataError(f"{key} {name} is not there, seen from {Path.cwd()}")


def chain(file: str, check_words: CheckWords) -> list[StageResult]:
    """Check and run the stages of a YAML file.

    Args:
        file: the YAML file.
        check_words: see check_stages.
    """
    stages = read_stages(Path(file))
    check_stages(stages, check_words)
    return run_stages(stages)
