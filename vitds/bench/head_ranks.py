"""The sharded head of `vitds bench head`, on several processes of this machine."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as td

from vitds import dist
from vitds.bench.head_ways import Case, make_batch
from vitds.bench.steps import best_seconds, extra_bytes
from vitds.errors import ResourceError
from vitds.heads import ShardedHead
from vitds.heads.sharded import bytes_sent
from vitds.models.precision import AUTOCAST


def measure_ranks(ranks: int, case: Case) -> dict[str, Any]:
    """The sharded head on R processes.

    Returns: the slowest rank's time, the largest extra memory, the bytes that a rank sends.
    Raises: ResourceError if a rank ends without an answer, which is what running out of memory looks like.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        started = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            options = (rank, ranks, str(Path(folder) / "meeting"), case, theirs)
            process = context.Process(target=_rank, args=options, daemon=True)
            process.start()
            theirs.close()
            started.append((process, ours))
        try:
            answers = [pipe.recv() for _, pipe in started]
        except EOFError as error:
            raise ResourceError(
                f"one of {ranks} ranks ended without an answer: not enough memory for {case.rows:,} rows x "
                f"{case.dim}?"
            ) from error
        finally:
            for process, _ in started:
                process.kill()
    seconds, extra = (max(values) if None not in values else None for values in zip(*answers, strict=True))
    sent = bytes_sent(case.batch, case.dim, ranks)
    return {"ms": 1000 * seconds, "off": None, "extra_mb": extra, "sent_mb": sent}


def _rank(rank: int, ranks: int, meeting: str, case: Case, answer: Connection) -> None:
    """One process of a sharded head: sends (seconds, extra bytes)."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    device = torch.device("cuda", rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        # What is synchronised, and whose memory is counted, is the current device's: card 0's where none is.
        torch.cuda.set_device(device)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(ranks)}
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks))
    td.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=td.FileStore(meeting, ranks),
        rank=rank,
        world_size=ranks,
    )
    options = {"dtype": case.dtype, "keep_bytes": case.keep_bytes}
    head = ShardedHead(case.rows, case.dim, bias=False, label_smoothing=0.0, seed=0, **options).to(device)
    features, targets = make_batch(case.rows, case.dim, case.batch // ranks, device)
    dtype = AUTOCAST.get(case.precision)

    def step() -> None:
        """Losses of all ranks' features, and this rank's gradients."""
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = head(features, targets).sum()
        loss.backward()

    step()
    # The memory of its gradient stays with the head, so it is no part of this.
    extra = extra_bytes(step, [features, head.weight], device)
    dist.barrier()
    answer.send((best_seconds({"": step}, [features, head.weight], case.rounds, device)[""], extra))
