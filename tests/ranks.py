"""Real gloo ranks for tests: one pool of processes a world size, kept for the whole session, for a start
costs seconds. Python's fork server makes them, with torch, timm and DeepSpeed loaded, which alone takes ten
seconds of a core a process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TIMEOUT_S = 240
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.engine.training"])


def _serve(rank: int, ranks: int, meeting: str, pipe: Connection) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(ranks),
        "LOCAL_SIZE": str(ranks),
        "DS_ACCELERATOR": "cpu",
    }
    log = os.open(Path(meeting).with_name("output"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch
    import torch.distributed as td

    torch.set_num_threads(1)
    td.init_process_group("gloo", store=td.FileStore(meeting, ranks), rank=rank, world_size=ranks)
    while True:
        task = pipe.recv()
        if task is None:
            break
        function, arguments, options = task
        try:
            pipe.send((True, function(*arguments, **options)))
        except BaseException as error:  # told to the parent, whatever it is
            pipe.send((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}"))
    td.destroy_process_group()


class RankPool:
    """R processes in one process group that call what they are sent."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self.folder = ranks, tempfile.TemporaryDirectory()
        meeting = str(Path(self.folder.name) / "meeting")
        self.log, self.output = Path(self.folder.name) / "output", ""
        self.pipes, self.processes = [], []
        for rank in range(ranks):
            ours, theirs = FORKS.Pipe()
            process = FORKS.Process(target=_serve, args=(rank, ranks, meeting, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> list[Any]:
        """Call a module-level function on every rank at once; returns what each rank returned. `output` is
        what they printed.
        """
        already_said = self._output_size()
        for pipe in self.pipes:
            pipe.send((function, arguments, options))
        outcomes = []
        for rank, pipe in enumerate(self.pipes):
            if not pipe.poll(TIMEOUT_S):
                self.close()
                raise TimeoutError(
                    f"rank {rank} of {self.ranks} did not answer in {TIMEOUT_S} s; others said {outcomes}"
                )
            outcomes.append(pipe.recv())
        with open(self.log, "rb") as file:
            file.seek(already_said)
            self.output = file.read().decode()
        failures = [f"rank {rank}: {value}" for rank, (is_well, value) in enumerate(outcomes) if not is_well]
        if failures:
            raise AssertionError("\n".join([*failures, self.output]))
        return [value for _, value in outcomes]

    def _output_size(self) -> int:
        return self.log.stat().st_size if self.log.exists() else 0

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.join()


class ForkedProgram:
    """A Python function that runs as a program of its own, with what Popen offers of it.

    Args:
        function: of a module; its result is the exit status. It begins in the root of the repository.
        environment: variables beside those of this process.
    """

    def __init__(self, function: Callable[..., int], *arguments: Any, environment: dict[str, str]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.said = Path(self.folder.name) / "stderr"
        self.process = FORKS.Process(
            target=_run_program, args=(function, arguments, dict(os.environ) | environment, str(self.said))
        )
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs; minus the number of a signal that ended it."""
        return self.process.exitcode

    def poll(self) -> int | None:
        """The same."""
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status. Raises: TimeoutError."""
        self.process.join(timeout)
        if self.returncode is None:
            raise TimeoutError(f"process {self.pid} still runs after {timeout} s")
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[None, str]:
        """Nothing, and what it wrote to stderr until its end. Raises: TimeoutError."""
        self.wait(timeout)
        return None, self.said.read_text()

    def send_signal(self, number: int) -> None:
        """To this process alone."""
        os.kill(self.pid, number)

    def kill(self) -> None:
        """At once, if it still runs."""
        self.process.kill()


def _run_program(
    function: Callable[..., int], arguments: tuple[Any, ...], environment: dict[str, str], said: str
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    # multiprocessing ends its processes without the functions of atexit; a program's are called.
    try:
        status = function(*arguments)
    finally:
        atexit._run_exitfuncs()
    sys.exit(status)
