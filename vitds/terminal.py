"""Standard output and error, whatever is behind them: readers that leave, closed terminals, encodings."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from typing import Any

# The pipe's reader left (`| head`), the terminal closed, or the stream was never open.
READER_IS_GONE = (errno.EPIPE, errno.EIO, errno.EBADF)


def say(text: str, *, end: str = "\n") -> None:
    """Print to standard output at once. Whatever goes wrong with that, it ends no work."""
    if sys.stdout is None:
        return
    try:
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        print(text.encode(encoding, "backslashreplace").decode(encoding), end=end, flush=True)
    except OSError as error:
        if error.errno in READER_IS_GONE:
            send_nowhere(sys.stdout)
    except ValueError:  # the stream was closed
        pass


def send_nowhere(stream: Any) -> None:
    """Lose what is in the stream's buffer and whatever comes: it must not fail once more at the end."""
    with contextlib.suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


class _PatientFile(io.FileIO):
    """A standard stream that outlives its reader: what is written from then on goes nowhere."""

    def write(self, data: bytes) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in READER_IS_GONE:
                raise
            send_nowhere(self)
            return len(data)


def prepare_streams() -> None:
    """Make this process's standard streams such that no print of any library ends a command.

    Letters that the encoding lacks become escapes, and what a reader that left does not take is lost. A
    stream that somebody has replaced, as a test does, stays.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Closed, as by `>&-`: the next file to be opened would get its number, and what is printed.
            os.open(os.devnull, os.O_RDWR)
    sys.stdout = _patient(sys.stdout, sys.__stdout__, 1)
    sys.stderr = _patient(sys.stderr, sys.__stderr__, 2)


def _patient(stream: Any, original: Any, number: int) -> Any:
    if stream is not original:
        return stream
    old = stream if isinstance(stream, io.TextIOWrapper) else None
    if old is not None:
        old.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_PatientFile(number, "w", closefd=False)),
        encoding=old.encoding if old else "utf-8",
        errors="backslashreplace",
        line_buffering=number == 2 or bool(old and old.line_buffering),
        write_through=bool(old and old.write_through),
    )
