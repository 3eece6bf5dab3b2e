"""`vitds chain`: stages one after the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from vitds.cli.train import finetune, pretrain
from vitds.config.flags import TrainFlags
from vitds.console import find_command
from vitds.errors import UsageError
from vitds.words import call_command, takes


def chain(file: str) -> None:
    """Run stages one after the other.

    Each stage is a run directory: a finished one is skipped, a stopped one goes on.

    Args:
        file: a YAML list of {run: DIRECTORY, command: COMMAND}; each command gets --run DIRECTORY
    """
    from vitds.jobs.chain import chain

    chain(file, _check_stage)


def _check_stage(words: Sequence[str], made: Sequence[Path]) -> None:
    """Raises: what is wrong with a stage's words, by this table of commands; see jobs/chain.check_stages."""
    from vitds.cli import COMMANDS
    from vitds.jobs.chain import check_training

    name, function, rest = find_command(COMMANDS, words)
    if function not in (pretrain, finetune):
        raise UsageError(
            f"{name} makes no run directory. A stage is `vitds pretrain` or `vitds finetune`; both evaluate "
            "at their end"
        )

    @takes(TrainFlags)
    def check(flags: TrainFlags) -> None:
        """Check a training's flags."""
        check_training("pretrain" if function is pretrain else "finetune", flags, made)

    call_command(check, rest, name)
