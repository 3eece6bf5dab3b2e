"""Which rank ended, and why, as those that it leaves behind can say.

Each rank knows the others' processes from the start. Whoever ends by an error writes it into the run's
log.txt, which all hosts see; a killed one writes nothing, and those on its host see that it is gone.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from vitds import dist
from vitds.errors import ResourceError
from vitds.runs.lock import is_running, own_process

PEER_IS_GONE = re.compile(
    "connection (closed|reset) by peer|broken pipe|remote process exited", re.IGNORECASE
)
ENDS_WITH = "ends with another:"
# A process's connections end, by which the others notice, a moment before it does; and words travel.
TIME_TO_END_S = 2.0


@dataclass(frozen=True)
class Peer:
    """One rank's process. A pid says nothing outside its host, or its container there.

    Attributes:
        rank: its rank.
        host: the machine's name.
        space: see runs/lock.process_space.
        pid: in that space.
        ticks: see runs/lock.own_process.
    """

    rank: int
    host: str
    space: str | None
    pid: int
    ticks: int | None

    @classmethod
    def own(cls) -> Peer:
        """This process."""
        process = own_process()
        return cls(dist.rank(), process["host"], process["space"], process["pid"], process["ticks"])

    @property
    def name(self) -> str:
        """For a person."""
        return f"rank {self.rank} (process {self.pid} on {self.host})"

    def is_beside(self, other: Peer) -> bool:
        """Whether one can be looked at from the other."""
        # Same host and same process space: only there does a pid mean the same process.
        return self.space is not None and (self.host, self.space) == (other.host, other.space)

    def is_gone(self) -> bool:
        """Ended, also if its parent has not fetched its status yet."""
        return not is_running(self.pid, self.ticks)


class Peers:
    """The other ranks of a session, and its log. Made by all ranks together."""

    def __init__(self, log: Path) -> None:
        self.log, self.own = log, Peer.own()
        # What earlier starts left there is not of these processes.
        self.log_began = log.stat().st_size if log.exists() else 0
        self.others = [peer for peer in dist.gather_objects(self.own) if peer != self.own]
        # Replaced by the job once steps are taken.
        self.when: Callable[[], str] = lambda: "before the first step"

    @contextmanager
    def watched(self, meet_alike: Callable[[Exception], bool]) -> Iterator[Peers]:
        """Around all that the ranks do together.

        Args:
            meet_alike: whether every rank ends by such an error. Then rank 0, which removes a run directory
                that nothing was trained in, leaves last: another rank could make it again.
        Raises: ResourceError in place of what a collective says when another rank ends: names it, and its
            cause.
        """
        try:
            yield self
        except (Exception, KeyboardInterrupt) as error:
            # A broken connection is how the end of another rank looks from here: find out which, and why.
            if isinstance(error, RuntimeError) and PEER_IS_GONE.search(str(error)):  # gloo's and NCCL's
                raise ResourceError(self.end_with(self._cause(error))) from error
            # This rank is the cause: it leaves its words for the others, then ends by its own error.
            self._write_last_words(str(error) or type(error).__name__)
            if dist.is_main() and meet_alike(error):
                self._wait(lambda: len(self.ended()) == len(self.others))
            raise

    def end_with(self, cause: str) -> str:
        """Tell the others that this rank ends with another; returns what it says to the person."""
        self._write_last_words(f"{ENDS_WITH} {cause}")
        return (
            f"{self.when()} {cause.rstrip('.')}. This rank ends with it; once that is mended, the same "
            "command goes on from the last checkpoint"
        )

    @staticmethod
    def _wait(until: Callable[[], bool]) -> None:
        end = time.monotonic() + TIME_TO_END_S
        while not until() and time.monotonic() < end:
            time.sleep(0.02)

    def _write_last_words(self, text: str) -> None:
        if self.others:
            write_last_words(self.log, text)

    def _cause(self, error: RuntimeError) -> str:
        """Who ended and why."""
        # The connection breaks a moment before words and process are gone to see.
        self._wait(lambda: bool(self.ended()))
        if found := self.ended():
            return "; ".join(found)
        # Nobody on this host has ended: it was a rank elsewhere, or the connection alone.
        far = [peer for peer in self.others if not self.own.is_beside(peer)]
        address = re.search(r"\[[^]]+\]:\d+", str(error))
        at = f" at {address.group()}" if address else ""
        ranks = ", ".join(f"{peer.rank} on {peer.host}" for peer in far)
        return f"a rank{at} ended" + (
            f"; those elsewhere cannot be looked at from here: {ranks}" if far else ", or its connection"
        )

    def ended(self) -> list[str]:
        """The ranks that ended, each with its last words.

        Those that ended because of another stand there only where that one is not found.
        """
        words = self._last_words()
        # Those that ended by themselves, and those that ended because of them.
        firsts, others = [], []
        for peer in self.others:
            if (said := words.get((peer.rank, peer.pid))) is not None:
                if said.startswith(ENDS_WITH):
                    others.append(f"{peer.name} says: {said.removeprefix(ENDS_WITH).strip()}")
                else:
                    firsts.append(f"{peer.name} ended: {said}")
            elif self.own.is_beside(peer) and peer.is_gone():
                firsts.append(
                    f"{peer.name} is gone without a message: killed, or out of memory (see the system's log)"
                )
        return firsts or others

    def _last_words(self) -> dict[tuple[int, int], str]:
        """(rank, pid) -> what `write_last_words` wrote since this session began."""
        try:
            with open(self.log, "rb") as file:
                # Only what this session wrote: pids come again, and earlier starts left words too.
                file.seek(self.log_began)
                text = file.read().decode(errors="replace")
        except OSError:
            return {}
        return {
            (int(rank), int(pid)): said
            for rank, pid, said in re.findall(r"^rank (\d+), process (\d+), last words: (.*)$", text, re.M)
        }


def write_last_words(log: Path, text: str) -> None:
    """This rank's last words, a line in the run's log.

    Where it cannot be written, the rank's own message is all there is.
    """
    try:
        with open(log, "a") as file:
            # One line, whatever the text, as the pattern above reads it; appended, as all ranks write here.
            file.write(f"rank {dist.rank()}, process {os.getpid()}, last words: {' '.join(text.split())}\n")
    except OSError:
        pass
