"""This process as one rank: group, device, threads, its launcher's life, and where the libraries' noise goes."""

from __future__ import annotations

import atexit
import contextlib
import datetime
import io
import logging
import os
import re
import signal
import socket
import subprocess
import threading
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import deepspeed.ops
import psutil
import torch
import torch.distributed as td

from vitds import dist
from vitds.errors import ResourceError

# DeepSpeed compiles its shared-memory collectives at every first start on a CPU, for 40 s and unasked; gloo serves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False

# Asked for by torch's deterministic mode, and read when cuBLAS is first used, which is before a run's settings are resolved.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# What a launcher puts into its ranks' environment, and how many processes above them belong to it: `deepspeed` starts a second one.
LAUNCHERS = {"CROSS_RANK": 2, "TORCHELASTIC_RUN_ID": 1}
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)  # NCCL's own is ten, less than what watchdog.py waits
MEETING_TIMEOUT = datetime.timedelta(
    minutes=5
)  # a rank that was killed in its start comes never; imports from a slow disk take a minute
TIME_TO_SAVE_S = 60.0  # a rank without launcher finishes its step and saves; after this time it ends as it is


def start_ranks() -> torch.device:
    """Join the process group that the launcher's or Slurm's variables describe, or make one of a single rank.

    Returns: the training device.
    Raises: ResourceError if the group's port is taken, a peer does not come, or the first node's address cannot be found.
    """
    has_cuda = torch.cuda.is_available()
    if not td.is_initialized():
        adopt_slurm_step()
        end_with_launcher()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    else:
        local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        threads = os.environ.get("SLURM_CPUS_PER_TASK") or len(os.sched_getaffinity(0)) // local_ranks
        torch.set_num_threads(max(1, int(threads)))
    if td.is_initialized():
        return device
    backend = "cuda:nccl,cpu:gloo" if has_cuda else "gloo"
    try:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            _meet(backend)
        else:
            td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:  # torch's own kinds of it, and gloo's plain one
        port = int(os.environ.get("MASTER_PORT") or 29500)
        raise ResourceError(
            f"the ranks could not meet on {os.environ.get('MASTER_ADDR')} port {port}: {str(error).splitlines()[0]}. Either one ended "
            f"before, and says why itself, or another run uses the port: then give this one its own: deepspeed --master_port {port + 1} "
            f"..., or under Slurm MASTER_PORT={port + 1}"
        ) from error
    return device


def _meet(backend: str) -> None:
    """The launcher's ranks become a group. Its collectives, and the store behind them, may wait longer than the ranks do for each other."""
    store, rank, ranks = next(td.rendezvous("env://", timeout=MEETING_TIMEOUT))
    td.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=MEETING_TIMEOUT)
    store.set_timeout(COLLECTIVE_TIMEOUT)
    set_timeout = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout  # before torch 2.14
    set_timeout(COLLECTIVE_TIMEOUT)


def leave_ranks_at_exit() -> None:
    """Called when all ranks are through: the group's threads end before the interpreter does, whose own end of them can abort."""
    atexit.register(lambda: td.is_initialized() and td.destroy_process_group())


def adopt_slurm_step() -> None:
    """Translate Slurm's variables into RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_SIZE, MASTER_ADDR and MASTER_PORT, in a step of several tasks.

    A batch shell and salloc's shell are no such step, though they too carry SLURM_PROCID and SLURM_NTASKS: a command there is one
    rank. Does nothing where a launcher has set RANK; MASTER_ADDR and MASTER_PORT that are set stay.
    Raises: ResourceError if the first node's address cannot be found.
    """
    env = os.environ
    if (
        "RANK" in env
        or "SLURM_STEP_ID" not in env
        or int(env.get("SLURM_STEP_NUM_TASKS", 1)) < 2
        or _is_in_shell_of_job()
    ):
        return
    gpus = torch.cuda.device_count()  # with --gpus-per-task a task sees its own alone, as number 0
    env["LOCAL_RANK"] = str(int(env["SLURM_LOCALID"]) % gpus if gpus else env["SLURM_LOCALID"])
    env["LOCAL_SIZE"] = str(len(env["SLURM_GTIDS"].split(",")))
    if "MASTER_ADDR" not in env:
        env["MASTER_ADDR"] = _address_of_first(env["SLURM_STEP_NODELIST"])
    env.setdefault("MASTER_PORT", str(20000 + int(env["SLURM_JOB_ID"]) % 20000))
    env["WORLD_SIZE"], env["RANK"] = env["SLURM_STEP_NUM_TASKS"], env["SLURM_PROCID"]


def _is_in_shell_of_job() -> bool:
    """sbatch, called within a step, hands the step's variables on to its batch shell; the title of the slurmstepd above tells."""
    titles = [
        " ".join(process.cmdline())
        for process in psutil.Process().parents()
        if process.name().startswith("slurmstepd")
    ]
    return any(title.endswith((".batch]", ".interactive]")) for title in titles)


def _address_of_first(nodes: str) -> str:
    """The first node's name, or, where names of nodes do not resolve, the address that Slurm itself uses."""
    try:
        name = _scontrol("hostnames", nodes).split()[0]
        try:
            socket.getaddrinfo(name, None)
            return name
        except socket.gaierror:
            return re.search(r"NodeAddr=(\S+)", _scontrol("node", name, "--oneliner")).group(1)
    except (OSError, subprocess.CalledProcessError) as error:
        raise ResourceError(
            f"the first node of {nodes} cannot be looked up ({error}); set MASTER_ADDR to its address"
        ) from error


def _scontrol(*words: str) -> str:
    return subprocess.run(
        ["scontrol", "show", *words], check=True, capture_output=True, text=True, timeout=60
    ).stdout


def end_with_launcher() -> None:
    """End this process when its launcher dies, be it by kill -9: a TERM to itself, so that a training run saves first.

    The launchers do not see to it: a killed one leaves its ranks running. Does nothing where no launcher is.
    """
    above = next((count for sign, count in LAUNCHERS.items() if sign in os.environ), 0)
    if above:
        threading.Thread(target=_watch, args=(psutil.Process().parents()[:above],), daemon=True).start()


def _watch(launchers: list[psutil.Process]) -> None:
    while not any(map(_is_gone, launchers)):
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(TIME_TO_SAVE_S)
    os.kill(os.getpid(), signal.SIGKILL)


def _is_gone(launcher: psutil.Process) -> bool:
    """Dead; or dead before this process looked, which then has the system's first process above it."""
    try:
        is_adopted = launcher.pid == 1 and not re.search("deepspeed|torch", " ".join(launcher.cmdline()))
        return is_adopted or not launcher.is_running() or launcher.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@contextlib.contextmanager
def noise_into(log: Path) -> Iterator[None]:
    """Send what DeepSpeed, FFCV and torch say (loggers, warnings, bare prints) to a file; our own words go around it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter(f"[rank {dist.rank()}] %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "torch", "vitds", "py.warnings")]
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.handlers, logger.propagate = [handler], False
    logging.captureWarnings(True)
    warnings.simplefilter("default")
    try:
        with contextlib.redirect_stdout(_ToLog(handler)):
            yield
    finally:
        logging.captureWarnings(False)
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
        handler.close()


class _ToLog(io.TextIOBase):
    """A standard output that ends in the log file."""

    def __init__(self, handler: logging.FileHandler) -> None:
        self.handler = handler

    def write(self, text: str) -> int:
        if text.strip():
            self.handler.stream.write(text.rstrip("\n") + "\n")
            self.handler.flush()
        return len(text)
