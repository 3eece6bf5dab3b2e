"""A rank's memory, part by part, at the moments of a run at which it may be highest.

What DeepSpeed 0.19.8 holds was read in its code and measured on 1 and 2 CPU ranks
(tests/plan/test_measured.py); what is for GPUs alone was only read. The moments:

- start: weights move into the engine;
- backward: the forward pass of a step's last micro batch has ended, the backward pass begins;
- reduce: the backward pass has ended, gradients go to other ranks;
- update: the optimizer steps;
- save: a checkpoint is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from vitds import dist
from vitds.heads.bytes import ShardBytes, rows_in_play, shard_bytes, work_bytes
from vitds.methods import method_class
from vitds.plan.activations import passing_bytes, saved_bytes
from vitds.plan.case import Case

MOMENTS = ("start", "backward", "reduce", "update", "save")
# All that comes after the start, when there is no optimizer yet.
STEP = ("backward", "reduce", "update", "save")
RING_SLOTS = 4  # batches of crops that the loader holds with one worker
# DeepSpeed's all-reduce at stage 0 copies so many gradients at once, whatever the JSON says.
ALL_REDUCE_NUMBERS = int(5e8)


@dataclass(frozen=True)
class Part:
    """One thing on one rank.

    Attributes:
        name: what it is.
        bytes: its size.
        moments: when it is there.
        on_host: in the host's memory, which on a CPU is the device's.
    """

    name: str
    bytes: int
    moments: tuple[str, ...]
    on_host: bool = False


def memory_parts(case: Case) -> list[Part]:
    """All that a rank holds beside the CUDA context, the libraries and the allocator's reserve."""
    # What DeepSpeed holds, what a head holds, what a pass keeps, what a checkpoint copies.
    parts = [*STAGES[case.stage](case), *_head(case), *_forward(case), *_probes(case), *_save(case)]
    return [part for part in parts if part.bytes and part.moments]


def sums(parts: Iterable[Part]) -> dict[str, int]:
    """Bytes of all parts at each moment."""
    parts = list(parts)
    # A rank needs the highest of these; docs/plan.md, "The moments".
    return {moment: sum(part.bytes for part in parts if moment in part.moments) for moment in MOMENTS}


# What DeepSpeed holds, by ZeRO stage ---------------------------------------------------------------------


def _stage_0(case: Case) -> Iterator[Part]:
    """Every rank holds everything."""
    yield from _states(case, during=(*_between_micro_batches(case), "reduce", "update"))
    # One rank reduces nothing.
    if case.ranks > 1:
        yield Part("all-reduce buffer", min(case.engine, ALL_REDUCE_NUMBERS) * case.weight, ("reduce",))
    if case.weight == 2:
        yield Part("gradients as the optimizer takes them", case.engine * 4, ("update",))
    # The masters of 2-byte weights are one flat parameter, and a GPU takes all parameters in one call.
    is_one_call = case.on_gpu or case.weight == 2
    largest = max((size for sizes in case.trained.values() for size in sizes), default=0)
    yield _temporaries(case, case.engine if is_one_call else largest)


def _stage_1(case: Case) -> Iterator[Part]:
    """Masters and moments are shared. Gradients are whole until they are reduced."""
    yield from _states(case, states=case.ranks, during=(*_between_micro_batches(case), "reduce"))
    # On a CPU a bucket takes what is put into it, and at this stage that has left its place before.
    yield Part("reduce_bucket_size buffers", _buckets(case) if case.on_gpu else 0, ("backward", "reduce"))
    yield Part("shares of reduced gradients", _share(case) * case.weight, ("reduce",))
    yield from _shared_update(case, whole=case.engine * case.weight)


def _stage_2(case: Case) -> Iterator[Part]:
    """Gradients are shared too: each is reduced as soon as the backward pass has made it."""
    during = (*_between_micro_batches(case), "reduce")
    yield from _states(case, states=case.ranks, gradients=case.ranks, during=during)
    touched = min(case.engine, case.buckets["reduce_bucket_size"]) * case.weight
    yield Part(
        "reduce_bucket_size buffers", _buckets(case) if case.on_gpu else touched, ("backward", "reduce")
    )
    # A later micro batch's shares are reduced into memory of their own, then added to the earlier ones.
    copies = 2 if case.accumulation > 1 and case.ranks > 1 else 1
    yield Part("shares of reduced gradients", _share(case) * case.weight * copies, ("reduce",))
    yield from _shared_update(case, whole=case.engine * case.weight)


def _stage_3(case: Case) -> Iterator[Part]:
    """Weights are shared too, and gathered to be used. Gradients have memory that stays."""
    ranks = case.ranks
    yield from _states(case, weights=ranks, states=ranks, gradients=ranks, during=STEP)
    bucket = case.buckets["reduce_bucket_size"]
    # Under autocast there is a bucket of either dtype: 4 + 2 bytes.
    buckets = bucket * (6 if case.is_autocast else case.weight)
    touched = min(case.engine, bucket) * case.weight
    yield Part("reduce_bucket_size buffers", buckets if case.on_gpu else touched, STEP)
    ahead = min(case.weights, case.buckets["stage3_prefetch_bucket_size"])
    gathered = min(case.weights, case.buckets["stage3_max_live_parameters"]) + ahead
    # One rank gathers nothing, but copies what it keeps on the host to its GPU.
    copied = case.weight if case.offloads_weights and case.on_gpu else 0
    yield Part("gathered weights", gathered * (case.compute if ranks > 1 else copied), ("backward",))
    yield from _shared_update(case, whole=case.weights * 4)


STAGES: tuple[Callable[[Case], Iterator[Part]], ...] = (_stage_0, _stage_1, _stage_2, _stage_3)


def _states(
    case: Case, *, weights: int = 1, states: int = 1, gradients: int = 1, during: tuple[str, ...]
) -> Iterator[Part]:
    """What stays from step to step, and gradients.

    Args:
        weights: how many ranks share them.
        states: how many share masters, moments and averages.
        gradients: how many share them.
        during: when gradients are there.
    """
    for name, numbers in case.sizes.frozen.items():
        held = numbers * case.weight // weights
        yield Part(f"{name}: frozen weights", held, MOMENTS, case.offloads_weights)
    for name, parameters in case.trained.items():
        # In numbers; times bytes of a number, over the ranks that share them (docs/plan.md, "The formulas").
        p = sum(parameters)
        yield Part(f"{name}: weights", p * case.weight // weights, MOMENTS, case.offloads_weights)
        if case.has_masters:
            yield Part(f"{name}: fp32 masters", p * 4 // states, STEP, case.offloads_states)
        yield Part(f"{name}: Adam's moments", p * 8 // states, STEP, case.offloads_states)
        if case.settings.optimizer.average_decay:
            yield Part(f"{name}: averages", p * 4 // states, STEP, case.offloads_states)
        # Stage 3 accumulates gradients where the optimizer is, the other stages on the device.
        on_host = case.stage == 3 and case.offloads_states
        yield Part(f"{name}: gradients", p * case.weight // gradients, during, on_host)


def _between_micro_batches(case: Case) -> tuple[str, ...]:
    """When the last micro batch's backward pass begins, gradients are there if one came before it."""
    return ("backward",) if case.accumulation > 1 else ()


def _share(case: Case) -> int:
    """The numbers that a rank updates where masters and moments are shared."""
    return case.engine // case.ranks


def _buckets(case: Case) -> int:
    """Stages 1 and 2: under autocast one for gradients that travel in bf16, one for the others."""
    return case.buckets["reduce_bucket_size"] * case.weight * (2 if case.is_autocast else 1)


def _shared_update(case: Case, *, whole: int) -> Iterator[Part]:
    """Stages 1 to 3: a rank updates its share of the masters, on the device or on the host.

    Args:
        whole: bytes of the weights as they were built, from which the shares are cut.
    """
    share = _share(case)
    # The optimizer then works on the host, and so do its copies of gradients.
    if case.offloads_states:
        moments = STEP if case.stage == 3 else ("reduce", "update")
        yield Part("gradients in fp32, host", share * 4, moments, on_host=True)
        return
    yield Part("gradients as the optimizer takes them", share * 4, ("update",))
    yield _temporaries(case, share)
    yield Part("weights as they were built", whole, ("start",))


def _temporaries(case: Case, numbers: int) -> Part:
    """Of torch's optimizers: two of a parameter's size one by one on a CPU, one of all together on a GPU; its
    fused AdamW, which a GPU has, takes none.
    """
    of_gpu = 0 if case.settings.optimizer.kind == "adamw" else 1
    return Part("optimizer's temporaries", numbers * 4 * (of_gpu if case.on_gpu else 2), ("update",))


def _probes(case: Case) -> Iterator[Part]:
    """Probes measure a float32 backbone of their own, which every rank holds whole."""
    if case.settings.eval.every_epochs:
        numbers = case.sizes.frozen.get("backbone", 0) + sum(case.trained.get("backbone", ()))
        yield Part("backbone of the probes", numbers * 4, MOMENTS)


# What the method holds -----------------------------------------------------------------------------------


def _shard(case: Case) -> ShardBytes:
    """Of a sharded head's rows; all zero without one."""
    return shard_bytes(case.settings.head, case.shard_rows, case.sizes.width, case.crops * case.ranks)


def _head(case: Case) -> Iterator[Part]:
    """The rows of a sharded head, and what a classifier of either kind needs while it works."""
    if not case.rows:
        return
    form, rows, crops = case.settings.head, case.rows, case.crops
    if case.shard_rows:
        # A sharded head sees the crops of all ranks.
        crops *= case.ranks
        rows = rows_in_play(form, case.shard_rows, crops)
        shard = _shard(case)
        yield Part("sharded head: weight", shard.weight, MOMENTS)
        yield Part("sharded head: gradient", shard.gradient, STEP)
        yield Part("sharded head: moments" + ", lean" * (form.optimizer == "lean"), shard.moments, STEP)
        in_play = "sharded head: rows in play, their gradients"
        yield Part(in_play, shard.in_play, ("backward", "reduce", "update"))
    work = work_bytes(form, rows, case.sizes.width, crops, product=case.compute, on_gpu=case.on_gpu)
    yield Part("head at work", work, ("backward",))


def _forward(case: Case) -> Iterator[Part]:
    """Pixels, and what backbone and loss keep for their backward pass."""
    compute, residual = case.compute, case.weight
    # Numbers of a micro batch's crops; as uint8 also their bytes.
    pixels = 3 * case.settings.views.crop_px**2 * case.crops
    cast = 2 if compute == 2 else 0
    yield Part("crops, float32" + " and cast" * (cast > 0), pixels * (4 + cast), ("backward",))
    yield Part("crops waiting, uint8", pixels * (RING_SLOTS - 1 + case.settings.data.threads), STEP, True)
    if case.on_gpu:
        # One piece of memory is filled while the card computes with the other (data/sheet.py).
        yield Part("crops copied, uint8", pixels * 2, STEP)
    if case.is_autocast and case.stage != 3:
        # A network that runs without gradients, such as a teacher, leaves no copies behind.
        copied = case.engine + case.sizes.frozen.get("backbone", 0)
        yield Part("bf16 copies of weights", copied * 2, ("backward",))
    stages = case.sizes.stages
    # Backward passes of parts follow one another, so only the largest of what they need counts.
    passing = {"activations": 0}
    if stages is not None:
        checkpointing = case.settings.engine.activation_checkpointing
        saved = saved_bytes(
            stages, case.crops, compute=compute, residual=residual, checkpointing=checkpointing
        )
        yield Part("activations" + ", checkpointed" * checkpointing, saved, ("backward",))
        passing["activations"] = passing_bytes(stages, case.crops, compute=compute, residual=residual)
    method = method_class(case.settings.method)
    for name, activations in method.loss_bytes(case.settings, case.sizes.width, compute).items():
        yield Part(name, activations.kept, ("backward",))
        passing[name] = activations.passing
    largest = max(passing, key=passing.__getitem__)
    yield Part(f"gradients of {largest}", passing[largest], ("backward",))


def _save(case: Case) -> Iterator[Part]:
    """Copies for a checkpoint. Ranks take parameters in turn; a CPU need not copy a sharded head's rows."""
    sizes = [size for parameters in case.trained.values() for size in parameters]
    # The same assignment as in EngineState.snapshot.
    owners = dist.spread(sizes, case.ranks)
    most = max(
        sum(size for size, owner in zip(sizes, owners, strict=True) if owner == rank)
        for rank in range(case.ranks)
    )
    kinds = 4 if case.settings.optimizer.average_decay else 3  # masters, two moments, averages
    frozen = sum(case.sizes.frozen.values())
    yield Part("copies for a checkpoint", most * 4 * kinds + frozen * 4 // case.ranks, ("save",), True)
    if case.on_gpu:
        shard = _shard(case)
        rows = shard.weight + shard.moments
        yield Part("sharded head's rows for a checkpoint, host", rows, ("save",), True)
