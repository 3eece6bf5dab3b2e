"""This process as one rank: group, device, threads, and where the libraries' noise goes."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import deepspeed.ops
import torch
import torch.distributed as td

from vitds import dist
from vitds.errors import ResourceError

# DeepSpeed compiles its shared-memory collectives at every first start on a CPU, for 40 s and unasked; gloo serves.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def start_ranks() -> torch.device:
    """Join the process group that the launcher's variables describe, or make one of a single rank; returns the training device.

    Raises: ResourceError if the group's port is taken or a peer does not come.
    """
    has_cuda = torch.cuda.is_available()
    local_rank = int(os.environ.setdefault("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if has_cuda else torch.device("cpu")
    if has_cuda:
        torch.cuda.set_device(device)
    else:
        local_ranks = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or 1)
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_ranks))
    if td.is_initialized():
        return device
    backend = "cuda:nccl,cpu:gloo" if has_cuda else "gloo"
    try:
        if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
            td.init_process_group(backend)
        else:
            td.init_process_group(backend, store=td.HashStore(), rank=0, world_size=1)
    except (td.DistNetworkError, td.DistStoreError) as error:
        port = os.environ.get("MASTER_PORT")
        raise ResourceError(
            f"the ranks could not meet on {os.environ.get('MASTER_ADDR')} port {port}: {str(error).splitlines()[0]} "
            f"If another run uses the port, give this one its own: deepspeed --master_port {int(port or 29500) + 1} ..."
        ) from error
    return device


@contextlib.contextmanager
def noise_into(log: Path) -> Iterator[None]:
    """Send what DeepSpeed, FFCV and torch say (loggers, warnings, bare prints) to a file; our own words go around it."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log)
    handler.setFormatter(logging.Formatter(f"[rank {dist.rank()}] %(levelname)s %(name)s: %(message)s"))
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "torch", "py.warnings")]
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
