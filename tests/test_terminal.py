"""What is behind standard output and error: readers that leave, closed streams, old encodings, a machine that
lacks things.
"""

from __future__ import annotations

import errno
import multiprocessing.synchronize
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.table import Table

from vitds import terminal
from vitds.cli import COMMANDS, main
from vitds.console import lacking
from vitds.engine.live import _LastingConsole
from vitds.report.table import show
from vitds.terminal import say

ROOT = Path(__file__).parents[1]
# A command that prints more than a pipe holds, then says on standard error that it came to its end.
TALKER = """
import sys
from vitds.console import run_command
from rich.console import Console

def talk() -> None:
    '''Talk.'''
    for number in range(20_000):
        print("\\u2026 ", number)
    Console().print("drawn by rich \\u2026")
    print("through", file=sys.stderr)

sys.exit(run_command({"talk": talk, "pretrain": talk}, [sys.argv[1]]))
"""


def shell(words: str, **variables: str) -> subprocess.CompletedProcess:
    """bash with `talk` as the command above."""
    talk = f'talk() {{ {sys.executable} -c "$TALKER" "${{1:-talk}}"; }}; {words}'
    environment = os.environ | {"TALKER": TALKER} | variables
    return subprocess.run(["bash", "-c", talk], cwd=ROOT, env=environment, capture_output=True, text=True)


def test_a_reader_that_leaves_ends_no_command() -> None:
    done = shell("talk | head -n 3 >/dev/null; exit ${PIPESTATUS[0]}")
    assert (done.returncode, done.stderr) == (0, "through\n")


def test_both_streams_may_lose_their_reader() -> None:
    assert shell("talk 2>&1 | head -n 3 >/dev/null; exit ${PIPESTATUS[0]}").returncode == 0


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_end_no_command(closed: str) -> None:
    assert shell(f"talk {closed}").returncode == 0


@pytest.mark.parametrize(
    "variables",
    [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"},
     {"PYTHONIOENCODING": "latin-1:strict"}],
    ids=str,
)  # fmt: skip
def test_letters_that_the_encoding_lacks_become_escapes(variables: dict[str, str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", TALKER, "talk"], cwd=ROOT, env=os.environ | variables, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"\\u2026  19999\n" in done.stdout and b"drawn by rich" in done.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no full device here")
@pytest.mark.parametrize(("name", "status"), [("talk", 6), ("pretrain", 0)])
def test_output_that_a_full_disk_did_not_take_is_an_error_but_of_a_training(name: str, status: int) -> None:
    done = shell(f"talk {name} >/dev/full")
    assert done.returncode in (status, 6) and "No space left on device" in done.stderr
    assert "Exception ignored" not in done.stderr and "Traceback" not in done.stderr


def test_saying_ends_no_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w", closefd=True) as broken, open(tmp_path / "closed", "w") as closed:
        closed.close()
        gone_on_after = []
        for stream in (broken, closed, None):
            monkeypatch.setattr(sys, "stdout", stream)
            say("nobody hears this")
            say("nor this")
            gone_on_after.append(stream)
    assert gone_on_after == [broken, closed, None]


def test_a_table_is_drawn_in_an_encoding_without_its_lines(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    table = Table("ü", title="a table")
    table.add_row("…")
    with open(tmp_path / "out", "w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        show(table)
    assert r"\u2026" in (tmp_path / "out").read_text() and r"\xfc" in (tmp_path / "out").read_text()


def test_names_with_brackets_stand_in_a_table_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("[1]", title="of runs/[b]")
    for name in ("wolf [grey]", "[/b]", ":dog:"):
        table.add_row(name)
    show(table)
    shown = capsys.readouterr().out
    assert all(name in shown for name in ("[1]", "runs/[b]", "wolf [grey]", "[/b]", ":dog:"))


def test_the_bar_goes_silent_where_its_reader_leaves() -> None:
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as broken:
        console = _LastingConsole(file=broken)
        console.print("nobody hears this")
        assert console.quiet
        terminal.send_nowhere(broken)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            OSError(errno.EMFILE, "Too many open files", "x"),
            "x: Too many open files; raise the limit of open files",
        ),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device; free some disk"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), "x: Permission denied; write elsewhere"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "x: Read-only file system; write elsewhere"),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "x"), "x: Is a directory; check the path"),
        (MemoryError(), "out of memory; end other programs"),
    ],
    ids=str,
)
def test_what_the_machine_lacks_is_no_fault_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    def fail() -> None:
        """Fail."""
        raise error

    monkeypatch.setitem(COMMANDS, "fail", fail)
    assert main(["fail"]) == 6
    assert capsys.readouterr().err.startswith(f"vitds fail: {said}")
    assert not lacking(FileNotFoundError(errno.ENOENT, "No such file"))


def test_shared_memory_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_semaphore(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(multiprocessing.synchronize._multiprocessing, "SemLock", no_semaphore)
    with pytest.raises(OSError) as caught:
        multiprocessing.get_context("spawn").Lock()
    assert lacking(caught.value).startswith(
        "shared memory (/dev/shm) cannot be used: Read-only file system. Mount it"
    )


def test_a_low_limit_of_open_files_is_raised_as_far_as_it_may_be() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        assert main(["recipes"]) == 0
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(4096, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_the_version_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("vitds 0.")
