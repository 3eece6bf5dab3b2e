"""Steps that a card decides on by itself, and of which the host reads a step later; here a processor does.

torch's fused AdamW takes the flag and the divisor of the gradients on a processor too.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.engine.training import small_run, untimed
from tests.methods.test_devices import BareEngine, built, micro_batch
from vitds import dist
from vitds.config.tree import Settings
from vitds.engine import build, late
from vitds.engine.head_shard import HeadShard
from vitds.engine.loop import Launched, Trainer
from vitds.engine.optimizer import build_optimizer
from vitds.engine.update import JointUpdate
from vitds.errors import Stopped
from vitds.methods.base import Method
from vitds.runs.checkpoint import list_checkpoints
from vitds.schedule import LearningRate

CPU = torch.device("cpu")
WORDS = ["head.kind=sharded", "backbone.options={patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3}"]


def stepped(
    words: list[str], *, is_late: bool, steps: int = 2, is_unsound: bool = False
) -> dict[str, Tensor]:
    """Weights, moments and counters of engine and head after some steps; the second may be unsound."""
    settings, method, draws = built("idmm_digits", [*WORDS, *words])
    engine = BareEngine(method.module.train(), settings, {})
    engine.optimizer = build_optimizer(method.module, settings.optimizer, lr_scales={}, on_host=True)
    engine.backward = torch.Tensor.backward
    heads = [HeadShard(head, settings, CPU, LearningRate.of(settings, 3)) for head in method.outside]
    update = JointUpdate(engine, heads, settings.optimizer, is_late=is_late)
    batch = micro_batch(settings, draws)
    for step in range(steps):
        update.set_schedule(1e-2, 0.05, 0)
        draws.write(batch.draws.masks)
        update.backward(method.losses(engine, method.prepare(batch, settings, CPU), step))
        norms = update.gradient_norms()
        bad = float(is_unsound and step == 1)
        if is_late:
            update.apply_late(torch.tensor(bad, dtype=torch.float64), norms)
        else:
            update.apply(not bad, norms.tolist(), step=step, updates=step)
    optimizers = {"engine": engine.optimizer, "head": heads[0].optimizer}
    return {
        f"{part} {number} {name}": value.clone()
        for part, optimizer in optimizers.items()
        for number, (weight, state) in enumerate(optimizer.state.items())
        for name, value in {"weight": weight.detach(), **state}.items()
    }


@pytest.mark.parametrize("is_unsound", [False, True])
def test_engine_and_head_step_or_neither_as_the_device_says(is_unsound: bool) -> None:
    ours, theirs = (stepped([], is_late=each, is_unsound=is_unsound) for each in (True, False))
    assert ours.keys() == theirs.keys() and {name.split()[0] for name in ours} == {"engine", "head"}
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    steps = {float(value) for name, value in ours.items() if name.endswith("step")}
    assert steps == ({1.0} if is_unsound else {2.0})


def test_gradients_are_clipped_by_what_the_optimizer_divides_them_by() -> None:
    # The engine's norm and the head's are far above. The bare engine does not clip, so only heads compare.
    clipped, reference, whole = (
        stepped(words, is_late=is_late, steps=1)
        for words, is_late in (
            (["optimizer.clip_norm=1e-4"], True),
            (["optimizer.clip_norm=1e-4"], False),
            ([], True),
        )
    )
    for name in (name for name in clipped if name.startswith("head") and "exp_avg" in name):
        torch.testing.assert_close(clipped[name], reference[name], rtol=1e-5, atol=0)
        assert not torch.allclose(clipped[name], whole[name], rtol=0.1)
    moments = [name for name in clipped if name.startswith("engine") and name.endswith("exp_avg")]
    # A tenth of the gradient, whose norm is now the limit.
    norm = float(torch.cat([clipped[name].flatten() for name in moments]).norm())
    assert norm == pytest.approx(1e-5, rel=1e-3)


@pytest.mark.parametrize(
    ("recipe", "words", "others", "expected"),
    [
        ("idmm_digits", ["head.kind=dense"], {}, True),
        ("idmm_digits", ["head.kind=sharded", "optimizer.clip_norm=1"], {}, True),
        ("idmm_digits", [], {"zero_stage": 1}, False),
        ("idmm_digits", [], {"device": CPU}, False),
        ("idmm_digits", ["engine.precision=fp16"], {}, False),
        ("idmm_digits", ["head.kind=sharded", "head.optimizer=lean"], {}, False),
        ("idmm_digits", ["head.kind=sharded", "head.sample_rate=0.5", "head.lazy=true"], {}, False),
        ("idmm_digits", ["optimizer.average_decay=0.9"], {}, False),
        ("mocov3_digits", [], {}, False),
        ("dino_digits", [], {}, False),
        ("mae_digits", [], {}, True),
    ],
    ids=str,
)
def test_a_step_is_late_where_nothing_on_the_host_waits_for_it(
    recipe: str, words: list[str], others: dict[str, Any], expected: bool
) -> None:
    settings, method, _ = built(recipe, words)
    asked = {"zero_stage": 0, "device": torch.device("cuda", 0)} | others
    assert late.may_be_late(settings, method, **asked) is expected


def run_of(run: str, data: tuple[str, str], *, is_late: bool, stop_at: int = -1, **options: Any) -> list[str]:
    """A run with fused optimizers, late or not: launches, readings and saves in their order.

    In step 1 the head's rows of the last rank have a gradient that is not finite; before step `stop_at` that
    rank hears a signal.
    """
    events: list[str] = []
    launch, settle, save, norm = Trainer._launch, Trainer._settle, Trainer.save, HeadShard.gradient_norm
    is_last = dist.rank() == dist.world_size() - 1

    def launched(trainer: Trainer, step: int, batches: Any, live: Any, signals: Any) -> Launched:
        if step == stop_at and is_last:
            signals.noted = signal.SIGTERM
        events.append(f"launch {step}")
        return launch(trainer, step, batches, live, signals)

    def settled(trainer: Trainer, of: Launched) -> Any:
        events.append(f"read {of.step}")
        return settle(trainer, of)

    def saved(trainer: Trainer, live: Any) -> None:
        events.append(f"save {trainer.progress.step}")
        save(trainer, live)

    def with_inf(head: HeadShard) -> Tensor:
        if events[-1] == "launch 1" and is_last:
            head.head.weight.grad[0, 0] = torch.inf
        return norm(head)

    def fused(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        return build_optimizer(*arguments, **options | {"on_host": True})

    def as_asked(settings: Settings, method: Method, **others: Any) -> bool:
        return is_late

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_launch", launched)
        patch.setattr(Trainer, "_settle", settled)
        patch.setattr(Trainer, "save", saved)
        patch.setattr(HeadShard, "gradient_norm", with_inf)
        patch.setattr(build, "build_optimizer", fused)
        patch.setattr(late, "may_be_late", as_asked)
        try:
            small_run(run, data, head__kind="sharded", **options)
        except Stopped as stopped:
            events.append(str(stopped).partition(",")[0])
    return events


def test_a_late_run_is_read_a_step_later_and_ends_the_same(rank_pool, digit_files, tmp_path: Path) -> None:
    found = {}
    for name in ("late", "prompt"):
        options = {"is_late": name == "late", "checkpoint__every_steps": 4}
        (found[name],) = rank_pool(1).run(run_of, str(tmp_path / name), digit_files, **options)
    # Three steps an epoch. An epoch's end, a save and the run's end read all that was launched.
    late_order = "launch 0, launch 1, read 0, launch 2, read 1, read 2, launch 3, read 3, save 4, launch 4, "
    assert ", ".join(found["late"]) == late_order + "launch 5, read 4, read 5, save 6"
    prompt = [event for event in found["prompt"] if not event.startswith("save")]
    assert prompt == [f"{word} {step}" for step in range(6) for word in ("launch", "read")]
    lines = untimed(tmp_path / "late")
    assert lines == untimed(tmp_path / "prompt") and '"skipped": 1' in lines[-1]
    files = [(tmp_path / name / "backbone.safetensors").read_bytes() for name in found]
    assert files[0] == files[1]


def test_a_signal_stops_a_late_run_a_step_later_on_all_ranks_and_it_goes_on_to_the_same(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    pool = rank_pool(2)
    pool.run(run_of, str(tmp_path / "whole"), digit_files, is_late=True)
    both = pool.run(run_of, str(tmp_path / "stopped"), digit_files, is_late=True, stop_at=3)
    # What step 3 says is read when step 4 is under way, and the save waits for that.
    order = "launch 3, launch 4, read 3, read 4, save 5, stopped by a signal after step 5 of 6"
    assert [", ".join(events[-6:]) for events in both] == [order] * 2
    pool.run(run_of, str(tmp_path / "stopped"), digit_files, is_late=True)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")
    weights = [(tmp_path / name / "backbone.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert weights[0] == weights[1] and list_checkpoints(tmp_path / "stopped" / "checkpoints")
