"""A rank that hangs says where, and ends, instead of for ever.

It may wait for a file system that does not answer, for a peer that waits elsewhere, or for one that has
ended: gloo's connections break then, NCCL's kernels go on waiting.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
from pathlib import Path

from vitds import dist
from vitds.engine.peers import Peers, write_last_words
from vitds.errors import ResourceError

# For one step, with its save and probes; less than the half hour after which collectives give up in silence.
HUNG_AFTER_S = 1500.0
# Longer than a step with two looks, and than a broken connection takes to be noticed.
LOOKS_FOR_PEERS_AFTER_S = 20.0
LOOKS_EVERY_S = 5.0


class Watchdog:
    """Ends this process when `at` is not called for HUNG_AFTER_S, with the stacks of all threads, or when a
    peer has ended and this rank still waits. Time in which the process was stopped does not count.

    Every waiting rank tells its own; the one that does not stand in a collective is the one to look at.

    Args:
        log: the run's, for the other ranks.
        peers: the other ranks; None where nobody knows of any.
    """

    def __init__(self, log: Path, peers: Peers | None = None) -> None:
        self.log = log
        self.peers = peers
        self.step, self.since, self.is_over = 0, time.monotonic(), threading.Event()
        # A daemon: it must never keep a finished process alive.
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, step: int) -> None:
        """A step begins."""
        self.step, self.since = step, time.monotonic()

    def close(self) -> None:
        """No more steps."""
        self.is_over.set()

    def waits_for(self) -> list[str]:
        """Which peers had ended already a look ago, in a step that takes long; as Peers.ended says it."""
        if self.peers is None or time.monotonic() - self.since < LOOKS_FOR_PEERS_AFTER_S:
            return []
        step = self.step
        # Seen twice: this rank may be about to notice by itself, and says it better.
        if not self.peers.ended() or self.is_over.wait(LOOKS_EVERY_S) or self.step != step:
            return []
        return self.peers.ended()

    def _watch(self) -> None:
        looked = time.monotonic()
        while not self.is_over.wait(pause_s := min(LOOKS_EVERY_S, HUNG_AFTER_S / 4)):
            # Ctrl-Z, `scontrol suspend` and kill -STOP stop this thread, too.
            stopped_s, looked = time.monotonic() - looked - 2 * pause_s, time.monotonic()
            if stopped_s > 0:
                self.since = min(looked, self.since + stopped_s)
            if gone := self.waits_for():
                # As any other end of a rank: no stacks, for this one is not the cause.
                _end(self.peers.end_with("; ".join(gone)))
            if time.monotonic() - self.since > HUNG_AFTER_S:
                text = (
                    f"rank {dist.rank()} hangs: step {self.step} has taken {HUNG_AFTER_S:.0f} s; its threads "
                    "are at"
                )
                # For the ranks that will see only a broken connection.
                write_last_words(self.log, text)
                _end(text, with_stacks=True)


def _end(text: str, *, with_stacks: bool = False) -> None:
    print(text, file=sys.stderr, flush=True)
    if with_stacks:
        faulthandler.dump_traceback()
    # Not sys.exit: the main thread hangs, and no exception would reach it.
    os._exit(ResourceError.exit_code)
