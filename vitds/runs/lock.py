"""One writer a run directory.

The lock is fenced: whoever takes it over gets a higher counter, and the one before finds out at its next
write and ends without writing. So a requeued job's ghost never writes beside it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vitds.errors import RunError, RunLockedError

STALE_AFTER_S = (
    600.0  # a holder that cannot be looked at, and has not shown itself for so long, is taken for dead
)
BEAT_S = 60.0  # a holder shows itself so often
SETTLE_S = 0.2  # without flock: the later of two writers has written by then
# What flock says where a file system has no locks: NFS without its lock daemon, some FUSE and overlay mounts.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS)


class RunLock:
    """The lock file of a run directory; it names its holder, and none when released.

    Args:
        run: the run directory; made where it is missing.
        is_new: refuse one that is there.
    Attributes:
        has_flock: False where the file system has no locks; then two starts at one moment are kept from each
            other by the file's content alone.
    Raises: RunLockedError if another live process holds it; RunError if the folder is not writable;
        FileExistsError if `is_new` and the folder is there.
    """

    def __init__(self, run: Path, *, is_new: bool = False) -> None:
        self.path = run / "lock"
        self.has_flock = True
        self.made: list[Path] = []
        self.holder = own_process()
        self._is_over = threading.Event()
        try:
            self._make_folder(run, is_new)
            with self._opened() as content:
                if content.get("host") and self._is_alive(content):
                    raise RunLockedError(self._in_use(content))
                self.holder["counter"] = content.get("counter", 0) + 1
                self._write(self.holder)
            if not self.has_flock:
                time.sleep(SETTLE_S)
                if (other := self._read()) != self.holder:
                    raise RunLockedError(self._in_use(other))
        except FileExistsError:
            raise
        except OSError as error:
            raise RunError(
                f"the run directory {run} is not writable: {error.strerror}. Use another --run."
            ) from error
        threading.Thread(target=self._show_life, daemon=True).start()

    def check(self) -> None:
        """Call before every write to the run.

        Raises: RunLockedError if another process has taken the run over.
        """
        if self._read() != self.holder:
            raise RunLockedError(
                f"{self.path.parent} was taken over by another process; this one stops without writing."
            )

    def release(self) -> None:
        """Give the run back; harmless if it was taken over."""
        self._is_over.set()
        if self.path.exists() and self._read() == self.holder:
            self._write({"counter": self.holder["counter"]})

    def discard(self) -> None:
        """Remove the folders that were made for this lock, with what is in the run's.

        Harmless if there were none.
        """
        self._is_over.set()
        if self.path.parent not in self.made or self._read() != self.holder:
            return
        shutil.rmtree(self.path.parent, ignore_errors=True)
        for folder in reversed(self.made):
            with contextlib.suppress(OSError):  # not empty: others have runs there, or it is gone already
                folder.rmdir()

    def _make_folder(self, run: Path, is_new: bool) -> None:
        """The folder and those above it; `made` lists the new ones."""
        for folder in (*reversed(run.parents), run):
            if folder.is_dir() and not (is_new and folder == run):
                continue
            try:
                folder.mkdir()
                self.made.append(folder)
            except FileExistsError:  # another start was quicker, or a file has this name
                if is_new and folder == run:
                    raise
                if not folder.is_dir():
                    raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)) from None

    def _show_life(self) -> None:
        """Others see by the file's time that this holder lives, also those who cannot look at its process."""
        while not self._is_over.wait(BEAT_S) and self._read() == self.holder:
            with contextlib.suppress(OSError):
                os.utime(self.path)

    def _is_alive(self, content: dict[str, Any]) -> bool:
        own = self.holder
        is_same_job = own["job"] is not None and content.get("job") == own["job"]
        if is_same_job and content.get("restart", 0) < own["restart"]:
            return False  # the same job, requeued: what held the lock before is its ghost
        if _can_be_looked_at(content, own):
            return is_running(content["pid"], content["ticks"])
        return self._silent_s() < STALE_AFTER_S

    def _silent_s(self) -> float:
        """Seconds since the holder last showed itself, by the file system's own clock."""
        with tempfile.TemporaryFile(dir=self.path.parent) as probe:
            return os.fstat(probe.fileno()).st_mtime - self.path.stat().st_mtime

    def _in_use(self, content: dict[str, Any]) -> str:
        own = self.holder
        where = f"process {content.get('pid')} on {content.get('host')}"
        if (content.get("host"), content.get("space")) != (own["host"], own["space"]):
            minutes = STALE_AFTER_S / 60
            where += ", which cannot be looked at from here and counts as gone "
            where += f"{minutes:.0f} minutes after its last sign"
        return (
            f"{self.path.parent} is in use by {where}. Wait for it to end, or use another --run. If you are "
            f"sure that it is gone, delete {self.path}."
        )

    @contextmanager
    def _opened(self) -> Iterator[dict[str, Any]]:
        """The content, while no other process on a file system with working flock can take the lock."""
        with open(self.path, "a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                self.has_flock = False
            yield self._read()

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(self.path.read_text() or "{}")
        except (OSError, ValueError):
            return {}
        return content if isinstance(content, dict) else {}

    def _write(self, content: dict[str, Any]) -> None:
        with open(self.path, "r+") as file:  # in place: a rename would leave the flock on the old file
            file.truncate(0)
            file.write(json.dumps(content))
            file.flush()
            os.fsync(file.fileno())


def is_held(run: Path) -> bool:
    """Whether a live process writes to a run; nothing is taken or written.

    A holder that cannot be looked at counts as live for STALE_AFTER_S after its last sign, by this machine's
    clock.
    """
    path = run / "lock"
    try:
        content = json.loads(path.read_text() or "{}")
        if not content.get("host"):
            return False
        if _can_be_looked_at(content, own_process()):
            return is_running(content["pid"], content["ticks"])
        return time.time() - path.stat().st_mtime < STALE_AFTER_S
    except (OSError, ValueError, AttributeError, KeyError):
        return False  # no lock, or nothing that a holder wrote


def _can_be_looked_at(content: dict[str, Any], own: dict[str, Any]) -> bool:
    """Whether a lock's holder is in this process space of this host."""
    return bool(own["space"]) and (content["host"], content.get("space")) == (own["host"], own["space"])


def next_run(recipe: str, root: Path = Path("runs")) -> RunLock:
    """Make runs/<recipe>-<n> with the next free number and take it.

    Of starts at one moment each gets its own.

    Raises: RunError if it cannot be made.
    """
    name = Path(recipe).stem
    numbers = [
        path.name.removeprefix(f"{name}-") for path in root.glob("*") if path.name.startswith(f"{name}-")
    ]
    number = max((int(text) for text in numbers if text.isdigit()), default=0)
    while True:
        number += 1
        with contextlib.suppress(FileExistsError):
            return RunLock(root / f"{name}-{number}", is_new=True)


def own_process() -> dict[str, Any]:
    """Who holds a lock: this process, where its number means something, and the Slurm job it belongs to."""
    restart = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "host": socket.gethostname(),
        "space": process_space(),
        "pid": os.getpid(),
        "ticks": _start_ticks(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID") or None,
        "restart": int(restart) if restart.isdigit() else 0,
    }


def process_space() -> str | None:
    """The running kernel, and which of its process spaces: only there is a process known by its number.

    Containers number their processes anew, and may have the name of their host, or of each other.
    Returns: None where the system does not say.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return None


def is_running(pid: int, ticks: int | None) -> bool:
    """Whether the process that once had this number and this start is still there.

    Args:
        pid: of this process space.
        ticks: its start, as `own_process` noted it.
    """
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's, who may also hide it in /proc
    now = _start_ticks(pid)
    return ticks is None or now is None or now == ticks


def _start_ticks(pid: int) -> int | None:
    """When a process began, in ticks since the machine did: unlike its time, no change of the clock moves it.

    Returns: 0 for one that has ended and waits for its parent; None where the system does not say.
    """
    try:
        # The second field is the command's name in brackets, which may hold blanks and brackets itself.
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return 0 if state in "ZX" else int(rest[18])
    except (OSError, ValueError, IndexError):
        return None
