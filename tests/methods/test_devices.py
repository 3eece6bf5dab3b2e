"""A step on a card that is not there: fake CUDA tensors find every mixture of devices before a GPU does.

torch's FakeTensorMode computes shapes, types and devices of each operation. Its autograd engine asks for a
real card, so the backward pass is left out.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.load import load_settings
from vitds.methods import method_class
from vitds.models.build import build_backbone, patch_count
from vitds.models.stochastic import StochasticDraws

CARD = torch.device("cuda", 0)
ROWS = 50


def move(module: nn.Module) -> None:
    """`module.to(CARD)`, which cannot swap real for fake tensors."""
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = torch.empty_like(parameter, device=CARD)
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=CARD)


def on_card(batch: TrainBatch) -> TrainBatch:
    targets = batch.targets
    columns = (targets.a, targets.b, targets.lam, targets.weight, targets.group)
    moved = Targets(*(torch.empty_like(column, device=CARD) for column in columns), groups=targets.groups)
    # The images, and what a method adds to them.
    others = {name: value for name, value in vars(batch).items() if isinstance(value, torch.Tensor)}
    return replace(
        batch,
        targets=moved,
        **{name: torch.empty_like(value, device=CARD) for name, value in others.items()},
    )


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("idmm_digits", ["head.kind=dense", "backbone.drop_path=0.1"]),
        ("idmm_digits", ["head.kind=sharded", "mix.kind=mixup"]),
        ("idmm_digits", ["head.kind=dense", "head.cosine=true", "mix.kind=none"]),
        ("finetune_digits", []),
        ("simclr_digits", ["backbone.patch_drop=0.5"]),
        ("mocov3_digits", ["backbone.drop_path=0.1"]),
        ("lejepa_digits", []),
        ("supcon_digits", []),
        ("dino_digits", ["backbone.drop_path=0.1"]),
        ("mae_digits", ["backbone.drop_path=0.1"]),
    ],
    ids=str,
)
def test_a_steps_tensors_all_lie_on_the_card(recipe: str, words: list[str]) -> None:
    settings = load_settings(recipe=recipe, command=None, assignments=words, flags={})
    chunk, views, side = settings.batch.chunk_images, settings.views.count, settings.views.crop_px
    images = 2 * chunk
    backbone = build_backbone(settings.backbone, crop_px=side, seed=0)
    method_type = method_class(settings.method)
    settings = method_type.resolve(settings, ROWS, backbone.facts.width)
    method = method_type(settings, backbone, ROWS)
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=views * chunk, patches=patch_count(backbone))
    batch = CropBatch(
        crops=torch.zeros(images, views, 3, side, side, dtype=torch.uint8),
        index=torch.arange(images) % ROWS,
        label=torch.arange(images) % 10,
        is_real=torch.arange(images) < images - 1,
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=images - 1,
    )
    prepared = method.prepare(batch, settings, torch.device("cpu"))  # reads arrays
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (method.module, *method.outside):
            move(module)
        method.module.train()
        draws.fill(0, 0, 2)
        terms = method.losses(method.module, on_card(prepared), 0)
        method.after_update(1, 10)
    assert terms.device == CARD and terms.shape == (len(method.terms),) and terms.dtype == torch.float64
