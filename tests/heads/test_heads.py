"""Both shapes of the head against plain cross-entropy on full logits: values and gradients, on real ranks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.heads.reference import mixed_cross_entropy
from vitds import dist
from vitds.batch import Targets
from vitds.errors import SettingsError, ShapeError
from vitds.heads import DenseHead, ShardedHead
from vitds.heads.dense import initial_rows
from vitds.heads.sharded import row_range

WIDTH, M = 24, 30


def make_rows(rows: int) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(3)
    features = torch.randn(M, WIDTH, generator=generator) * 4
    a, b = (torch.randint(0, rows, (M,), generator=generator) for _ in range(2))
    lam = 0.5 + torch.rand(M, generator=generator) / 2
    weight = torch.rand(M, generator=generator) * (torch.arange(M) < M - 4) / M  # the last rows are padding
    return features, Targets(a, b, lam, weight, torch.zeros(M, dtype=torch.int64))


def reference(rows: int, bias: bool, label_smoothing: float) -> dict[str, np.ndarray]:
    features, targets = make_rows(rows)
    features.requires_grad_()
    weight = initial_rows(0, rows, WIDTH, 7).requires_grad_()
    shift = torch.zeros(rows, requires_grad=True) if bias else None
    losses = mixed_cross_entropy(features, weight, shift, targets.a, targets.b, targets.lam, label_smoothing)
    (losses * targets.weight).sum().backward()
    found = {"losses": losses, "features": features.grad, "weight": weight.grad}
    return {name: value.detach().numpy() for name, value in (found | ({"bias": shift.grad} if bias else {})).items()}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_dense_head_equals_cross_entropy(bias: bool, label_smoothing: float) -> None:
    features, targets = make_rows(50)
    features.requires_grad_()
    head = DenseHead(50, WIDTH, bias=bias, label_smoothing=label_smoothing, seed=7)
    losses = head(features, targets)
    (losses * targets.weight).sum().backward()
    expected = reference(50, bias, label_smoothing)
    np.testing.assert_allclose(losses.detach(), expected["losses"], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(features.grad, expected["features"], atol=1e-6)
    np.testing.assert_allclose(head.linear.weight.grad, expected["weight"], atol=1e-6)


def sharded_on_a_rank(rows: int, bias: bool, label_smoothing: float) -> dict[str, np.ndarray]:
    """This rank's part of a sharded head's step; the features' gradient as DeepSpeed's average over ranks would leave it."""
    features, targets = make_rows(rows)
    own = slice(dist.rank() * M // dist.world_size(), (dist.rank() + 1) * M // dist.world_size())
    mine = features[own].clone().requires_grad_()
    head = ShardedHead(rows, WIDTH, bias=bias, label_smoothing=label_smoothing, seed=7)
    part = Targets(*(getattr(targets, name)[own] for name in ("a", "b", "lam", "weight", "group")))
    losses, everyone = head(mine, part)
    (losses * everyone.weight).sum().backward()
    found = {"losses": losses.detach(), "features": mine.grad / dist.world_size(), "weight": head.weight.grad}
    return {name: value.numpy() for name, value in (found | ({"bias": head.bias.grad} if bias else {})).items()}


@pytest.mark.parametrize(
    ("ranks", "rows", "bias", "label_smoothing"), [(1, 50, True, 0.1), (2, 51, True, 0.1), (3, 50, False, 0.0), (3, 3, True, 0.1)]
)
def test_sharded_head_equals_cross_entropy_on_real_ranks(rank_pool, ranks: int, rows: int, bias: bool, label_smoothing: float) -> None:
    parts = rank_pool(ranks).run(sharded_on_a_rank, rows, bias, label_smoothing)
    expected = reference(rows, bias, label_smoothing)
    for part in parts:
        np.testing.assert_allclose(part["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    for name in ("features", "weight", "bias") if bias else ("features", "weight"):
        np.testing.assert_allclose(np.concatenate([part[name] for part in parts]), expected[name], atol=1e-6, err_msg=name)


def test_sharded_rows_start_as_the_dense_head_does() -> None:
    whole = DenseHead(3000, WIDTH, bias=True, label_smoothing=0.1, seed=7).linear.weight
    parts = [initial_rows(*row_range(3000, rank, 4), WIDTH, 7) for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole)
    assert 0.019 < float(whole.std()) < 0.021


def test_equal_logits_give_log_n() -> None:
    head = DenseHead(2040, WIDTH, bias=True, label_smoothing=0.1, seed=0)
    losses = head(torch.zeros(M, WIDTH), make_rows(2040)[1])
    assert torch.allclose(losses, torch.tensor(7.621), atol=1e-3)  # METHOD 3.3: ln 2040


def test_features_of_another_width_are_refused() -> None:
    features, targets = make_rows(50)
    for head in (DenseHead(50, 32, bias=True, label_smoothing=0.1, seed=0), ShardedHead(50, 32, bias=True, label_smoothing=0.1, seed=0)):
        with pytest.raises(ShapeError, match="features are 24 wide, the head's rows 32"):
            head(features, targets)


def too_few_rows() -> str:
    with pytest.raises(SettingsError) as caught:
        ShardedHead(1, WIDTH, bias=True, label_smoothing=0.1, seed=0)
    return str(caught.value)


def test_fewer_instances_than_ranks_are_refused(rank_pool) -> None:
    assert "1 instances cannot be spread over 2 ranks; use dense" in rank_pool(2).run(too_few_rows)[0]
