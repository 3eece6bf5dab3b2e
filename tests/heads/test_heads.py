"""Both shapes of the head against plain cross-entropy on full logits: values and gradients, on real ranks."""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import numpy as np
import pytest
import torch
import torch.distributed as td
from torch import Tensor, nn

from tests.heads.reference import Allocations, full_logits, mixed_cross_entropy
from vitds import dist
from vitds.batch import Targets
from vitds.engine import process  # noqa: F401  switches off what DeepSpeed would compile at its first start
from vitds.errors import DataError, SettingsError, ShapeError
from vitds.heads import DenseHead, ShardedHead, logsumexp
from vitds.heads.dense import initial_rows
from vitds.heads.sharded import bytes_sent, row_range

WIDTH, M = 24, 30
NAMES = ("a", "b", "lam", "weight", "group")
COLLECTIVES = (
    "all_reduce",
    "all_gather",
    "all_gather_into_tensor",
    "all_to_all_single",
    "broadcast",
    "reduce_scatter_tensor",
)


def make_rows(rows: int, seed: int = 3) -> tuple[Tensor, Targets]:
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(M, WIDTH, generator=generator) * 4
    a, b = (torch.randint(0, rows, (M,), generator=generator) for _ in range(2))
    lam = 0.5 + torch.rand(M, generator=generator) / 2
    lam[::5] = 1.0  # rows that are not mixed
    # Padding at the end: with 3 ranks, all of the last one's crops.
    weight = torch.rand(M, generator=generator) * (torch.arange(M) < M - 12) / M
    return features, Targets(a, b, lam, weight, torch.zeros(M, dtype=torch.int64))


def form(bias: bool = True, label_smoothing: float = 0.1, temperature: float | None = None) -> dict[str, Any]:
    return {"bias": bias, "label_smoothing": label_smoothing, "temperature": temperature, "seed": 7}


def own_part(features: Tensor, targets: Targets) -> tuple[Tensor, Targets]:
    own = slice(dist.rank() * M // dist.world_size(), (dist.rank() + 1) * M // dist.world_size())
    return features[own].clone(), Targets(*(getattr(targets, name)[own] for name in NAMES))


def reference(
    rows: int, *, bias: bool, label_smoothing: float, temperature: float | None, seed: int
) -> dict[str, np.ndarray]:
    features, targets = make_rows(rows)
    features.requires_grad_()
    weight = initial_rows(0, rows, WIDTH, seed).requires_grad_()
    shift = torch.zeros(rows, requires_grad=True) if bias else None
    losses = mixed_cross_entropy(
        full_logits(features, weight, shift, temperature), targets.a, targets.b, targets.lam, label_smoothing
    )
    (losses * targets.weight).sum().backward()
    found = {"losses": losses, "features": features.grad, "weight": weight.grad}
    return {
        name: value.detach().numpy()
        for name, value in (found | ({"bias": shift.grad} if bias else {})).items()
    }


def dense(rows: int, kept: bool, **options: Any) -> dict[str, np.ndarray]:
    features, targets = make_rows(rows)
    features.requires_grad_()
    head = DenseHead(rows, WIDTH, keep_bytes=1 << 20 if kept else 0, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logsumexp, "choose_tiling", partial(logsumexp.choose_tiling, tile_rows=16))
        losses = head.crop_losses(features, targets)
    (losses * targets.weight).sum().backward()
    found = {"losses": losses, "features": features.grad} | {
        name: value.grad for name, value in head.named_parameters()
    }
    return {name: value.detach().numpy() for name, value in found.items()}


def differing(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> list[str]:
    """Names of losses and gradients that are not the same to rounding, or stand on one side alone."""

    def is_same(name: str) -> bool:
        ours, theirs = found[name], expected[name]
        rtol, atol = (1e-5, 1e-5) if name == "losses" else (1e-7, 1e-6)
        return ours.shape == theirs.shape and np.allclose(ours, theirs, rtol=rtol, atol=atol)

    one_sided = found.keys() ^ expected.keys()
    return sorted(one_sided | {name for name in found.keys() & expected.keys() if not is_same(name)})


@pytest.mark.parametrize(
    "options",
    [form(bias=False), form(), form(label_smoothing=0.0), form(temperature=0.2), form(False, 0.0, 0.05)],
    ids=str,
)
@pytest.mark.parametrize("kept", [True, False], ids=["kept", "recomputed"])
@pytest.mark.parametrize("rows", [50, 3])
def test_dense_head_equals_cross_entropy(options: dict[str, Any], kept: bool, rows: int) -> None:
    assert differing(dense(rows, kept, **options), reference(rows, **options)) == []


@pytest.mark.parametrize("head_of", [DenseHead, ShardedHead])
@pytest.mark.parametrize(
    ("keep_bytes", "products"), [(4 * M * 50, 1), (4 * M * 50 - 1, 2)], ids=["kept", "recomputed"]
)
def test_logits_that_fit_keep_bytes_are_made_once(
    head_of: type, keep_bytes: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    real = logsumexp.tile_logits
    monkeypatch.setattr(logsumexp, "tile_logits", lambda *given: made.append(1) or real(*given))
    features, targets = make_rows(50)
    head_of(50, WIDTH, keep_bytes=keep_bytes, **form())(features.requires_grad_(), targets).sum().backward()
    assert len(made) == products


def sharded_on_a_rank(rows: int, options: dict[str, Any], micro_steps: int = 1) -> dict[str, np.ndarray]:
    """This rank's part of a step; the features' gradient as DeepSpeed's average over ranks would leave it."""
    features, part = own_part(*make_rows(rows))
    features.requires_grad_()
    head = ShardedHead(rows, WIDTH, **options)
    for _ in range(micro_steps):
        # Each rank differentiates its own part with the factor R that the engine's average takes out again.
        (head(features, part) * dist.world_size()).sum().backward()
    losses, _ = head.crop_losses(features.detach(), part)
    found = {"losses": losses.detach(), "features": features.grad / dist.world_size()}
    return {
        name: value.numpy()
        for name, value in (found | {name: value.grad for name, value in head.named_parameters()}).items()
    }


def whole(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """All ranks' rows together; the losses are the same on each."""
    assert all(np.array_equal(part["losses"], parts[0]["losses"]) for part in parts)
    return {
        name: part if name == "losses" else np.concatenate([one[name] for one in parts])
        for name, part in parts[0].items()
    }


@pytest.mark.parametrize(
    ("ranks", "rows", "options"),
    [
        (1, 50, form()),
        (2, 51, form()),
        (2, 2, form(bias=False, temperature=0.2)),
        (3, 50, form(bias=False, label_smoothing=0.0)),
        (3, 50, form(temperature=0.1)),
        (3, 3, form()),
    ],
    ids=str,
)
def test_sharded_head_equals_cross_entropy_on_real_ranks(
    rank_pool, ranks: int, rows: int, options: dict[str, Any]
) -> None:
    found = whole(rank_pool(ranks).run(sharded_on_a_rank, rows, options))
    assert differing(found, reference(rows, **options)) == []


@pytest.mark.parametrize("temperature", [None, 0.2])
def test_bfloat16_rows_give_the_loss_of_their_values_and_its_gradient_rounded(
    temperature: float | None,
) -> None:
    features, targets = make_rows(50)
    found = {}
    for dtype in (torch.bfloat16, torch.float32):
        head, x = (
            ShardedHead(50, WIDTH, dtype=dtype, **form(temperature=temperature)),
            features.clone().requires_grad_(),
        )
        head.weight.data.copy_(head.weight.data.bfloat16())
        losses, _ = head.crop_losses(x, targets)
        (losses * targets.weight).sum().backward()
        assert head.weight.grad.dtype == dtype
        found[dtype] = (losses.detach(), x.grad, head.weight.grad.float())
    for rounded, exact in zip(found[torch.bfloat16], found[torch.float32], strict=True):
        # A row's sum of targets is rounded at each addition.
        torch.testing.assert_close(rounded, exact, rtol=0.02, atol=5e-4)
    # Losses and the features' gradients are not rounded.
    torch.testing.assert_close(found[torch.bfloat16][:2], found[torch.float32][:2], rtol=1e-5, atol=1e-5)


def test_micro_steps_add_up_in_the_sharded_heads_memory() -> None:
    once, thrice = (sharded_on_a_rank(50, form(), micro_steps) for micro_steps in (1, 3))
    for name in ("features", "weight", "bias"):
        np.testing.assert_allclose(thrice[name], 3 * once[name], rtol=1e-5, atol=1e-7)


def test_a_new_step_overwrites_the_sharded_heads_memory() -> None:
    features, targets = make_rows(50)
    head = ShardedHead(50, WIDTH, **form())
    gradients = []
    for _ in range(2):
        head(features, targets).sum().backward()
        gradients.append(head.weight.grad.clone())
        assert head.weight.grad is head.gradient
        head.weight.grad.fill_(torch.nan)
        head.zero_grad(set_to_none=True)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("temperature", [None, 0.1])
def test_a_step_makes_no_second_piece_of_the_weights_size(temperature: float | None) -> None:
    rows = 60_000
    features, targets = make_rows(rows)
    head = ShardedHead(rows, WIDTH, **form(temperature=temperature))
    with Allocations() as made:
        head(features.requires_grad_(), targets).sum().backward()
    assert [numbers for numbers in made.numbers if numbers >= rows * WIDTH] == [rows * WIDTH]  # the gradient


def test_half_precision_stays_near_and_above_zero() -> None:
    """The target's logit is rounded as the others are: a well-learned row's loss does not fall below 0."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.functional.normalize(torch.randn(M, WIDTH, generator=generator), dim=1) * 6
    head = DenseHead(M, WIDTH, **form(label_smoothing=0.0))
    head.weight.data.copy_(weight)
    target = torch.arange(M)
    targets = Targets(target, target, torch.ones(M), torch.ones(M), torch.zeros_like(target))
    exact = head.crop_losses(weight, targets)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = head.crop_losses(weight, targets)
    assert rounded.dtype == torch.float32 and exact.max() < 1e-3
    assert rounded.min() >= 0 and (rounded - exact).abs().max() < 1e-3


def bytes_of_a_step(rows: int) -> dict[str, int]:
    """Bytes that this rank hands to each collective in a step."""
    counted: dict[str, int] = {}
    features, part = own_part(*make_rows(rows))
    head = ShardedHead(rows, WIDTH, **form())
    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(td, name, counting(name, getattr(td, name), counted))
        head(features.requires_grad_(), part).sum().backward()
    return counted


def counting(name: str, collective: Any, counted: dict[str, int]) -> Any:
    def call(*tensors: Any, **options: Any) -> Any:
        counted[name] = counted.get(name, 0) + tensors[-1].numel() * tensors[-1].element_size()
        return collective(*tensors, **options)

    return call


@pytest.mark.parametrize("ranks", [2, 3])
def test_bytes_of_a_step_do_not_grow_with_n(rank_pool, ranks: int) -> None:
    few, many = (rank_pool(ranks).run(bytes_of_a_step, rows) for rows in (60, 6000))
    assert few == many
    for counted in few:
        assert set(counted) == {"all_gather_into_tensor", "all_reduce"}
        assert sum(counted.values()) == bytes_sent(M, WIDTH, ranks)


def test_one_rank_sends_nothing(rank_pool) -> None:
    assert bytes_sent(M, WIDTH, 1) == 0
    assert bytes_of_a_step(60) == {}  # whether or not a group of one was started here
    assert rank_pool(1).run(bytes_of_a_step, 60) == [{}]


def losses_of_training(kind: str, steps: int, rows: int = 40) -> list[float]:
    """A linear backbone and a head under AdamW; gradients of the backbone are averaged over ranks."""
    torch.manual_seed(1)
    backbone = nn.Linear(WIDTH, 16)
    head = (ShardedHead if kind == "sharded" else DenseHead)(rows, 16, **form())
    optimizer = torch.optim.AdamW([*backbone.parameters(), *head.parameters()], lr=1e-2)
    losses = []
    for step in range(steps):
        features, targets = make_rows(rows, seed=step)
        if kind == "sharded":
            features, targets = own_part(features, targets)
        loss = head(backbone(features), targets).sum()
        (loss * (dist.world_size() if kind == "sharded" else 1)).backward()
        if kind == "sharded":
            for parameter in backbone.parameters():
                dist.all_reduce_sum(parameter.grad).div_(dist.world_size())
        optimizer.step()
        optimizer.zero_grad()
        if kind == "sharded":
            dist.all_reduce_sum(loss := loss.detach().clone())
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize("ranks", [2, 3])
def test_fifty_steps_are_the_same_dense_and_sharded(rank_pool, ranks: int) -> None:
    expected = losses_of_training("dense", 50)
    for losses in rank_pool(ranks).run(losses_of_training, "sharded", 50):
        np.testing.assert_allclose(losses, expected, rtol=2e-4)


class Module(nn.Module):
    def __init__(self, rows: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.backbone, self.head = nn.Linear(WIDTH, WIDTH), DenseHead(rows, WIDTH, **form())

    def forward(self, features: Tensor, targets: Targets) -> Tensor:
        return self.head(self.backbone(features), targets)


def zero3_losses(rows: int) -> tuple[list[float], list[int]]:
    """Steps under ZeRO-3 with every weight given away between uses.

    Returns: the losses; how many of the head's numbers are there between forward and backward pass.
    """
    thresholds = (
        "stage3_param_persistence_threshold",
        "stage3_prefetch_bucket_size",
        "stage3_max_reuse_distance",
    )
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": 3} | dict.fromkeys(thresholds, 0),
    }
    module = Module(rows)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    engine, *_ = deepspeed.initialize(
        model=module, optimizer=optimizer, config=config, dist_init_required=False
    )
    features, part = own_part(*make_rows(rows))
    losses, present = [], []
    for _ in range(3):
        own = engine(features, part).sum()
        present.append(engine.module.head.weight.numel())
        engine.backward(own * dist.world_size())
        engine.step()
        losses.append(float(dist.all_reduce_sum(own.detach().clone())))
    return losses, present


def test_dense_head_works_where_zero3_empties_its_weight(rank_pool) -> None:
    module = Module(51)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    features, targets = make_rows(51)
    expected = []
    for _ in range(3):
        loss = module(features, targets).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    for losses, present in rank_pool(2).run(zero3_losses, 51):
        assert present == [0, 0, 0]
        np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_sharded_rows_start_as_the_dense_head_does() -> None:
    whole_weight = DenseHead(3000, WIDTH, **form()).weight.detach()
    parts = [initial_rows(*row_range(3000, rank, 4), WIDTH, 7) for rank in range(4)]
    assert torch.equal(torch.cat(parts), whole_weight)
    assert 0.019 < float(whole_weight.std()) < 0.021


def test_equal_logits_give_log_n() -> None:
    head = DenseHead(2040, WIDTH, **form())
    losses = head.crop_losses(torch.zeros(M, WIDTH), make_rows(2040)[1])
    assert torch.allclose(losses, torch.tensor(7.621), atol=1e-3)  # ln 2040


def test_features_that_are_not_numbers_spoil_their_rows_alone() -> None:
    features, targets = make_rows(50)
    features[4, 2] = torch.nan
    for losses in (
        DenseHead(50, WIDTH, **form()).crop_losses(features, targets),
        ShardedHead(50, WIDTH, **form()).crop_losses(features, targets)[0],
    ):
        assert torch.isnan(losses).nonzero().tolist() == [[4]]


@pytest.mark.parametrize("kind", [DenseHead, ShardedHead])
def test_features_of_another_width_are_refused(kind: type[nn.Module]) -> None:
    with pytest.raises(
        ShapeError, match="features are 24 wide, the head's rows 32; was it built for another backbone"
    ):
        kind(50, 32, **form())(*make_rows(50))


@pytest.mark.parametrize("kind", [DenseHead, ShardedHead])
@pytest.mark.parametrize("wrong", [-1, 50])
def test_a_target_outside_the_head_is_named(kind: type[nn.Module], wrong: int) -> None:
    features, targets = make_rows(50)
    targets.b[17] = wrong
    with pytest.raises(
        DataError,
        match=f"crop 17 of the batch is of image, or class, number {wrong}; the head has rows 0 to 49: this",
    ):
        kind(50, WIDTH, **form())(features, targets)


def too_few_rows() -> str:
    with pytest.raises(SettingsError) as caught:
        ShardedHead(1, WIDTH, **form())
    return str(caught.value)


def test_fewer_instances_than_ranks_are_refused(rank_pool) -> None:
    assert "1 instances cannot be spread over 2 ranks; use dense" in rank_pool(2).run(too_few_rows)[0]
