"""One writer a run directory.

The lock is fenced: whoever takes it over gets a higher counter, and the one before finds out at its next
write and ends without writing. So a requeued job's ghost never writes beside it.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from vitds.errors import RunError, RunLockedError

STALE_AFTER_S = 600.0  # a holder on another host that has not shown itself for so long is taken for dead


class RunLock:
    """The lock file of a run directory: {host, pid, started, job, counter}, empty of a holder when released.

    Raises: RunLockedError if another live process holds it; RunError if the folder is not writable.
    """

    def __init__(self, run: Path) -> None:
        self.path = run / "lock"
        process = psutil.Process()
        self.holder: dict[str, Any] = {
            "host": socket.gethostname(),
            "pid": process.pid,
            "started": process.create_time(),
            "job": os.environ.get("SLURM_JOB_ID"),
        }
        try:
            with self._opened() as content:
                if content.get("host") and self._is_alive(content):
                    where = f"process {content['pid']} on {content['host']}"
                    raise RunLockedError(
                        f"{run} is in use by {where}. Wait for it to end, or use another --run. "
                        f"If you are sure that it is gone, delete {self.path}."
                    )
                self.holder["counter"] = content.get("counter", 0) + 1
                self._write(self.holder)
        except OSError as error:
            raise RunError(
                f"the run directory {run} is not writable: {error.strerror}. Use another --run."
            ) from error

    def check(self) -> None:
        """Call before every write to the run; shows that the holder lives.

        Raises: RunLockedError if another process has taken the run over.
        """
        if self._read() != self.holder:
            raise RunLockedError(
                f"{self.path.parent} was taken over by another process; this one stops without writing."
            )
        os.utime(self.path)

    def release(self) -> None:
        """Give the run back; harmless if it was taken over."""
        if self.path.exists() and self._read() == self.holder:
            self._write({"counter": self.holder["counter"]})

    def _is_alive(self, content: dict[str, Any]) -> bool:
        if (
            content["job"] is not None
            and content["job"] == os.environ.get("SLURM_JOB_ID")
            and "SLURM_RESTART_COUNT" in os.environ
        ):
            return False  # the same job, requeued: what held the lock before is its ghost
        if content["host"] != socket.gethostname():
            return time.time() - self.path.stat().st_mtime < STALE_AFTER_S
        try:
            return abs(psutil.Process(content["pid"]).create_time() - content["started"]) < 1.0
        except psutil.NoSuchProcess:
            return False

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        """The content, while no other process on a file system with working flock can take the lock."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield self._read()

    def _read(self) -> dict[str, Any]:
        try:
            return json.loads(self.path.read_text() or "{}")
        except (OSError, ValueError):
            return {}

    def _write(self, content: dict[str, Any]) -> None:
        with open(self.path, "r+") as file:  # in place: a rename would leave the flock on the old file
            file.truncate(0)
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())
