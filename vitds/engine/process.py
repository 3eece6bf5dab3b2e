"""This process as one rank: group, device, threads, its launcher's life, the libraries' noise."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import io
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import deepspeed.ops
import psutil
import torch
import torch.distributed as td

from vitds import dist
from vitds.engine.attention import attention_as_before
from vitds.errors import ResourceError
from vitds.launcher import Place, read_meeting, read_place, whole_number

# DeepSpeed compiles its shared-memory collectives at every first start on a CPU, unasked and for 40 s.
# gloo serves as well. Set whole and not changed: to read it would try every op's builder, with compilers.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}

# What a launcher puts into its ranks' environment, and how many processes above them belong to it:
# `deepspeed` starts a second one.
LAUNCHERS = {"CROSS_RANK": 2, "TORCHELASTIC_RUN_ID": 1}
OF_SLURM_STEP = ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_GTIDS", "SLURM_STEP_NODELIST", "SLURM_JOB_ID")
NO_STEP = (
    "srun sets all of a step's variables. If this is no step of Slurm's, `unset SLURM_STEP_ID` makes it one "
    "process"
)
# NCCL's own is ten, less than what watchdog.py waits.
COLLECTIVE_TIMEOUT = datetime.timedelta(minutes=30)
# A rank that was killed in its start never comes; imports from a slow disk take a minute.
MEETING_TIMEOUT = datetime.timedelta(minutes=5)
# Of mallopt, by malloc.h; older glibc takes no larger block than the second from its heap.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_IN_HEAP, LARGEST_IN_OLD_HEAP, MOST_KEPT = 256 << 20, 32 << 20, 1 << 30
TIME_TO_SAVE_S = 60.0  # a rank without launcher finishes its step and saves; after this time it ends as it is


def start_ranks() -> torch.device:
    """Join the process group that the launcher's or Slurm's variables describe, or make one of a single rank.

    Returns: the training device.
    Raises: ResourceError if the variables make no rank, this machine lacks the rank's GPU, the group's port
        is taken, a peer does not come, or the first node's address cannot be found.
    """
    # Slurm's variables become a launcher's first, so that everything below knows one kind.
    if not td.is_initialized():
        adopt_slurm_step()
    place = read_place(os.environ)
    device = _device(place)
    os.environ["LOCAL_RANK"] = str(place.local_rank)  # DeepSpeed insists on it, also for one rank
    os.environ.pop(
        "OMPI_COMM_WORLD_LOCAL_RANK", None
    )  # and on this being the same, also where it is left over
    # A second run in this process: the group stays.
    if td.is_initialized():
        return device
    if place.is_launched:
        end_with_launcher()
    # NCCL for tensors on GPUs, gloo beside it for objects and tensors on the host.
    backend = "cuda:nccl,cpu:gloo" if device.type == "cuda" else "gloo"
    hook = sys.excepthook
    try:
        if place.ranks > 1:
            _meet(backend, place)
        else:
            # A store within the process: one rank needs no port, and cannot find it taken.
            td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
    except RuntimeError as error:  # torch's own kinds of it, and gloo's plain one
        raise ResourceError(_why_not_met(place, str(error).splitlines()[0])) from error
    finally:
        sys.excepthook = (
            hook  # torch puts [rank0] before every line of every traceback to come, also of a caller's
        )
    return device


@contextlib.contextmanager
def joined_ranks() -> Iterator[torch.device]:
    """`start_ranks` for as long as a run lasts; gives the device that trains.

    What a run sets in this process for itself is set back at its end: a caller's own code may come after it.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    warns_only = torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    threads = torch.get_num_threads()
    linear = torch.nn.functional.linear
    local_rank = os.environ.get("LOCAL_RANK")
    try:
        device = start_ranks()
        if device.type == "cpu":
            keep_freed_memory()
        # The run seeds torch's generators; a caller gets its own back.
        cards = [device.index] if device.type == "cuda" else []
        with torch.random.fork_rng(cards), attention_as_before():
            yield device
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warns_only)
        torch.utils.deterministic.fill_uninitialized_memory = fills
        torch.set_num_threads(threads)
        # DeepSpeed puts its own there for ZeRO-3, which keeps other tensors for the backward pass.
        torch.nn.functional.linear = linear
        if local_rank is None:
            os.environ.pop("LOCAL_RANK", None)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees, for the next one; for the rest of this process.

    It would give activations back to the kernel, which clears their pages anew in the next step: a tenth of
    a small network's step on a CPU.
    """
    libc = ctypes.CDLL(None)
    if not libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_HEAP):
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST_IN_OLD_HEAP)
    libc.mallopt(M_TRIM_THRESHOLD, MOST_KEPT)


def _device(place: Place) -> torch.device:
    """The rank's GPU, or the CPU with the rank's share of the cores."""
    if torch.cuda.is_available():
        if place.local_rank >= (found := torch.cuda.device_count()):
            raise ResourceError(
                f"LOCAL_RANK={place.local_rank}, but torch sees {found} GPU(s) here "
                f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')}). Start one rank a GPU"
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
        return device
    torch.set_num_threads(own_cores(place))
    return torch.device("cpu")


def own_cores(place: Place) -> int:
    """The cores that are this rank's alone: of those that it may use, its share; at least 1."""
    # Under a batch system a process may use fewer than the machine has.
    usable = len(os.sched_getaffinity(0))
    of_task = os.environ.get("SLURM_CPUS_PER_TASK", "")
    # Slurm says a task's own cores. A launcher's ranks share the host's.
    return max(1, min(usable, int(of_task)) if of_task.isdigit() else usable // place.local_ranks)


def _why_not_met(place: Place, said: str) -> str:
    if place.ranks == 1:
        return f"torch makes no process group of this one process: {said}. Is a GLOO_ or NCCL_ variable set?"
    address, port = read_meeting(os.environ)
    return (
        f"the ranks could not meet on {address} port {port}: {said}. Either one ended before, and says why "
        "itself, or another run uses the port: then give this one its own: deepspeed --master_port "
        f"{port % 65535 + 1} ..., or under Slurm MASTER_PORT={port % 65535 + 1}"
    )


def _meet(backend: str, place: Place) -> None:
    """The launcher's ranks become a group.

    Its collectives, and the store behind them, may wait longer than the ranks do for each other.
    """
    read_meeting(os.environ)
    # What init_process_group("env://") does, in two steps, because the store has a timeout of its own.
    store, rank, ranks = next(td.rendezvous("env://", timeout=MEETING_TIMEOUT))
    td.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=MEETING_TIMEOUT)
    # From here on a rank may have to wait for another's save or probes, longer than for its start.
    store.set_timeout(COLLECTIVE_TIMEOUT)
    wait_for_slow_ranks()


def wait_for_slow_ranks() -> None:
    """COLLECTIVE_TIMEOUT for every group that there is; DeepSpeed makes its own ones without any."""
    set_timeout = getattr(td, "set_timeout", None) or td.distributed_c10d._set_pg_timeout  # before torch 2.14
    # torch has no public list of them.
    for group in td.distributed_c10d._world.pg_map:
        set_timeout(COLLECTIVE_TIMEOUT, group)


def leave_ranks_at_exit() -> None:
    """Called when all ranks are through: the group's threads end before the interpreter does.

    Its own end of them can abort.
    """
    atexit.register(lambda: td.is_initialized() and td.destroy_process_group())


def adopt_slurm_step() -> None:
    """Translate Slurm's variables into those of a launcher, in a step of several tasks.

    A batch shell and salloc's shell are no such step, though they too carry SLURM_PROCID and SLURM_NTASKS: a
    command there is one rank. Does nothing where a launcher has set RANK; MASTER_ADDR and MASTER_PORT that
    are set stay.
    Raises: ResourceError if a variable of the step is missing or wrong, or the first node's address cannot be
        found.
    """
    env = os.environ
    # Not a step of Slurm's, or a launcher within one, which knows better.
    if env.get("RANK") or not env.get("SLURM_STEP_ID") or not env.get("SLURM_STEP_NUM_TASKS"):
        return
    tasks = whole_number(env, "SLURM_STEP_NUM_TASKS", lowest=1, remedy=NO_STEP)
    if tasks < 2 or _is_in_shell_of_job():
        return
    if missing := [name for name in OF_SLURM_STEP if not env.get(name)]:
        raise ResourceError(f"SLURM_STEP_NUM_TASKS={tasks}, but {', '.join(missing)} not set. {NO_STEP}")
    local_rank = whole_number(env, "SLURM_LOCALID", lowest=0, remedy=NO_STEP)
    job = whole_number(env, "SLURM_JOB_ID", lowest=0, remedy=NO_STEP)
    gpus = torch.cuda.device_count()  # with --gpus-per-task a task sees its own alone, as number 0
    env["LOCAL_RANK"] = str(local_rank % gpus if gpus else local_rank)
    env["LOCAL_SIZE"] = str(len(env["SLURM_GTIDS"].split(",")))
    if not env.get("MASTER_ADDR"):
        env["MASTER_ADDR"] = _address_of_first(env["SLURM_STEP_NODELIST"])
    if not env.get("MASTER_PORT"):
        # Each task computes the same port from the job; jobs that share a node differ in it most likely.
        env["MASTER_PORT"] = str(20000 + job % 20000)
    # RANK is last: from there on a second call sees that all is done.
    env["WORLD_SIZE"] = str(tasks)
    env["RANK"] = env["SLURM_PROCID"]


def _is_in_shell_of_job() -> bool:
    """Whether this is the shell of a job, which may have a step's variables from the sbatch that made it.

    The title of the slurmstepd above says which it is.
    """
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
            # Only asked whether it resolves.
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
    """End this process when its launcher dies, be it by kill -9.

    It sends itself a TERM, so that a training run saves first.

    The launchers do not see to it: a killed one leaves its ranks running. Does nothing where no launcher is.
    """
    above = next((count for sign, count in LAUNCHERS.items() if sign in os.environ), 0)
    if above:
        # The launchers are noted now: once one is dead, another process has its place above this one.
        threading.Thread(target=_watch, args=(psutil.Process().parents()[:above],), daemon=True).start()


def _watch(launchers: list[psutil.Process]) -> None:
    while not any(map(_is_gone, launchers)):
        time.sleep(1.0)
    # StopSignals takes it as any other: the step ends, a checkpoint is written.
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
    """Send what DeepSpeed, FFCV and torch say to a file: loggers, warnings, bare prints.

    Our own words go around it.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter(f"[rank {dist.rank()}] %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "torch", "vitds")]
    # Put back afterwards, for a caller of `train` has loggers of its own.
    before = [(logger.handlers[:], logger.propagate) for logger in loggers]
    for logger in loggers:
        # propagate off, or the root logger would print it once more.
        logger.handlers = [handler]
        logger.propagate = False
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(_ToLog(handler)):
            warnings.simplefilter("default")
            warnings.showwarning = _warning_into(handler)
            yield
    finally:
        for logger, (handlers, propagate) in zip(loggers, before, strict=True):
            logger.handlers = handlers
            logger.propagate = propagate
        handler.close()


def _warning_into(handler: logging.FileHandler) -> Callable[..., None]:
    def show(message: Warning | str, category: type, file: str, line: int, *_: object) -> None:
        text = warnings.formatwarning(message, category, file, line)
        handler.handle(logging.LogRecord("py.warnings", logging.WARNING, file, line, text, None, None))

    return show


class _ToLog(io.TextIOBase):
    """A standard output that ends in the log file."""

    def __init__(self, handler: logging.FileHandler) -> None:
        self.handler = handler

    def write(self, text: str) -> int:
        # print writes its line end by itself.
        if text.strip():
            self.handler.stream.write(text.rstrip("\n") + "\n")
            self.handler.flush()
        return len(text)
