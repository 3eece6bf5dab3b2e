"""DIET is a recipe of idmm: one view, no mixing, strong smoothing."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitds.batch import CropBatch
from vitds.config.load import load_settings
from vitds.methods.idmm import Method
from vitds.models.build import build_backbone

ROWS, SMOOTHING = 896, 0.8


@pytest.mark.parametrize("recipe", ["diet_digits", "diet_deit_tiny"])
def test_the_recipes_have_one_view_no_mixing_and_the_authors_smoothing_and_optimizer(recipe: str) -> None:
    settings = load_settings(recipe=recipe, command="pretrain", flags={})
    assert (settings.method, settings.views.count, settings.mix.kind) == ("idmm", 1, "none")
    assert (settings.head.label_smoothing, settings.head.init) == (SMOOTHING, "noise")
    assert (settings.optimizer.lr_peak, settings.optimizer.weight_decay) == (1e-3, 0.05)


def test_the_loss_is_torchs_smoothed_cross_entropy_and_starts_at_log_of_the_images() -> None:
    settings = load_settings(recipe="diet_digits", command="pretrain", flags={})
    side, images = settings.views.crop_px, 16
    backbone = build_backbone(settings.backbone, crop_px=side, seed=0)
    settings = Method.resolve(settings, ROWS, backbone.facts.width)
    method = Method(settings, backbone, ROWS)
    batch = CropBatch(
        crops=torch.randint(0, 256, (images, 1, 3, side, side), dtype=torch.uint8),
        index=torch.arange(images) * 7,
        label=torch.zeros(images, dtype=torch.int64),
        is_real=torch.arange(images) < 15,
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=15,
    )
    prepared = method.prepare(batch, settings, torch.device("cpu"))
    (loss,) = method.losses(method.module, prepared, 0)
    logits = F.linear(backbone(prepared.images), method.head.weight, method.head.bias)
    expected = F.cross_entropy(logits[:15], batch.index[:15], label_smoothing=SMOOTHING)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert loss.item() == pytest.approx(math.log(ROWS), rel=0.05)


def test_the_loss_cannot_fall_below_the_entropy_of_the_smoothed_targets() -> None:
    """As the recipe says: 5.9 of 6.8, so a curve that looks flat is normal."""
    own, other = 1 - SMOOTHING + SMOOTHING / ROWS, SMOOTHING / ROWS
    floor = -own * math.log(own) - (ROWS - 1) * other * math.log(other)
    logits = torch.full((1, ROWS), math.log(other), dtype=torch.float64)
    logits[0, 3] = math.log(own)
    loss = F.cross_entropy(logits, torch.tensor([3]), label_smoothing=SMOOTHING).item()
    assert loss == pytest.approx(floor) and floor == pytest.approx(5.93, abs=0.01)
