"""One command out of a table: found, explained, run; its error becomes one message and an exit status."""

from __future__ import annotations

import errno
import os
import resource
import sys
import traceback
from collections.abc import Mapping, Sequence

from vitds import __version__
from vitds.config.names import did_you_mean
from vitds.errors import ResourceError, SettingsError, UsageError, VitdsError
from vitds.launcher import Place, read_place
from vitds.terminal import prepare_streams, send_nowhere
from vitds.words import Command, call_command, help_text, table_text

HELP = ("--help", "-h")
LEAVE_A_RUN = ("vitds pretrain", "vitds finetune")  # what they print is in the run directory too
ENOUGH_FILES = 4096
# What a machine may lack anywhere, and what to do about it.
LACKS = {
    **dict.fromkeys(
        (errno.EMFILE, errno.ENFILE), "raise the limit of open files (`ulimit -n 4096`) or use fewer ranks"
    ),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), "free some disk, or write elsewhere"),
    **dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), "write elsewhere, or get the permission"),
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP), "check the path"),
    errno.ENOMEM: "end other programs, or take less of the data at once",
    errno.EIO: "the disk is faulty, or no longer there",
    errno.ENOSYS: "this system lacks it",
}
Commands = Mapping[str, Command]


def run_command(commands: Commands, words: Sequence[str]) -> int:
    """Run the command that the first words name, or print help.

    Args:
        commands: `data build` and the like, in the order in which help lists them.
        words: of the command line.
    Returns: 0, or the exit code of the error that was printed: vitds/errors.py lists them; 1 for a fault of
        ours, 130 after Ctrl-C.
    """
    prepare_streams()
    _allow_many_files()
    status, name = _run(commands, words)
    try:
        sys.stdout.flush()
    except OSError as error:
        print(f"{name}: what it printed is lost: {error.strerror}", file=sys.stderr)
        send_nowhere(sys.stdout)
        if name not in LEAVE_A_RUN:
            status = status or ResourceError.exit_code
    return status


def _run(commands: Commands, words: Sequence[str]) -> tuple[int, str]:
    """The exit status, and the command's whole name."""
    is_debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    if len(words) > 1 and words[0] in HELP:
        words = [*words[1:], HELP[0]]
    name = "vitds"
    try:
        if list(words) == ["--version"]:
            print(f"vitds {__version__}")
        elif not words or words[0] in HELP:
            print(overview(commands))
        else:
            name, function, rest = find_command(commands, words)
            if function is None:
                print(overview(commands, words[0]))
            elif any(word in HELP for word in rest):
                print(help_text(function, name))
            else:
                call_command(function, rest, name)
        return 0, name
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130, name
    except VitdsError as error:
        _report(name, error, str(error), is_debug)
        return error.exit_code, name
    except Exception as error:
        lack = lacking(error)
        fault = f"unexpected {type(error).__name__}: {error}. This is a fault of vitds; --debug shows where"
        _report(name, error, lack or fault, is_debug)
        return ResourceError.exit_code if lack else 1, name


def _allow_many_files() -> None:
    """Raise a low limit of open files as far as it may be: every rank, thread and file of data takes one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = ENOUGH_FILES if hard == resource.RLIM_INFINITY else min(hard, ENOUGH_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def lacking(error: Exception) -> str:
    """What the machine lacks, and what to do, where that is what an error says; else nothing."""
    if isinstance(error, MemoryError):
        return "out of memory; end other programs, or take less of the data at once"
    if not isinstance(error, OSError) or error.errno not in LACKS:
        return ""
    if any("multiprocessing" in frame.filename for frame in traceback.extract_tb(error.__traceback__)):
        # Semaphores between processes lie there; the error itself names no file.
        return (
            f"shared memory (/dev/shm) cannot be used: {error.strerror}. Mount it writable and with some "
            "space (of a container: --shm-size), or use one process, where the command has --workers"
        )
    return f"{f'{error.filename}: ' * bool(error.filename)}{error.strerror}; {LACKS[error.errno]}"


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

    All ranks of a node read the same words and settings: for mistakes in those its first rank speaks for all.
    What went wrong on rank 0 alone is said by it.
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
