"""`vitds chain FILE`: stages one after the other, each a run directory; a finished one is skipped, a stopped one goes on.

FILE is YAML: a list of `{run: DIRECTORY, command: "..."}`. The command gets `--run DIRECTORY` and is run without a shell.
"""

from __future__ import annotations

import shlex
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from vitds.config.yaml_text import parse_yaml
from vitds.errors import SettingsError, VitdsError
from vitds.runs.directory import Run


@dataclass(frozen=True)
class Stage:
    """One run and the command that makes it."""

    run: Path
    command: tuple[str, ...]


@dataclass(frozen=True)
class StageResult:
    """A finished stage; seconds of the whole process, 0 if it was finished before."""

    run: Run
    seconds: float


def run_stages(stages: Sequence[Stage]) -> list[StageResult]:
    """Run what is not finished, in order.

    Raises: VitdsError with the stage's exit status if a command fails; the stages before stay finished.
    """
    results = []
    for number, stage in enumerate(stages, 1):
        run, seconds = Run(stage.run), 0.0
        if run.is_finished:
            print(f"stage {number}/{len(stages)}: {stage.run} is finished, skipped", flush=True)
        else:
            command = [*stage.command, "--run", str(stage.run)]
            print(f"stage {number}/{len(stages)}: {shlex.join(command)}", flush=True)
            started = time.perf_counter()
            status = subprocess.run(command).returncode
            seconds = time.perf_counter() - started
            if status or not run.is_finished:
                error = VitdsError(
                    f"stage {number} ({stage.run}) ended with status {status}; its log is {stage.run / 'log.txt'}"
                )
                error.exit_code = status if status > 0 else 1
                raise error
        results.append(StageResult(run, round(seconds, 1)))
    return results


def read_stages(path: Path) -> list[Stage]:
    """The stages of a YAML file.

    Raises: SettingsError if the file is missing or no text, or an entry is not `{run: ..., command: ...}` (names the file and the entry).
    """
    if not path.is_file():
        raise SettingsError(
            f"{path} does not exist; chain takes a YAML list of {{run: DIRECTORY, command: COMMAND}}"
        )
    try:
        entries = parse_yaml(path.read_text("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{path} cannot be read as text: {error}") from error
    if not isinstance(entries, list):
        raise SettingsError(f"{path}: must be a list of stages, each with the keys run and command")
    stages = []
    for number, entry in enumerate(entries, 1):
        if (
            not isinstance(entry, dict)
            or set(entry) != {"run", "command"}
            or not all(isinstance(value, str) for value in entry.values())
        ):
            raise SettingsError(
                f"{path}: stage {number} must have just the keys run and command, both text; got {entry!r}"
            )
        stages.append(Stage(Path(entry["run"]), tuple(shlex.split(entry["command"]))))
    return stages


def chain(file: str) -> list[StageResult]:
    """Run the stages of a YAML file."""
    return run_stages(read_stages(Path(file)))
