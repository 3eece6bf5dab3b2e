"""Work in other processes: results in order, errors at the caller, no process left behind."""

from __future__ import annotations

import functools
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vitds.data.workers import stops_in_order, work_through
from vitds.errors import DataError, ResourceError


def slow_square(number: int) -> int:
    time.sleep(0.002 * (number % 3))
    return number * number


def note(path: Path, number: int) -> None:
    with path.open("a") as file:
        file.write(".")


def refuse_ninety(number: int) -> int:
    if number == 90:
        raise DataError(f"{number} is refused")
    return number


def die_at_ninety(number: int) -> int:
    if number == 90:
        os._exit(9)
    return number


@pytest.mark.parametrize("workers", [1, 2, None])
def test_results_come_in_order_with_their_items(workers):
    assert list(work_through(slow_square, range(250), workers=workers)) == [
        (number, number * number) for number in range(250)
    ]


def test_only_a_bounded_number_of_results_waits(tmp_path):
    taken = work_through(functools.partial(note, tmp_path / "done"), range(10_000), workers=2)
    assert [next(taken)[0] for _ in range(5)] == [0, 1, 2, 3, 4]
    time.sleep(
        0.5
    )  # the workers go on as far as they may: 2 tasks of 8 each, beside the one that is being taken
    assert 5 <= (tmp_path / "done").stat().st_size <= 5 * 8
    taken.close()  # ends in order, long before ten thousand are done


def test_an_error_of_the_function_reaches_the_caller():
    with pytest.raises(DataError, match="90 is refused"):
        list(work_through(refuse_ninety, range(200), workers=2))


def test_the_death_of_a_worker_is_an_error_and_not_a_wait():
    with pytest.raises(
        ResourceError,
        match=r"a worker process died: out of memory \(try fewer `workers`\), or, where a script",
    ):
        list(work_through(die_at_ninety, range(200), workers=2))


SHOWN = """
from vitds.data.workers import stops_in_order, work_through
list(work_through(abs, range(20), workers=1, title="building x.beton", show_progress=True))
"""


def test_progress_with_counts_and_time_left_is_shown_on_a_terminal_and_nowhere_else():
    terminal, its_end = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120"}
    subprocess.run([sys.executable, "-c", SHOWN], stderr=its_end, env=environment, timeout=60, check=True)
    os.close(its_end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert (
        "building x.beton" in shown
        and "20/20" in shown
        and "left 0:00:00" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    )
    piped = subprocess.run([sys.executable, "-c", SHOWN], capture_output=True, timeout=60, check=True)
    assert piped.stderr == piped.stdout == b""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_to_end_is_a_ctrl_c_unless_it_is_heard_or_ignored(number):
    before = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(KeyboardInterrupt), stops_in_order(), stops_in_order():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_DFL
        signal.signal(number, signal.SIG_IGN)
        with stops_in_order():
            signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
