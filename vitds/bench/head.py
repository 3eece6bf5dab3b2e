"""`vitds bench head`: a head's loss and gradients, ours beside others, in time, memory and bytes sent.

All have the same features, rows and targets, no bias and no smoothing (which not all of them know), forward
and backward. They take turns, and the best of the rounds counts, for another process can only make one
slower.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import psutil
import torch
from torch import Tensor

from vitds.bench.head_ranks import measure_ranks
from vitds.bench.head_ways import OURS, Case, contenders, make_batch
from vitds.bench.report import print_rows
from vitds.bench.steps import best_seconds, drop_gradients, extra_bytes
from vitds.errors import SettingsError
from vitds.heads import DenseHead

NOT_RUN = {"ms": None, "off": None, "extra_mb": None, "sent_mb": None}
# Products in bfloat16 differ by half a percent. What differs by more than this computes something else.
WRONG = 0.05
COMPARISONS = ("ratio", "to_three", "to_torch", "to_tiles")


def bench_head(
    *,
    rows: int,
    dim: int,
    batch: int,
    ranks: int = 1,
    precision: Literal["fp32", "bf16"] = "fp32",
    bf16_rows: bool = False,
    rounds: int = 3,
    keep_mb: int = 64,
    as_json: bool = False,
) -> list[dict[str, Any]]:
    """Milliseconds, extra memory and bytes sent of one step of a head.

    Args:
        rows: N.
        dim: D.
        batch: M, the features of all ranks together.
        ranks: processes of a sharded head, on this machine.
        precision: of the products.
        bf16_rows: rows and their gradient are bfloat16, as with `head.row_dtype`.
        rounds: of every way, in turn.
        keep_mb: the heads' own `keep_bytes`, in MiB.
        as_json: print one JSON object and nothing else.
    Returns: a dict a contender: ms; the ratio of that to the four bare products, to_three of them, to_torch
        and to_tiles; off, how far its gradients are from those of our dense head (the norm of the difference
        over the norm; the largest of features, rows that are a feature's own, and other rows); extra_mb, the
        peak beyond the process's memory before and the weight's gradient; sent_mb a rank. None where a
        contender did not run or is off by more than WRONG, which its name explains, and off of what was not
        compared.
    Raises: SettingsError if the ranks do not divide the batch, a number is below 1, or rows of bfloat16 meet
        other products.
    """
    if min(rows // ranks if ranks > 0 else 0, dim, batch, rounds) < 1 or batch % ranks or keep_mb < 0:
        raise SettingsError(
            f"--rows {rows} --dim {dim} --batch {batch} --ranks {ranks} --rounds {rounds} --keep_mb {keep_mb}"
            ": each from 1 on (keep_mb from 0), a row a rank at least, and ranks that divide the batch"
        )
    if bf16_rows and precision != "bf16":
        raise SettingsError(
            f"--bf16_rows goes with --precision bf16, not {precision}: the other ways multiply in one type "
            "alone"
        )
    case = Case(rows, dim, batch, precision, bf16_rows, rounds, keep_mb << 20)
    measured = _measure_alone(case)
    if ranks > 1:
        measured[f"ours, sharded, {ranks} ranks"] = measure_ranks(ranks, case)
    table = _table(measured)
    kind = f"{precision}, rows too" if bf16_rows else precision
    print_rows(f"head of {rows:,} rows x {dim}, {batch:,} features, {kind}", table, as_json=as_json)
    return table


def _table(measured: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A row a contender; the first four are what all are compared with."""
    others = dict(zip(COMPARISONS, (facts["ms"] for facts in measured.values()), strict=False))
    table = []
    for name, facts in measured.items():
        ms = facts["ms"]
        row = {"name": name, "ms": ms and round(ms, 1)}
        row |= {key: round(ms / other, 3) if ms and other else None for key, other in others.items()}
        row["off"] = facts["off"] and float(f"{facts['off']:.1e}")
        row |= {key: facts[key] and round(facts[key] / 1e6, 1) for key in ("extra_mb", "sent_mb")}
        table.append(row)
    return table


def _measure_alone(case: Case) -> dict[str, dict[str, Any]]:
    """All contenders in this process.

    Returns: by name ms, off, extra_mb and sent_mb, the latter two still in bytes.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dense = DenseHead(
        case.rows, case.dim, bias=False, label_smoothing=0.0, seed=0, keep_bytes=case.keep_bytes
    ).to(device, case.dtype)
    features, targets = make_batch(case.rows, case.dim, case.batch, device)
    leaves = [features, dense.weight]
    ways = list(contenders(dense, features, targets, case.precision))
    ours = next(each.step for each in ways if each.name == OURS)
    right = _gradients(ours, *leaves, targets.a)
    found: dict[str, dict[str, Any]] = {}
    steps = {}
    for contender in ways:
        held = contender.logits * case.batch * case.rows * 4
        free = torch.cuda.mem_get_info()[0] if device.type == "cuda" else psutil.virtual_memory().available
        if held > 0.8 * free:
            found[f"{contender.name}: not run, its logits take {held / 1e9:.1f} GB"] = dict(NOT_RUN)
            continue
        try:
            off = _distance(_gradients(contender.step, *leaves, targets.a), right)
        except Exception as error:
            # Another package's: whatever it is, the others are still measured.
            reason = str(error).partition("\n")[0][:80]
            found[f"{contender.name}: not run, {reason}"] = dict(NOT_RUN)
            continue
        if off is not None and not off <= WRONG:
            found[f"{contender.name}: not counted, its gradients are off by {off:.2g}"] = dict(NOT_RUN)
            continue
        steps[contender.name] = contender.step
        gradient = contender.makes_gradient * dense.weight.numel() * dense.weight.element_size()
        extra = extra_bytes(contender.step, leaves, device)
        extra = extra and max(extra - gradient, 0)
        found[contender.name] = {"off": off, "extra_mb": extra, "sent_mb": 0}
    for name, seconds in best_seconds(steps, leaves, case.rounds, device).items():
        found[name]["ms"] = 1000 * seconds
    return found


def _gradients(step: Callable[[], None], features: Tensor, weight: Tensor, own: Tensor) -> list[Tensor]:
    """Those of one step: features, rows that are some feature's own, and all other rows; [] of bare products.

    The other rows' are so small that beside the own ones' their loss would not be seen.
    """
    drop_gradients([features, weight])
    step()
    if weight.grad is None:
        return []
    is_own_N = torch.zeros(len(weight), dtype=torch.bool, device=weight.device).index_fill_(0, own, True)
    return [features.grad.clone(), weight.grad[is_own_N], weight.grad[~is_own_N]]


def _distance(found: list[Tensor], right: list[Tensor]) -> float | None:
    """The largest relative distance; None if nothing was found."""
    pairs = [(one.float(), other.float()) for one, other in zip(found, right, strict=False)]
    return max((float((one - other).norm() / other.norm()) for one, other in pairs), default=None)
