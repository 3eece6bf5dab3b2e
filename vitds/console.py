"""One command out of a table: found, explained, run, and its error put into one message and an exit status."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Mapping, Sequence

from vitds.config.names import did_you_mean
from vitds.errors import ResourceError, SettingsError, UsageError, VitdsError
from vitds.launcher import Place, read_place
from vitds.words import Command, call_command, help_text, table_text

HELP = ("--help", "-h")
Commands = Mapping[str, Command]


def run_command(commands: Commands, words: Sequence[str]) -> int:
    """Run the command that the first words name, or print help.

    Args:
        commands: `data build` and the like, in the order in which help lists them.
    Returns: 0, or the exit code of the error that was printed: vitds/errors.py lists them; 1 for a fault of ours, 130 after Ctrl-C.
    """
    is_debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    name = "vitds"
    try:
        if not words or words[0] in HELP:
            print(overview(commands))
            return 0
        name, function, rest = find_command(commands, words)
        if function is None:
            print(overview(commands, words[0]))
        elif any(word in HELP for word in rest):
            print(help_text(function, name))
        else:
            call_command(function, rest, name)
        return 0
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except VitdsError as error:
        _report(name, error, str(error), is_debug)
        return error.exit_code
    except Exception as error:
        _report(
            name,
            error,
            f"unexpected {type(error).__name__}: {error}. This is a fault of vitds; --debug shows where",
            is_debug,
        )
        return 1


def find_command(commands: Commands, words: Sequence[str]) -> tuple[str, Command | None, Sequence[str]]:
    """`vitds data build`, its function and the other words; no function for a group whose help is asked for.

    Raises: UsageError if there is no such command (names the nearest), or a group is left without one.
    """
    two, one = " ".join(words[:2]), words[0]
    group = [name.split()[1] for name in commands if name.startswith(f"{one} ")]
    has_second = len(words) > 1 and not words[1].startswith("-")
    if has_second and two in commands:
        return f"vitds {two}", commands[two], words[2:]
    if has_second and group:
        raise UsageError(f"{two}: unknown command; {did_you_mean(words[1], group)}")
    if one in commands:
        return f"vitds {one}", commands[one], words[1:]
    if not group:
        raise UsageError(
            f"{one}: unknown command; {did_you_mean(one, {name.split()[0] for name in commands})}"
        )
    if not any(word in HELP for word in words):
        raise UsageError(f"{one} needs one of {', '.join(group)}; see vitds {one} --help")
    return f"vitds {one}", None, []


def overview(commands: Commands, group: str = "") -> str:
    """Every command, or those of a group, with the first line of its help."""
    rows = [
        (f"vitds {name}", command.__doc__.partition("\n")[0])
        for name, command in commands.items()
        if not group or name.startswith(f"{group} ")
    ]
    about = "" if group else "Train Vision Transformers from scratch on the images you have.\n\n"
    return f"{about}{table_text(rows)}\n\nvitds COMMAND --help tells more."


def _report(name: str, error: Exception, text: str, is_debug: bool) -> None:
    """One message on standard error.

    All ranks of a node read the same words and settings: for mistakes in those its first rank speaks for all. What went wrong on
    rank 0 alone is told by it.
    """
    if getattr(error, "is_reported_by_main", False):
        return
    is_shared = isinstance(error, UsageError | SettingsError)
    try:
        place = read_place(os.environ)
    except ResourceError:  # variables that make no rank: this process speaks for itself
        place = Place()
    if is_shared and place.local_rank != 0:
        return
    if is_debug:
        traceback.print_exception(error)
    rank = "" if is_shared or place.ranks == 1 else f" (rank {place.rank})"
    print(f"{name}{rank}: {text}", file=sys.stderr)
