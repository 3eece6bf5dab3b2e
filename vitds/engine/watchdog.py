"""A rank that hangs says where, and ends, instead of for ever.

It may wait for a file system that does not answer, or for a peer that waits elsewhere.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from vitds import dist
from vitds.engine.peers import write_last_words
from vitds.errors import ResourceError

# For one step, with its save and probes; less than the half hour after which collectives give up in silence.
HUNG_AFTER_S = 1500.0


class Watchdog:
    """Ends this process, with the stacks of all threads, when `at` is not called for HUNG_AFTER_S.

    Every waiting rank tells its own; the one that does not stand in a collective is the one to look at.

    Args:
        log: the run's, for the other ranks.
    """

    def __init__(self, log: Path) -> None:
        self.log = log
        self.step, self.since, self.is_over = 0, time.monotonic(), threading.Event()
        # A daemon: it must never keep a finished process alive.
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, step: int) -> None:
        """A step begins."""
        self.step, self.since = step, time.monotonic()

    def close(self) -> None:
        """No more steps."""
        self.is_over.set()

    def _watch(self) -> None:
        while not self.is_over.wait(min(5.0, HUNG_AFTER_S / 4)):
            if time.monotonic() - self.since > HUNG_AFTER_S:
                text = (
                    f"rank {dist.rank()} hangs: step {self.step} has taken {HUNG_AFTER_S:.0f} s; its threads "
                    "are at"
                )
                print(text, file=sys.stderr, flush=True)
                # For the ranks that will see only a broken connection.
                write_last_words(self.log, text)
                faulthandler.dump_traceback()
                # Not sys.exit: the main thread hangs, and no exception would reach it.
                os._exit(ResourceError.exit_code)
