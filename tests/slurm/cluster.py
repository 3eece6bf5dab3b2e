"""A real Slurm for tests: its daemons run on this machine, two nodes, all state in a temporary folder
(launch/local_slurm.sh).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OVER = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


class Cluster:
    """Submits from the project's folder, as the scripts' heads say, and waits."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        ours = {
            key: value
            for key, value in os.environ.items()
            if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
        }
        self.environment = ours | {
            "SLURM_CONF": str(folder / "slurm.conf"),
            "PATH": path,
            "OMP_NUM_THREADS": "1",
        }

    def call(self, *words: str) -> str:
        """A command of Slurm; its standard output."""
        done = subprocess.run(
            words, cwd=ROOT, env=self.environment, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def submit(self, log: Path, *words: str) -> str:
        """The number of a job whose output goes to `log`, by `sbatch WORDS`."""
        return self.call("sbatch", "--parsable", f"--output={log}", *words)

    def facts(self, job: str) -> dict[str, str]:
        """State, number of restarts and the like, as scontrol shows them."""
        return dict(re.findall(r"(\w+)=(\S*)", self.call("scontrol", "show", "job", job, "--oneliner")))

    def wait_for(self, job: str, *states: str, log: Path, timeout_s: float = 400) -> dict[str, str]:
        """The facts of a job once it is in one of the states."""
        until = time.monotonic() + timeout_s
        while (facts := self.facts(job))["JobState"] not in states:
            is_over = facts["JobState"] in OVER or time.monotonic() > until
            said = log.read_text() if log.exists() else "no log"
            assert not is_over, f"job {job} is {facts['JobState']}, not {states}:\n{said}"
            time.sleep(0.2)
        return facts

    def wait_for_lines(self, job: str, run: Path, lines: int, log: Path) -> None:
        """Until a running job's run has made so many steps."""
        until = time.monotonic() + 400
        metrics = run / "metrics.jsonl"
        while not metrics.exists() or metrics.read_bytes().count(b"\n") < lines:
            assert time.monotonic() < until, (
                f"job {job} made fewer than {lines} steps in 400 s:\n{log.read_text()}"
            )
            self.wait_for(job, "PENDING", "RUNNING", log=log)
            time.sleep(0.05)


def installed() -> str:
    """Install Slurm where it is missing and that can be done; returns why it is not there, or nothing."""
    if all(
        shutil.which(tool, path="/usr/sbin:/usr/bin:/sbin:/bin")
        for tool in ("munged", "slurmctld", "slurmd", "sbatch")
    ):
        return ""
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        return "Slurm is not installed (Debian: slurm-wlm and munge), and only root with apt can install it"
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for words in (("update",), ("install", "-y", "--no-install-recommends", "slurm-wlm", "munge")):
        command = ("apt-get", "-o", "Acquire::Retries=0", *words)
        try:
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=90)
        except subprocess.TimeoutExpired:
            return f"Slurm is not installed, and apt-get {words[0]} did not end in 90 s"
        if done.returncode:
            last = done.stderr.strip().splitlines()[-1]
            return f"Slurm is not installed, and apt-get {words[0]} failed: {last}"
    return ""


@contextmanager
def started(folder: Path) -> Iterator[Cluster]:
    """A cluster of two nodes, n0 and n1, torn down with all that runs on it, even when this process is
    killed.
    """
    if reason := installed():
        pytest.skip(reason)
    script = str(ROOT / "launch/local_slurm.sh")
    # Takes the cluster down when its standard input ends: when we close it, or when there is no longer a
    # process that holds it.
    words = ["bash", "-c", 'read -r; exec timeout 60 bash "$@"', "guard", script, "down", str(folder)]
    guard = subprocess.Popen(
        words,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    try:
        done = subprocess.run(["bash", script, "up", str(folder)], capture_output=True, text=True, timeout=60)
        assert done.returncode == 0 and done.stdout == f"export SLURM_CONF={folder}/slurm.conf\n", (
            done.stdout + done.stderr
        )
        yield Cluster(folder)
    finally:
        said = guard.communicate(timeout=90)[1]
    assert guard.returncode == 0 and not folder.exists(), said
