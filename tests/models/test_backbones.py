"""timm's backbones as built here: sizes, seeds, keyed drop path and patch drop."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.build import build_backbone, feature_width, patch_count
from vitds.models.stochastic import KeyedDropPath, KeyedPatchDrop, StochasticDraws

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "crop_px", "millions"),
    [
        ("deit_tiny_patch16_224", 112, 5.52),
        ("deit_tiny_patch16_224", 224, 5.54),
        ("deit_tiny_patch16_224", 448, 5.66),
        ("pvt_v2_b0", 112, 3.44),
    ],
)
def test_sizes_with_a_102_class_head_are_the_papers(name: str, crop_px: int, millions: float) -> None:
    backbone = build_backbone(Backbone(name=name), crop_px=crop_px, seed=0)
    own = sum(parameter.numel() for parameter in backbone.parameters())
    assert (own + 103 * feature_width(backbone) - feature_width(backbone) + 102) / 1e6 == pytest.approx(
        millions, abs=0.006
    )  # METHOD 5


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_backbone(Backbone(options=TINY), crop_px=16, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = (
        build_backbone(Backbone(options=TINY), crop_px=16, seed=seed).state_dict() for seed in (3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    assert (
        0.015 < float(first["blocks.0.mlp.fc1.weight"].std()) < 0.025
    )  # truncated normal 0.02, not torch's default


def test_unknown_names_options_and_sides_are_refused() -> None:
    with pytest.raises(
        SettingsError, match="'deit_tiny_patch16_244' is no timm model; near names: .*deit_tiny_patch16_224"
    ):
        build_backbone(Backbone(name="deit_tiny_patch16_244"), crop_px=112, seed=0)
    with pytest.raises(SettingsError, match="cannot be built: .*colour"):
        build_backbone(Backbone(options={"colour": 1}), crop_px=112, seed=0)
    with pytest.raises(
        SettingsError,
        match="views.crop_px 100 is not a multiple of deit_tiny_patch16_224's patch of 16 pixels",
    ):
        build_backbone(Backbone(), crop_px=100, seed=0)
    with pytest.raises(
        SettingsError, match="this model's position embedding needs all patches; set backbone.patch_drop=0"
    ):
        build_backbone(
            Backbone(name="eva02_tiny_patch14_224", patch_drop=0.5, drop_path=0), crop_px=28, seed=0
        )


def filled(
    seed: int = 0, step: int = 0, first_chunk: int = 0, chunks: int = 2, **settings: float
) -> torch.nn.Module:
    backbone = build_backbone(Backbone(options=TINY, **settings), crop_px=16, seed=0).train()
    StochasticDraws(backbone, seed=seed, rows_per_chunk=6, patches=patch_count(backbone)).fill(
        step, first_chunk, chunks
    )
    return backbone


def masks(backbone: torch.nn.Module) -> torch.Tensor:
    return torch.stack([module.factor for module in backbone.modules() if isinstance(module, KeyedDropPath)])


def test_masks_follow_step_and_chunk_not_the_micro_batch() -> None:
    both, second = filled(drop_path=0.5), filled(drop_path=0.5, first_chunk=1, chunks=1)
    assert torch.equal(masks(both)[:, 6:], masks(second))
    assert not torch.equal(masks(both), masks(filled(drop_path=0.5, step=1)))
    assert not torch.equal(masks(both), masks(filled(drop_path=0.5, seed=1)))


def test_drop_path_leaves_out_whole_rows_at_its_rate_and_scales_the_rest() -> None:
    module = KeyedDropPath(0.25).train()
    backbone = torch.nn.Sequential(module)
    StochasticDraws(backbone, seed=0, rows_per_chunk=4000, patches=0).fill(0, 0, 1)
    out = module(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((out[:, 0, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.all(out == out[:, :1, :1])


def test_patch_drop_keeps_the_class_token_and_half_the_patches_in_their_order() -> None:
    module = KeyedPatchDrop(0.5, prefix_tokens=1).train()
    StochasticDraws(torch.nn.Sequential(module), seed=0, rows_per_chunk=3, patches=16).fill(0, 0, 2)
    tokens = torch.arange(17.0).expand(6, 17)[:, :, None]
    kept = module(tokens)[:, :, 0].numpy()
    assert kept.shape == (6, 9)
    assert np.all(kept[:, 0] == 0) and np.all(np.diff(kept, axis=1) > 0)
    assert len({tuple(row) for row in kept}) > 1


def test_nothing_is_dropped_in_evaluation() -> None:
    backbone = filled(drop_path=0.5, patch_drop=0.5).eval()
    plain = build_backbone(Backbone(options=TINY, drop_path=0), crop_px=16, seed=0).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(backbone(images), plain(images), atol=1e-6)


def test_any_timm_name_gives_features_of_its_width() -> None:
    for name in ("resnet18", "pvt_v2_b0", "deit_tiny_patch16_224"):
        backbone = build_backbone(Backbone(name=name), crop_px=64, seed=0).eval()
        assert backbone(torch.zeros(1, 3, 64, 64)).shape == (1, feature_width(backbone))
