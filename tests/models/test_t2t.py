"""T2T-ViT: its sizes, its kernel attention against plain sums, what is fixed, and real trainings of it."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import Tensor

from tests.engine.training import outcome, rewound, small_run, small_run_path
from vitds.config.tree import Backbone
from vitds.models.build import build_backbone
from vitds.models.facts import model_facts
from vitds.models.resize import why_not_at
from vitds.models.stochastic import StochasticDraws
from vitds.models.t2t import kernel_attention, positive_features, sinusoids
from vitds.runs.backbone import load_backbone
from vitds.runs.metrics import read_metrics

SHORT = {"depth": 2}


def built(side: int, seed: int = 0, **settings: object) -> torch.nn.Module:
    return build_backbone(Backbone(name="t2t_vit_7", options=SHORT, **settings), crop_px=side, seed=seed)


# sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [("t2t_vit_7", 4.3), ("t2t_vit_14", 21.5), ("t2t_vit_19", 39.2), ("t2t_vit_24", 64.1)],
)
def test_sizes_with_1000_classes_are_the_published_ones(name: str, millions: float) -> None:
    """arXiv:2101.11986, which counts the fixed numbers too: the positions at 224 px, the directions."""
    with torch.device("meta"):
        model = timm.create_model(name)
    numbers = sum(value.numel() for value in model.state_dict().values())
    assert numbers / 1e6 == pytest.approx(millions, abs=0.05)


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_a_crop_becomes_a_token_for_each_16_pixels_of_a_side(name: str) -> None:
    facts = [model_facts(Backbone(name=name, options=SHORT), side) for side in (112, 224, 448)]
    assert [each.patches for each in facts] == [49, 196, 784]
    assert len({(each.parameters, each.width) for each in facts}) == 1


# kernel attention


def plain_attention(query: Tensor, key: Tensor, value: Tensor, directions: Tensor) -> Tensor:
    """Each weight of each pair of tokens, one after the other."""
    rows = []
    for q in query:
        weights = [
            sum(torch.exp(w @ q - q @ q / 2) * torch.exp(w @ k - k @ k / 2) for w in directions) for k in key
        ]
        rows.append(sum(weight * v for weight, v in zip(weights, value, strict=True)) / sum(weights))
    return torch.stack(rows)


def test_kernel_attention_and_its_gradients_are_those_of_the_sum_over_all_pairs() -> None:
    torch.manual_seed(0)
    inputs = [(0.5 * torch.randn(2, 5, 8)).requires_grad_() for _ in range(3)]
    directions = torch.randn(4, 8)
    fast = kernel_attention(*inputs, directions)
    slow = torch.stack([plain_attention(*crop, directions) for crop in zip(*inputs, strict=True)])
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)
    seed = torch.randn_like(fast)
    gradients = [torch.autograd.grad(out, inputs, seed) for out in (fast, slow)]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_its_weights_are_those_of_softmax_attention_in_the_mean_over_directions() -> None:
    """E exp(w·(x + y)) exp(-|x|²/2 - |y|²/2) = exp(x·y), here over draws of 64 orthogonal directions."""
    torch.manual_seed(0)
    x, y = 0.08 * torch.randn(1, 6, 64), 0.08 * torch.randn(1, 6, 64)
    draws = [torch.nn.init.orthogonal_(torch.empty(64, 64)) * 8 for _ in range(40)]
    products = [positive_features(x, w)[0] @ positive_features(y, w)[0].T for w in draws]
    torch.testing.assert_close(torch.stack(products).mean(0), (x[0] @ y[0].T).exp(), rtol=0.05, atol=0)


def test_autocast_does_not_round_its_sums() -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(1, 300, 64) for _ in range(3)]
    directions = torch.randn(32, 64)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = kernel_attention(*inputs, directions)
    assert torch.equal(rounded, kernel_attention(*inputs, directions))


# what is fixed


def test_directions_are_orthogonal_and_a_function_of_the_seed_alone() -> None:
    first, again, other = (built(32, seed).patch_embed.layers[0].directions for seed in (3, 3, 4))
    assert torch.equal(first, again) and not torch.allclose(first, other)
    torch.testing.assert_close(first @ first.T, 32 * torch.eye(32), rtol=0, atol=1e-4)


def test_positions_and_directions_are_saved_and_not_trained() -> None:
    backbone = built(32)
    fixed = {"pos_embed", "patch_embed.layers.0.directions", "patch_embed.layers.1.directions"}
    assert fixed <= set(backbone.state_dict())
    assert not fixed & {name for name, _ in backbone.named_parameters()}


def test_the_table_of_positions_is_that_of_sines_and_cosines() -> None:
    table = [
        [
            (math.cos if column % 2 else math.sin)(row / 10_000 ** (2 * (column // 2) / 6))
            for column in range(6)
        ]
        for row in range(50)
    ]
    np.testing.assert_allclose(sinusoids(50, 6)[0].numpy(), table, atol=1e-6)


@pytest.mark.parametrize("name", ["t2t_vit_7", "t2t_vit_t_14"])
def test_weights_go_from_112_to_224_to_448(name: str) -> None:
    settings = Backbone(name=name, options=SHORT)
    assert why_not_at(settings, 112, 224) == why_not_at(settings, 224, 448) == ""


def test_weights_at_a_larger_side_bring_their_directions_and_their_positions_resized() -> None:
    small, large = built(32, seed=1), built(64, seed=2)
    loaded = load_backbone(large, small.state_dict(), "small")
    assert not loaded.not_found and "pos_embed from [1, 5, 256] to [1, 17, 256]" in str(loaded)
    before, after = (model.patch_embed.layers[1].directions for model in (small, large))
    assert torch.equal(before, after)
    assert torch.equal(small.pos_embed[:, 0], large.pos_embed[:, 0])


# training


def test_activation_checkpointing_of_token_layers_and_blocks_changes_no_bit() -> None:
    """Dropout and keyed masks are the same in the second pass through a layer."""
    found = []
    for enable in (False, True):
        backbone = built(32, drop_path=0.5).train()
        backbone.set_grad_checkpointing(enable)
        StochasticDraws(backbone, seed=0, rows_per_chunk=4, patches=4).fill(0, 0, 1)
        torch.manual_seed(0)
        features = backbone(torch.randn(4, 3, 32, 32))
        features.square().sum().backward()
        found.append([features, *(weight.grad for weight in backbone.parameters())])
    assert all(map(torch.equal, *found))


TRAINED = {
    "backbone__name": "t2t_vit_7",
    "backbone__options": "{depth: 2}",
    "views__crop_px": 32,
    "checkpoint__every_steps": 3,
}


@pytest.fixture(scope="module")
def on_two_ranks(rank_pool, digit_files, tmp_path_factory) -> Path:
    """A run at ZeRO stage 3 with activation checkpointing, and one at stage 0 without."""
    folder = tmp_path_factory.mktemp("t2t")
    checkpointed = {"stage": 3, "engine__activation_checkpointing": "true"}
    for name, more in {"stage 3": checkpointed, "stage 0": {}}.items():
        rank_pool(2).run(small_run_path, str(folder / name), digit_files, **TRAINED, **more)
    return folder


def test_stage_3_with_checkpointing_trains_as_stage_0(on_two_ranks: Path) -> None:
    losses = [
        [line["loss"] for line in read_metrics(on_two_ranks / name / "metrics.jsonl")]
        for name in ("stage 0", "stage 3")
    ]
    assert len(losses[0]) == 6
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_a_resumed_run_of_two_ranks_ends_with_the_same_bytes(rank_pool, on_two_ranks, digit_files) -> None:
    cut = rewound(on_two_ranks / "stage 3", on_two_ranks / "cut", 3)
    options = {"stage": 3, "engine__activation_checkpointing": "true"}
    rank_pool(2).run(small_run_path, str(cut), digit_files, **TRAINED, **options)
    assert outcome(cut) == outcome(on_two_ranks / "stage 3")


def test_fine_tuning_goes_on_at_twice_the_side(on_two_ranks: Path, digit_files, capsys) -> None:
    run = small_run(
        str(on_two_ranks / "fine"),
        digit_files,
        method="supervised",
        epochs=1,
        init=str(on_two_ranks / "stage 0"),
        **TRAINED | {"views__crop_px": 64},
    )
    assert "pos_embed from [1, 5, 256] to [1, 17, 256]" in capsys.readouterr().out
    assert 0 <= run.summary["top1"] <= 100
