"""Keyed drop path and patch drop: what decides, and what is left out."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from vitds.config.tree import Backbone
from vitds.models.build import build_backbone
from vitds.models.stochastic import KeyedDropPath, KeyedPatchDrop, StochasticDraws

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


def filled(
    seed: int = 0, step: int = 0, first_chunk: int = 0, chunks: int = 2, **settings: float
) -> torch.nn.Module:
    backbone = build_backbone(Backbone(options=TINY, **settings), crop_px=16, seed=0).train()
    StochasticDraws(backbone, seed=seed, rows_per_chunk=6, patches=backbone.facts.patches).fill(
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


def test_drop_path_leaves_out_whole_crops_at_its_rate_and_scales_the_rest() -> None:
    module = KeyedDropPath(0.25).train()
    StochasticDraws(torch.nn.Sequential(module), seed=0, rows_per_chunk=4000, patches=0).fill(0, 0, 1)
    out = module(torch.ones(4000, 2, 3))
    assert out.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((out[:, 0, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert torch.all(out == out[:, :1, :1])


def test_all_windows_of_a_crop_share_its_factor() -> None:
    module = KeyedDropPath(0.5).train()
    module.factor = torch.tensor([0.0, 2.0])
    assert module(torch.ones(6, 1)).flatten().tolist() == [0, 0, 0, 2, 2, 2]


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
