"""Signals that ask a run to stop: noted when they come, obeyed at the end of the step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

# HUP comes when a terminal closes: as good a reason to save and stop as TERM.
STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)


class StopSignals:
    """While entered, the first stopping signal is noted in `noted`; handlers are put back on leaving.

    Python lets only a process's main thread handle signals; in another thread this notes nothing.
    """

    def __init__(self) -> None:
        self.noted: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            # Under nohup a terminal may close: it has HUP ignored, which stays so.
            is_ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            heard = [number for number in STOPPING if not (number == signal.SIGHUP and is_ignored)]
            self._before = {number: signal.signal(number, self._note) for number in heard}
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        """A second Ctrl-C ends at once; a TERM after it, as DeepSpeed's launcher sends, does not."""
        if self.noted == number == signal.SIGINT:
            raise KeyboardInterrupt
        self.noted = self.noted or number
