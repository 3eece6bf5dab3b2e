"""A rank's memory, part by part, at the moments of a run at which it may be highest.

What DeepSpeed 0.19.8 holds was read in its code and measured on 1 and 2 CPU ranks (tests/plan/test_measured.py); what is for GPUs alone
was only read. The moments:
start: weights move into the engine · backward: the forward pass of a step's last micro batch has ended, the backward pass begins ·
reduce: the backward pass has ended, gradients go to other ranks · update: the optimizer steps · save: a checkpoint is taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from vitds import dist
from vitds.heads.logsumexp import CPU_TILE_NUMBERS, GPU_TILE_NUMBERS
from vitds.plan.case import Case
from vitds.plan.vit import backward_bytes, saved_bytes

MOMENTS = ("start", "backward", "reduce", "update", "save")
STEP = ("backward", "reduce", "update", "save")
RING_SLOTS = 4  # batches of crops that the loader holds with one worker


@dataclass(frozen=True)
class Part:
    """Bytes of one thing on one rank, and when they are there. on_host: in the host's memory, on a CPU the same as the device's."""

    name: str
    bytes: int
    moments: tuple[str, ...]
    on_host: bool = False


def memory_parts(case: Case) -> list[Part]:
    """Everything that a rank holds; without the CUDA context, the libraries and what the allocator keeps in reserve."""
    parts = [*_engine(case), *_passing(case), *_head(case), *_forward(case), *_save(case)]
    return [part for part in parts if part.bytes and part.moments]


def sums(parts: Iterable[Part]) -> dict[str, int]:
    """Bytes of all parts at each moment."""
    parts = list(parts)
    return {moment: sum(part.bytes for part in parts if moment in part.moments) for moment in MOMENTS}


def _engine(case: Case) -> Iterator[Part]:
    """What stays from step to step."""
    share = case.ranks if case.stage == 3 else 1
    state_share = case.ranks if case.stage else 1
    yield Part(
        "backbone: frozen weights",
        case.backbone.frozen * case.weight // share,
        MOMENTS,
        case.offloads_weights,
    )
    for name, numbers in (("backbone", sum(case.backbone.parameters)), ("dense head", sum(case.head))):
        yield Part(f"{name}: weights", numbers * case.weight // share, MOMENTS, case.offloads_weights)
        if case.has_masters:
            yield Part(f"{name}: fp32 masters", numbers * 4 // state_share, STEP, case.offloads_states)
        yield Part(f"{name}: Adam's moments", numbers * 8 // state_share, STEP, case.offloads_states)
        if case.settings.optimizer.average_decay:
            yield Part(f"{name}: averages", numbers * 4 // state_share, STEP, case.offloads_states)
        gradients = numbers * case.weight // (case.ranks if case.stage > 1 else 1)
        yield Part(
            f"{name}: gradients", gradients, _gradient_moments(case), case.stage == 3 and case.offloads_states
        )


def _gradient_moments(case: Case) -> tuple[str, ...]:
    """From the first micro batch's backward pass on; stages 1 and 2 copy them for the update, stage 3 keeps memory of their own."""
    if case.stage == 3:
        return STEP
    before = ("backward",) if case.accumulation > 1 else ()
    return (*before, "reduce") if case.stage else (*before, "reduce", "update")


def _passing(case: Case) -> Iterator[Part]:
    """DeepSpeed's buffers and copies, and the optimizer's temporaries."""
    p, w, bucket = case.engine, case.weight, case.buckets["reduce_bucket_size"]
    share = p // case.ranks
    dtypes = 2 if case.is_autocast else 1  # one bucket for gradients that travel in bf16, one for the others
    if case.stage == 0 and case.ranks > 1:
        yield Part("all-reduce buffer", min(p, int(5e8)) * w, ("reduce",))
    if case.stage in (1, 2):
        # A CPU's bucket takes what is put into it, which at stage 1 leaves its place before; a GPU's is there whole.
        touched = min(p, bucket) * w if case.stage == 2 else 0
        yield Part(
            "reduce_bucket_size buffers",
            bucket * w * dtypes if case.on_gpu else touched,
            ("backward", "reduce"),
        )
        adds = case.stage == 2 and case.accumulation > 1 and case.ranks > 1
        yield Part("shares of reduced gradients", share * w * (2 if adds else 1), ("reduce",))
    if case.stage == 3:
        width = bucket * (6 if case.is_autocast else w)  # 4 + 2 bytes: a bucket of either dtype
        yield Part("reduce_bucket_size buffers", width if case.on_gpu else min(p, bucket) * w, STEP)
        live, ahead = case.buckets["stage3_max_live_parameters"], case.buckets["stage3_prefetch_bucket_size"]
        gathered = min(case.weights, live) + min(case.weights, ahead)
        # One rank gathers nothing, but copies what it keeps on the host to its GPU.
        copied = case.weight if case.offloads_weights and case.on_gpu else 0
        yield Part("gathered weights", gathered * (case.compute if case.ranks > 1 else copied), ("backward",))
    if case.offloads_states:
        yield Part(
            "gradients in fp32, host", share * 4, STEP if case.stage == 3 else ("reduce", "update"), True
        )
        return
    if case.stage or w == 2:
        yield Part("gradients as the optimizer takes them", (share if case.stage else p) * 4, ("update",))
    # torch's AdamW: two temporaries of a parameter's size one by one on a CPU, one of all parameters together on a GPU.
    held = (
        share
        if case.stage
        else (p if case.on_gpu or w == 2 else max((*case.backbone.parameters, *case.head), default=0))
    )
    yield Part("optimizer's temporaries", held * 4 * (1 if case.on_gpu else 2), ("update",))
    if case.stage:
        whole = case.weights * 4 if case.stage == 3 else p * w
        yield Part("weights as they were built", whole, ("start",))


def _head(case: Case) -> Iterator[Part]:
    """A sharded head's rows; and what either kind needs while it works (see vitds/heads)."""
    width = case.backbone.width
    form, n = case.settings.head, case.shard_rows
    crops = case.crops * (case.ranks if n else 1)
    taken = min(n, int(n * form.sample_rate) + 2 * crops)
    weight = n * (width * (2 if form.row_dtype == "bf16" else 4) + 4 * form.bias)
    a_row = (
        (2 * (width + form.bias) + 4 * (1 + form.bias))
        if form.optimizer == "lean"
        else 8 * (width + form.bias)
    )
    yield Part("sharded head: weight", weight, MOMENTS)
    yield Part("sharded head: gradient", 0 if form.lazy else weight, STEP)
    yield Part(
        "sharded head: moments" + ", lean" * (form.optimizer == "lean"), n * a_row + 4 * n * form.lazy, STEP
    )
    if n and form.sample_rate < 1:
        yield Part(
            "sharded head: rows in play, their gradients",
            taken * (width + form.bias) * 4 * 2,
            ("backward", "reduce", "update"),
        )
    rows = taken if n else case.rows
    logits = crops * rows * case.compute
    # A chunk of logits in both dtypes, and five numbers a chunk and row of features (vitds/heads/logsumexp.py).
    chunk = max(GPU_TILE_NUMBERS if case.on_gpu else CPU_TILE_NUMBERS[case.compute], crops * rows**0.5)
    work = logits if logits <= form.keep_mb << 20 else int(2 * chunk + 5 * crops * rows**0.5) * 4
    # Features of all ranks, two targets' rows for each, gradients of these three, and two copies on the way: eight (M, D).
    yield Part("head at work", crops * width * 4 * 8 + work, ("backward",))


def _forward(case: Case) -> Iterator[Part]:
    """Pixels, and what the backbone keeps for its backward pass."""
    views = case.settings.views
    pixels = 3 * views.crop_px**2 * case.crops
    yield Part(
        "crops, float32" + " and cast" * (case.compute == 2),
        pixels * (4 + (2 if case.compute == 2 else 0)),
        ("backward",),
    )
    yield Part("crops waiting, uint8", pixels * (RING_SLOTS - 1 + case.settings.data.workers), STEP, True)
    if case.is_autocast and case.stage != 3:
        yield Part("bf16 copies of weights", case.weights * 2, ("backward",))
    vit = case.backbone.vit
    if vit is None:
        return
    residual = case.weight
    checkpointing = case.settings.engine.activation_checkpointing
    saved = saved_bytes(vit, case.crops, compute=case.compute, residual=residual, checkpointing=checkpointing)
    yield Part("activations" + ", checkpointed" * checkpointing, saved, ("backward",))
    yield Part(
        "gradients of activations",
        backward_bytes(vit, case.crops, compute=case.compute, residual=residual),
        ("backward",),
    )


def _save(case: Case) -> Iterator[Part]:
    """Masters, moments and averages, copied for a checkpoint by ranks in turn; a sharded head's rows are copied only from a GPU."""
    sizes = (*case.backbone.parameters, *case.head)
    owners = dist.spread(sizes, case.ranks)
    most = max(
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(case.ranks)
    )
    copies = (
        most * 4 * (4 if case.settings.optimizer.average_decay else 3)
        + case.backbone.frozen * 4 // case.ranks
    )
    yield Part("copies for a checkpoint", copies, ("save",), on_host=True)
    if case.on_gpu:
        rows = sum(
            part.bytes
            for part in _head(case)
            if part.name.startswith(("sharded head: weight", "sharded head: moments"))
        )
        yield Part("sharded head's rows for a checkpoint, host", rows, ("save",), True)
