"""Sampled negatives against sums written out over the rows that are drawn, one stratum after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.heads.reference import drawn_counts, full_logits, sampled_loss
from tests.heads.test_heads import WIDTH, M, differing, form, make_rows, own_part, whole
from vitds import dist
from vitds.errors import SettingsError
from vitds.heads import ShardedHead
from vitds.heads.dense import initial_rows
from vitds.heads.sampling import drawn_rows
from vitds.heads.sharded import row_range

ROWS, RATE, SEED = 203, 0.15, 7


def sampled_on_a_rank(options: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """As test_heads.sharded_on_a_rank, with a part of the rows."""
    features, part = own_part(*make_rows(ROWS))
    head = ShardedHead(ROWS, WIDTH, sample_rate=RATE, **options)
    (head(features.requires_grad_(), part, step) * dist.world_size()).sum().backward()
    losses, _ = head.crop_losses(features.detach(), part, step)
    found = {"losses": losses.detach(), "features": features.grad / dist.world_size()}
    return {
        name: value.numpy()
        for name, value in (found | {name: value.grad for name, value in head.named_parameters()}).items()
    }


def reference(options: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    features, targets = make_rows(ROWS)
    weight = initial_rows(0, ROWS, WIDTH, SEED).requires_grad_()
    shift = torch.zeros(ROWS, requires_grad=True) if options["bias"] else None
    logits = full_logits(features.requires_grad_(), weight, shift, options["temperature"])
    counts = drawn_counts(ROWS, RATE, SEED, step)
    counts[targets.a], counts[targets.b] = 1.0, 1.0
    losses = sampled_loss(logits, counts, targets, options["label_smoothing"])
    (losses * targets.weight).sum().backward()
    found = {"losses": losses, "features": features.grad, "weight": weight.grad}
    return {
        name: value.detach().numpy()
        for name, value in (found | ({"bias": shift.grad} if shift is not None else {})).items()
    }


@pytest.mark.parametrize(
    ("ranks", "options"),
    [(1, form()), (2, form(bias=False, label_smoothing=0.0)), (3, form()), (3, form(temperature=0.2))],
    ids=str,
)
def test_sampled_loss_equals_the_plain_sums_on_real_ranks(
    rank_pool, ranks: int, options: dict[str, Any]
) -> None:
    found = whole(rank_pool(ranks).run(sampled_on_a_rank, options, 5))
    assert differing(found, reference(options, 5)) == []


@pytest.mark.parametrize("rate", [0.03, 0.15, 0.3, 0.7, 1.0])
def test_drawn_rows_are_one_a_stratum_however_they_are_spread(rate: float) -> None:
    expected = drawn_counts(ROWS, rate, SEED, step=3)
    for ranks in (1, 3, 7):
        parts = [
            drawn_rows(ROWS, *row_range(ROWS, rank, ranks), rate=rate, seed=SEED, step=3)
            for rank in range(ranks)
        ]
        assert torch.equal(torch.cat(parts), expected)
    assert float(expected.sum()) == ROWS  # the strata cover all rows
    assert torch.equal(expected, torch.ones(ROWS)) == (rate == 1.0)


def drawn_in_step(step: int, rows: int = ROWS, rate: float = RATE) -> Tensor:
    return drawn_rows(rows, 0, rows, rate=rate, seed=SEED, step=step)


def test_each_step_draws_anew_and_every_row_counts_once_on_average() -> None:
    assert not torch.equal(drawn_in_step(0), drawn_in_step(1))
    mean = torch.stack([drawn_in_step(step) for step in range(4000)]).mean(0)
    assert (mean - 1).abs().max() < 5 * (1 / RATE / 4000) ** 0.5  # five deviations of a mean of 4,000


def test_sum_of_exponentials_is_unbiased_and_its_logarithm_a_little_low() -> None:
    rows, rate = 2000, 0.1
    exponentials = torch.randn(rows, generator=torch.Generator().manual_seed(1)).double().exp()
    sums = (
        torch.stack([(drawn_in_step(step, rows, rate) * exponentials).sum() for step in range(4000)])
        / exponentials.sum()
    )
    assert abs(sums.mean() - 1) < 4 * sums.std() / 4000**0.5
    bias = (sums.log() - (sums - 1)).mean()  # the part of the logarithm that does not average out
    assert -0.55 * sums.var() < bias < -0.45 * sums.var() < 0  # by Taylor's formula half the variance


def refused_rate() -> str:
    with pytest.raises(SettingsError) as caught:
        ShardedHead(20, WIDTH, sample_rate=0.1, **form())
    return str(caught.value)


def test_too_few_rows_a_rank_to_draw_from_are_refused(rank_pool) -> None:
    said = (
        "head.sample_rate 0.1 of 20 instances over 2 ranks may leave a rank without a row; "
        "take 0.2 or more, or 1"
    )
    assert rank_pool(2).run(refused_rate) == [said] * 2
    assert ShardedHead(20, WIDTH, sample_rate=0.1, **form()).crop_losses(*make_rows(20))[0].shape == (M,)
