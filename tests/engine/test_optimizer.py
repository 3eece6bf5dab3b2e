"""Muon and SGD beside AdamW: what a step does, and that a run with them keeps every promise."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.engine.training import outcome, rewound, small_losses, small_run_path
from vitds.config.tree import Backbone, Optimizer
from vitds.engine.optimizer import build_optimizer, matrix_names, orthogonalized
from vitds.engine.update import set_groups
from vitds.models.build import build_backbone

MUON = {"optimizer__kind": "muon"}
SGD = {"optimizer__kind": "sgd", "head__kind": "dense"}


def plain_orthogonalized(matrix: Tensor) -> Tensor:
    """Newton and Schulz's five steps on the matrix itself, in float64, as Muon's author has them."""
    x = matrix.double()
    x = x / (x.norm() + 1e-7)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize("shape", [(8, 8), (12, 90), (90, 12), (64, 576), (1, 7), (7, 1)])
def test_the_turned_matrix_is_that_of_the_plain_iteration(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found, expected = orthogonalized(matrix), plain_orthogonalized(matrix)
    assert found.shape == shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()


def test_singular_vectors_stay_and_singular_values_come_near_one() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(40, 16, generator=generator))[0]
    turned = left.T @ orthogonalized((left * torch.logspace(0, -2, 16)) @ right.T) @ right
    diagonal = turned.diagonal()
    assert (turned - torch.diag(diagonal)).abs().max() < 1e-4
    assert diagonal.min() > 0.5
    assert diagonal.max() < 1.25


def test_directions_far_below_the_first_are_still_those_of_the_plain_iteration() -> None:
    # Products of a matrix with itself square the ratio of its singular values: here 1e12, beyond float32.
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    right = torch.linalg.qr(torch.randn(40, 16, generator=generator))[0]
    matrix = (left * torch.logspace(0, -6, 16)) @ right.T
    expected = plain_orthogonalized(matrix)
    assert (orthogonalized(matrix) - expected).norm() <= 2e-3 * expected.norm()


def test_a_gradient_of_zero_moves_nothing() -> None:
    assert torch.equal(orthogonalized(torch.zeros(4, 9)), torch.zeros(4, 9))


def test_three_steps_are_those_of_the_definition() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Conv2d(5, 4, 3))
    weight, momentum = module[1].weight.detach().double().flatten(1), torch.zeros(4, 45, dtype=torch.float64)
    bias = module[1].bias.detach().clone().requires_grad_()
    optimizer = build_optimizer(module, Optimizer(kind="muon", weight_decay=0.1), lr_scales={})
    plain = torch.optim.AdamW([bias], weight_decay=0.1)
    for rate in (0.1, 0.2, 0.05):
        gradients = {name: torch.randn_like(value) for name, value in module.named_parameters()}
        for name, value in module.named_parameters():
            value.grad = gradients[name].clone()
        bias.grad = gradients["1.bias"].clone()
        set_groups(optimizer, rate=rate, weight_decay=0.1, epoch=0)
        plain.param_groups[0]["lr"] = rate
        optimizer.step(), plain.step()
        gradient = gradients["1.weight"].double().flatten(1)
        momentum = 0.95 * momentum + 0.05 * gradient
        direction = plain_orthogonalized(0.05 * gradient + 0.95 * momentum)
        weight = weight * (1 - rate * 0.1) - rate * 0.2 * np.sqrt(45) * direction
    assert torch.allclose(module[1].weight.double().flatten(1), weight, rtol=0, atol=1e-5)
    assert torch.equal(module[1].bias, bias)


def test_three_steps_of_sgd_are_torchs() -> None:
    torch.manual_seed(0)
    module = nn.Linear(6, 5)
    other = copy.deepcopy(module)
    optimizer = build_optimizer(module, Optimizer(kind="sgd", weight_decay=0.1), lr_scales={})
    torchs = torch.optim.SGD(other.parameters(), lr=1.0, momentum=0.9, weight_decay=0.1, nesterov=True)
    for rate in (0.1, 0.2, 0.05):
        for weight, twin in zip(module.parameters(), other.parameters(), strict=True):
            weight.grad = torch.randn_like(weight)
            twin.grad = weight.grad.clone()
        set_groups(optimizer, rate=rate, weight_decay=0.1, epoch=0)
        torchs.param_groups[0]["lr"] = rate
        optimizer.step(), torchs.step()
    assert torch.equal(module.weight, other.weight)
    assert torch.equal(module.bias, other.bias)


@pytest.mark.parametrize("kind", ["muon", "sgd"])
def test_a_cancelled_step_and_a_rate_of_zero_leave_weights_to_the_bit(kind: str) -> None:
    module = nn.Linear(6, 5)
    before = module.weight.detach().clone()
    optimizer = build_optimizer(module, Optimizer(kind=kind, weight_decay=0.1), lr_scales={})
    module.weight.grad, module.bias.grad = torch.ones(5, 6), torch.ones(5)
    optimizer.skip = True
    optimizer.step()
    assert torch.equal(module.weight, before)
    assert not optimizer.state[module.weight]
    optimizer.skip = False
    set_groups(optimizer, rate=0.0, weight_decay=0.1, epoch=0)
    optimizer.step()
    assert torch.equal(module.weight, before)


@pytest.mark.parametrize(
    ("name", "turned", "others"),
    [
        ("vit_tiny_patch16_224", {"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"}, {"pos_embed"}),
        ("resnet18", {"conv1.weight", "layer4.1.conv2.weight"}, {"bn1.weight"}),
        ("pvt_v2_b0", {"stages.0.blocks.0.mlp.fc1.weight"}, {"stages.0.blocks.0.mlp.dwconv.weight"}),
    ],
)
def test_linear_layers_and_dense_convolutions_are_turned(
    name: str, turned: set[str], others: set[str]
) -> None:
    backbone = build_backbone(Backbone(name=name), crop_px=64, seed=0)
    found, own = matrix_names(backbone), dict(backbone.named_parameters())
    assert turned <= found <= set(own)
    assert others <= set(own) - found


def test_no_classifier_is_turned() -> None:
    module = nn.ModuleDict({"backbone": nn.Linear(6, 5), "head": nn.Linear(5, 9)})
    assert matrix_names(module) == {"backbone.weight"}
    dino = nn.ModuleDict({"projector": nn.Linear(4, 4), "prototypes": nn.Linear(4, 8, bias=False)})
    assert matrix_names(dino) == {"projector.weight"}, "a prototype is a class's row"


@pytest.mark.parametrize(
    "kind",
    [MUON | {"backbone": "vit"}, MUON | {"backbone": "resnet"}, SGD | {"backbone": "resnet", "stage": "2"}],
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    rank_pool, digit_files, tmp_path: Path, kind: dict[str, str]
) -> None:
    options = kind | {"checkpoint__every_steps": 2, "checkpoint__keep": 9}
    rank_pool(2).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    again = rewound(tmp_path / "whole", tmp_path / "again", 2)
    rank_pool(2).run(small_run_path, str(again), digit_files, **options)
    assert outcome(again) == outcome(tmp_path / "whole")


def test_losses_do_not_depend_on_ranks_accumulation_or_head(rank_pool, digit_files, tmp_path: Path) -> None:
    calm = MUON | {"optimizer__lr_peak": 1e-3}
    one = rank_pool(1).run(small_losses, str(tmp_path / "one"), digit_files, **calm)[0]
    two = rank_pool(2).run(
        small_losses,
        str(tmp_path / "two"),
        digit_files,
        head__kind="sharded",
        batch__micro_images=4,
        **calm,
    )[0]
    np.testing.assert_allclose(one, two, rtol=1e-4)
    adamw = rank_pool(1).run(small_losses, str(tmp_path / "adamw"), digit_files, optimizer__lr_peak=1e-3)[0]
    assert max(abs(a - b) for a, b in zip(one, adamw, strict=True)) > 1e-3


def test_losses_with_sgd_do_not_depend_on_ranks_accumulation_or_stage(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    options = SGD | {"optimizer__lr_peak": 0.05}
    one = rank_pool(1).run(small_losses, str(tmp_path / "one"), digit_files, **options)[0]
    for stage in ("1", "3"):
        shared = options | {"stage": stage, "batch__micro_images": 4}
        two = rank_pool(2).run(small_losses, str(tmp_path / f"two{stage}"), digit_files, **shared)[0]
        np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.parametrize(("stage", "precision"), [("1", "fp32"), ("3", "fp32"), ("0", "fp16")])
def test_flat_pieces_of_matrices_are_refused(
    rank_pool, digit_files, tmp_path: Path, stage: str, precision: str
) -> None:
    with pytest.raises(AssertionError, match="SettingsError: optimizer.kind muon turns whole matrices"):
        rank_pool(1).run(
            small_run_path, str(tmp_path / "run"), digit_files, stage=stage, precision=precision, **MUON
        )
