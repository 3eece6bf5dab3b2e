"""RUN/best.safetensors: the weights of the epoch that did best on the held-out images (eval.choose best).

It lies beside the checkpoints and is no part of them. A run that goes on from an earlier step comes to the
same weights in the same epoch again, and finds them there: it chooses what the uninterrupted run does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from vitds.runs.directory import Run, write_atomic


@dataclass(frozen=True)
class Chosen:
    """Which epoch was best.

    Attributes:
        epoch: counted from 1, its end.
        top1: percent of the held-out images that it classified right.
    """

    epoch: int
    top1: float


def chosen_epoch(run: Run) -> Chosen | None:
    """The best epoch so far; None before the first one was measured."""
    if not run.best.exists():
        return None
    with safe_open(run.best, "pt") as file:
        facts = file.metadata()
    return Chosen(int(facts["epoch"]), float(facts["top1"]))


def offer(run: Run, epoch: int, top1: float, weights: Mapping[str, Tensor]) -> None:
    """Keep an epoch's weights if it did better than all before it; of equal ones the first stays.

    Args:
        run: whose file it is.
        epoch: counted from 1.
        top1: percent of the held-out images.
        weights: all weights of the method's module, by name.
    Raises: ResourceError if the disk is full.
    """
    best = chosen_epoch(run)
    if best is None or top1 > best.top1:
        found = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
        # repr keeps every bit of the number that the next epochs are compared with.
        write_atomic(run.best, save(found, {"epoch": str(epoch), "top1": repr(top1)}))


def best_weights(run: Run) -> dict[str, Tensor]:
    """All weights of the best epoch, by name, float32."""
    return load_file(run.best)
