"""Time and memory of steps that a bench compares."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

PROC = Path("/proc/self")


def best_seconds(
    steps: dict[str, Callable[[], None]], leaves: list[Tensor], rounds: int, device: torch.device
) -> dict[str, float]:
    """The best of the rounds, all taking turns.

    Gradients are dropped before each step, as between a trainer's steps.
    """
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            drop_gradients(leaves)
            _synchronise(device)
            started = time.perf_counter()
            step()
            _synchronise(device)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def extra_bytes(step: Callable[[], None], leaves: list[Tensor], device: torch.device) -> int | None:
    """The highest memory during a step beyond that before it; None where the system does not say."""
    drop_gradients(leaves)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    if not (PROC / "clear_refs").exists():
        return None
    # What earlier steps freed would hide what this one takes.
    ctypes.CDLL(None).malloc_trim(0)
    (PROC / "clear_refs").write_text("5")  # VmHWM starts anew
    before = status_bytes("VmRSS")
    step()
    return status_bytes("VmHWM") - before


def status_bytes(key: str) -> int:
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def drop_gradients(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
