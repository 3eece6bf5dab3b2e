"""Recipes and DeepSpeed files for ViT-Large, -Huge and -giant, on two real ranks with narrow models; all
pairs are in tests/soak.py."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engine.large_backbones import few_steps, losses_of, shrunk, trained_and_resumed
from vitds.config.load import load_settings, read_settings
from vitds.models.build import build_backbone


@pytest.mark.parametrize(
    ("recipe", "ds_config"),
    [("idmm_vit_large", "large_8gpu"), ("idmm_vit_huge", "large_64gpu"), ("idmm_vit_giant", "large_64gpu")],
)
def test_as_deep_a_model_trains_and_a_resumed_run_ends_with_the_same_bytes(
    rank_pool, digit_files, tmp_path: Path, recipe: str, ds_config: str
) -> None:
    losses = trained_and_resumed(rank_pool(2), tmp_path / "runs", digit_files, recipe, ds_config)
    assert losses[0] == pytest.approx(2 * np.log(52), rel=0.05)
    settings = read_settings(tmp_path / "runs" / "whole" / "settings.yaml")
    assert (
        settings.engine.activation_checkpointing
        and settings.engine.precision == "bf16"
        and settings.head.kind == "sharded"
    )


def test_buckets_that_fill_and_offloaded_weights_that_come_and_go_change_nothing(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    small = shrunk("large_1gpu", "idmm_vit_large", tmp_path)
    losses = trained_and_resumed(rank_pool(2), tmp_path / "small", digit_files, "idmm_vit_large", small)
    rank_pool(2).run(few_steps, str(tmp_path / "zero2"), digit_files, "idmm_vit_large", "large_64gpu")
    np.testing.assert_allclose(losses, losses_of(tmp_path / "zero2"), rtol=1e-3)


@pytest.mark.parametrize(
    ("recipe", "parameters", "depth"),
    [
        ("idmm_vit_large", 303_151_104, 24),
        ("idmm_vit_huge", 630_519_040, 32),
        ("idmm_vit_giant", 1_010_932_096, 40),
    ],
)
def test_recipe_is_the_model_it_names_and_divides_over_1_to_64_ranks(
    recipe: str, parameters: int, depth: int
) -> None:
    settings = load_settings(recipe=recipe, command="pretrain", flags={})
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
    assert (sum(parameter.numel() for parameter in backbone.parameters()), len(backbone.blocks)) == (
        parameters,
        depth,
    )
    assert [
        ranks
        for ranks in (1, 2, 4, 8, 16, 32, 64)
        if settings.batch.global_images % (ranks * settings.batch.micro_images)
    ] == []
