"""`vitds bench head`: a head's loss and gradients, ours beside others, in time, memory and bytes sent.

All have the same features, rows and targets, no bias and no smoothing (which not all of them know), forward
and backward. They take turns, and the best of the rounds counts, for another process can only make one
slower.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal, NamedTuple

import psutil
import torch
import torch.distributed as td
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vitds import dist
from vitds.batch import Targets
from vitds.bench.report import print_rows
from vitds.errors import ResourceError, SettingsError
from vitds.heads import DenseHead, ShardedHead
from vitds.heads.sharded import bytes_sent
from vitds.models.precision import AUTOCAST

# The bare products' logits lie in memory at once up to this.
PRODUCT_BYTES = 1 << 30
NOT_RUN = {"ms": None, "off": None, "extra_mb": None, "sent_mb": None}
# Products in bfloat16 differ by half a percent. What differs by more than this computes something else.
WRONG = 0.05
FEW_FEATURES = 16  # fewer fill no tile of a GPU's matrix unit
TILE_ROWS = 256  # of the plain way with tiles; ours choose their own
OURS = "ours, dense"
COMPARISONS = ("ratio", "to_three", "to_torch", "to_tiles")
PROC = Path("/proc/self")


@dataclass(frozen=True)
class Contender:
    """One way to the loss and its gradients.

    Attributes:
        name: in the table.
        step: forward and backward pass.
        logits: how many (M, N) matrices it holds at once.
        makes_gradient: whether each step makes the memory of the weight's gradient anew.
    """

    name: str
    step: Callable[[], None]
    logits: int = 0
    makes_gradient: bool = True


class Case(NamedTuple):
    """What is measured; `bench_head` says what each is."""

    rows: int
    dim: int
    batch: int
    precision: Literal["fp32", "bf16"]
    bf16_rows: bool
    rounds: int
    keep_bytes: int

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows and their gradient."""
        return torch.bfloat16 if self.bf16_rows else torch.float32


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
        measured[f"ours, sharded, {ranks} ranks"] = _measure_ranks(ranks, case)
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
    features, targets = _make_batch(case.rows, case.dim, case.batch, device)
    leaves = [features, dense.weight]
    contenders = list(_contenders(dense, features, targets, case.precision))
    ours = next(each.step for each in contenders if each.name == OURS)
    right = _gradients(ours, *leaves, targets.a)
    found: dict[str, dict[str, Any]] = {}
    steps = {}
    for contender in contenders:
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
        extra = _extra_bytes(contender.step, leaves, device)
        extra = extra and max(extra - gradient, 0)
        found[contender.name] = {"off": off, "extra_mb": extra, "sent_mb": 0}
    for name, seconds in best_seconds(steps, leaves, case.rounds, device).items():
        found[name]["ms"] = 1000 * seconds
    return found


def _gradients(step: Callable[[], None], features: Tensor, weight: Tensor, own: Tensor) -> list[Tensor]:
    """Those of one step: features, rows that are some feature's own, and all other rows; [] of bare products.

    The other rows' are so small that beside the own ones' their loss would not be seen.
    """
    _drop_gradients([features, weight])
    step()
    if weight.grad is None:
        return []
    is_own_N = torch.zeros(len(weight), dtype=torch.bool, device=weight.device).index_fill_(0, own, True)
    return [features.grad.clone(), weight.grad[is_own_N], weight.grad[~is_own_N]]


def _distance(found: list[Tensor], right: list[Tensor]) -> float | None:
    """The largest relative distance; None if nothing was found."""
    pairs = [(one.float(), other.float()) for one, other in zip(found, right, strict=False)]
    return max((float((one - other).norm() / other.norm()) for one, other in pairs), default=None)


def _make_batch(rows: int, dim: int, batch: int, device: torch.device) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(batch, dim, generator=generator).to(device).requires_grad_()
    target = torch.randint(0, rows, (batch,), generator=generator).to(device)
    one = torch.ones(batch, device=device)
    return features, Targets(target, target, one, one / batch, torch.zeros_like(target))


def _contenders(dense: DenseHead, features: Tensor, targets: Targets, precision: str) -> Iterator[Contender]:
    """The first four are what the others are compared with."""
    dtype, weight, target = AUTOCAST.get(precision), dense.weight, targets.a
    rows, device = len(weight), features.device.type

    def backward_of(loss: Callable[[], Tensor]) -> Callable[[], None]:
        """A step: the loss under the case's autocast, and its gradients."""

        def step() -> None:
            """Forward and backward pass."""
            with torch.autocast(device, dtype, enabled=dtype is not None):
                value = loss()
            value.backward()

        return step

    products = _bare_products(features.detach(), weight.detach(), dtype or torch.float32)
    yield Contender("four bare products", partial(products, 4), makes_gradient=False)
    yield Contender("three bare products", partial(products, 3), makes_gradient=False)
    # Three matrices: logits, their log-softmax and its gradient. Those of bfloat16 have float32 copies, which
    # comes to the same.
    yield Contender(
        "torch's linear and cross_entropy",
        backward_of(lambda: _cross_entropy(nn.functional.linear(features, weight), target)),
        3,
    )
    yield Contender(
        f"tiles of {TILE_ROWS} rows under checkpoint",
        backward_of(lambda: _checkpointed(features, weight, target)),
    )
    liger = _peer("liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy", "liger-kernel")
    if liger_chunk(len(features), rows, features.shape[1]) < FEW_FEATURES:
        liger = _refusal(f"its rule makes chunks of fewer than {FEW_FEATURES} features of these shapes")
    yield Contender("Liger", backward_of(lambda: liger(features, weight, target)))
    cce = _peer("cut_cross_entropy", "linear_cross_entropy", "cut-cross-entropy")
    if device == "cuda":
        # Its own rule leaves out gradients below bfloat16's last bit. With shares of one in thousands that
        # is nearly all of them: less work, and another result.
        exact = backward_of(lambda: cce(features, weight, target, filter_eps=None))
        yield Contender("Cut Cross-Entropy", exact)
    else:
        compiled = backward_of(lambda: cce(features, weight, target, impl="torch_compile"))
        yield Contender("Cut Cross-Entropy's torch_compile", compiled, 3)
    yield Contender(OURS, backward_of(lambda: dense(features, targets).sum()))
    sharded = ShardedHead(
        rows, features.shape[1], bias=False, label_smoothing=0.0, seed=0, keep_bytes=dense.keep_bytes
    )
    sharded.weight = weight
    yield Contender(
        "ours, sharded",
        backward_of(lambda: sharded(features, targets).sum()),
        makes_gradient=False,
    )


def _bare_products(features: Tensor, weight: Tensor, dtype: torch.dtype) -> Callable[[int], None]:
    """The floor of any head: its products alone, on memory that is there, with nothing between them.

    Returns: a function of their number. Three are features by rows, shares by rows and shares by features;
        four
    have the first one twice, as where logits are not kept.
    """
    x_MD, w_ND = features.to(dtype), weight.to(dtype)
    block = min(len(w_ND), max(1, PRODUCT_BYTES // (len(x_MD) * x_MD.element_size())))
    logits, g_x_MD, g_w_ND = x_MD.new_zeros(len(x_MD), block), torch.zeros_like(x_MD), torch.zeros_like(w_ND)

    def step(number: int) -> None:
        """So many products, the last two of them those of the backward pass."""
        for first in range(0, len(w_ND), block):
            rows = w_ND[first : first + block]
            part = logits.flatten()[: len(x_MD) * len(rows)].view(len(x_MD), len(rows))
            for _ in range(number - 2):
                torch.mm(x_MD, rows.T, out=part)
            torch.mm(part, rows, out=g_x_MD)
            torch.mm(part.T, x_MD, out=g_w_ND[first : first + block])

    return step


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.float(), target)


def _checkpointed(features: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Tiles of rows, each one's logits made again in the backward pass."""

    def part(rows: Tensor) -> Tensor:
        """Log-sum-exp over a tile's rows."""
        return nn.functional.linear(features, rows).float().logsumexp(1)

    parts = [checkpoint(part, rows, use_reentrant=False) for rows in weight.split(TILE_ROWS)]
    own = (features * nn.functional.embedding(target, weight)).sum(1)
    return (torch.stack(parts).logsumexp(0) - own).mean()


def _peer(module: str, name: str, package: str) -> Callable[..., Tensor]:
    """A function of another package, or one that says that it is not there."""

    try:
        return getattr(import_module(module), name)
    except ImportError:
        return _refusal(f"not installed: pip install {package}")


def _refusal(reason: str) -> Callable[..., Tensor]:
    """In the place of a function that shall not be measured."""

    def refused(*_: Any, **__: Any) -> Tensor:
        """Takes what that function takes."""
        raise NotImplementedError(reason)

    return refused


def liger_chunk(features: int, rows: int, width: int) -> int:
    """The features that Liger's fused linear cross-entropy works on at once, by its rule for token heads.

    Its logits then take as much memory as the features: a power of two of M / (N / D). With N a thousand
    times D that is a single feature, and its products are no matrix products any more.
    """
    chunks = -(-rows // width)
    return 1 << (-(-features // chunks) - 1).bit_length()


# Ranks ---------------------------------------------------------------------------------------------------


def _measure_ranks(ranks: int, case: Case) -> dict[str, Any]:
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
    features, targets = _make_batch(case.rows, case.dim, case.batch // ranks, device)
    dtype = AUTOCAST.get(case.precision)

    def step() -> None:
        """Losses of all ranks' features, and this rank's gradients."""
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            loss = head(features, targets).sum()
        loss.backward()

    step()
    # The memory of its gradient stays with the head, so it is no part of this.
    extra = _extra_bytes(step, [features, head.weight], device)
    dist.barrier()
    answer.send((best_seconds({"": step}, [features, head.weight], case.rounds, device)[""], extra))


# Measuring -----------------------------------------------------------------------------------------------


def best_seconds(
    steps: dict[str, Callable[[], None]], leaves: list[Tensor], rounds: int, device: torch.device
) -> dict[str, float]:
    """The best of the rounds, all taking turns.

    Gradients are dropped before each step, as between a trainer's steps.
    """
    best = dict.fromkeys(steps, float("inf"))
    for _ in range(rounds):
        for name, step in steps.items():
            _drop_gradients(leaves)
            _synchronise(device)
            started = time.perf_counter()
            step()
            _synchronise(device)
            best[name] = min(best[name], time.perf_counter() - started)
    return best


def _extra_bytes(step: Callable[[], None], leaves: list[Tensor], device: torch.device) -> int | None:
    """The highest memory during a step beyond that before it; None where the system does not say."""
    _drop_gradients(leaves)
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
    before = _status_bytes("VmRSS")
    step()
    return _status_bytes("VmHWM") - before


def _status_bytes(key: str) -> int:
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) * 1024


def _drop_gradients(leaves: list[Tensor]) -> None:
    for leaf in leaves:
        leaf.grad = None


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
