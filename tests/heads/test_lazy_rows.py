"""Rows that are updated only when they are in play, against torch's AdamW on all rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.heads.reference import Allocations, lean_adamw
from tests.heads.test_heads import make_rows
from vitds.config.load import load_settings
from vitds.config.tree import Head, Settings
from vitds.engine.head_shard import HeadShard
from vitds.errors import SettingsError
from vitds.heads.lazy import LazyRows
from vitds.heads.optimizer import build_row_optimizer
from vitds.heads.sampling import drawn_rows
from vitds.heads.sharded import ShardedHead
from vitds.schedule import LearningRate

ROWS, WIDTH, STEPS, WEIGHT_DECAY = 40, 8, 400, 0.3
RATES = 0.02 * np.linspace(1, 0.2, STEPS) ** 2


class Rows(nn.Module):
    """What LazyRows sees of a head."""

    def __init__(self, weight_nD: Tensor) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(weight_nD.clone()), nn.Parameter(torch.zeros(len(weight_nD)))


def first_weight() -> Tensor:
    return torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(0)) * 0.5


def plays(step: int, rows: int = 3) -> tuple[Tensor, Tensor]:
    """The rows in play in a step (k,), and their gradient (k, D); row 0 is never one of them."""
    generator = torch.Generator().manual_seed(step)
    rows_k = (1 + torch.randperm(ROWS - 1, generator=generator)[:rows]).sort().values
    return rows_k, torch.randn(rows, WIDTH, generator=generator) * 0.1


def lazily(kind: str, steps: int = STEPS, **options: Any) -> tuple[Rows, LazyRows]:
    module = Rows(first_weight())
    settings = Settings().optimizer.model_copy(update=dict(weight_decay=WEIGHT_DECAY) | options)
    lazy = LazyRows(module, build_row_optimizer(module, kind, settings), RATES, seed=0, first_row=0)
    for step in range(steps):
        lazy.group["lr"] = RATES[step]
        rows_k, gradient_kD = plays(step)
        weight_kD, bias_k = lazy.take(rows_k, step)
        ((weight_kD * gradient_kD).sum() + (bias_k * gradient_kD[:, 0]).sum()).backward()
        lazy.step(*lazy.gradients(), step)
    lazy.settle(steps)
    return module, lazy


def densely(optimizer_of: Any, **options: Any) -> Rows:
    module = Rows(first_weight())
    optimizer = optimizer_of(module.parameters(), lr=1.0, weight_decay=WEIGHT_DECAY, **options)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATES[step]
        rows_k, gradient_kD = plays(step)
        module.weight.grad = torch.zeros(ROWS, WIDTH).index_copy_(0, rows_k, gradient_kD)
        module.bias.grad = torch.zeros(ROWS).index_copy_(0, rows_k, gradient_kD[:, 0])
        optimizer.step()
    return module


def moved(module: Rows) -> float:
    return float((module.weight - first_weight()).detach().abs().mean())


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.99)], ids=str)
def test_lazy_adamw_equals_adamw_on_all_rows_to_rounding(betas: tuple[float, float]) -> None:
    expected, (found, _) = densely(torch.optim.AdamW, betas=betas), lazily("adamw", betas=betas)
    assert moved(expected) > 0.1
    for name in ("weight", "bias"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-4, atol=1e-4)


def test_the_closed_form_of_the_decay_is_that_of_sgd() -> None:
    """A row that was never in play has no momentum: it only decays, as SGD's rows without a gradient do."""
    expected, (found, _) = densely(torch.optim.SGD), lazily("adamw")
    decayed = first_weight()[0] * float(np.prod(1 - RATES * WEIGHT_DECAY))
    # torch's SGD adds the decay to the gradient, which for a row without one is the same product.
    torch.testing.assert_close(expected.weight[0].detach(), decayed, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.weight[0].detach(), decayed, rtol=1e-5, atol=0)


def test_lazy_lean_rows_stay_near_the_plain_lean_ones() -> None:
    """The first moment in bfloat16 is rounded when it is touched, which is not at every step."""
    steps = 60
    gradients = [torch.zeros(ROWS, WIDTH).index_copy_(0, *plays(step)) for step in range(steps)]
    options = dict(betas=(0.9, 0.999), eps=1e-8, weight_decay=WEIGHT_DECAY)
    rates, RATES[:] = RATES.copy(), 0.01
    try:
        expected = lean_adamw(first_weight(), gradients, lr=0.01, **options)
        found, _ = lazily("lean", steps)
    finally:
        RATES[:] = rates
    assert (expected - first_weight()).abs().mean() > 0.05
    assert (found.weight - expected).abs().max() < 0.02 * (expected - first_weight()).abs().max()


def shard(rows: int, settings: Settings) -> HeadShard:
    form = settings.head.form | {"sample_rate": settings.head.sample_rate, "seed": settings.seed}
    head = ShardedHead(rows, WIDTH, **form)
    return HeadShard(head, settings, torch.device("cpu"), LearningRate(peak=1e-2, warmup=5, total=len(RATES)))


def test_a_step_touches_and_makes_no_more_than_the_rows_in_play() -> None:
    settings = Settings(head=Head(kind="sharded", sample_rate=0.01, lazy=True), engine={"precision": "fp32"})
    head = shard(20_000, settings)
    before = {name: tensor.clone() for name, tensor in head.snapshot().items()}
    features, targets = make_rows(20_000)
    features = features[:, :WIDTH].contiguous().requires_grad_()
    with Allocations() as made:
        head.head(features, targets, 0).sum().backward()
        head.update(True, norm=float(head.gradient_norm()), step=0, loss_scale=1.0)
    assert max(made.numbers) <= 20_000  # how often each row counts is a number a row; nothing has (n, D)
    touched = (head.snapshot()["seen"] > before["seen"]).nonzero().squeeze(1)
    drawn = drawn_rows(20_000, 0, 20_000, rate=0.01, seed=0, step=0).nonzero().squeeze(1)
    assert set(touched.tolist()) == {*drawn.tolist(), *targets.a.tolist(), *targets.b.tolist()}
    for name, tensor in head.snapshot().items():
        assert set((tensor != before[name]).reshape(20_000, -1).any(1).nonzero().squeeze(1).tolist()) <= set(
            touched.tolist()
        ), name


def test_a_step_that_is_called_off_leaves_nothing_behind() -> None:
    settings = Settings(head=Head(kind="sharded", sample_rate=0.1, lazy=True), engine={"precision": "fp32"})
    head = shard(500, settings)
    features, targets = make_rows(500)
    before = head.snapshot()["weight"].detach().clone()
    head.head(features[:, :WIDTH].contiguous().requires_grad_(), targets, 3).sum().backward()
    head.update(False, norm=float(head.gradient_norm()), step=3, loss_scale=1.0)
    assert head.lazy.taken == [] and int(head.lazy.seen_n.max()) == 3
    # What differs is three steps' decay of the rows in play.
    torch.testing.assert_close(head.snapshot()["weight"].detach(), before, rtol=2e-4, atol=0)


def test_micro_steps_add_up_whichever_rows_they_share() -> None:
    module = Rows(first_weight())
    lazy = LazyRows(
        module, build_row_optimizer(module, "adamw", Settings().optimizer), RATES, seed=0, first_row=0
    )
    for rows_k in (torch.tensor([2, 5]), torch.tensor([5, 7])):
        sum(copy.sum() for copy in lazy.take(rows_k, 0)).backward()
    rows_k, (weight_kD, bias_k) = lazy.gradients()
    assert rows_k.tolist() == [2, 5, 7] and bias_k.tolist() == [1, 2, 1]
    assert torch.equal(weight_kD, bias_k[:, None].expand(3, WIDTH)) and lazy.taken == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["head.lazy=true"], "lazy is for sampled negatives, but with sample_rate 1 every row is in play"),
        (
            ["head.row_dtype=bf16"],
            "row_dtype bf16 needs the lean optimizer, which rounds rows by chance, got optimizer adamw",
        ),
    ],
)
def test_settings_that_contradict_each_other_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        load_settings(recipe=None, command="pretrain", assignments=words, flags={})
