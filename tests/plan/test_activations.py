"""The formulas for activations against what torch really keeps for the backward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.plan.kept import kept_bytes
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.engine.memory import module_sizes
from vitds.models.build import build_backbone, patch_count
from vitds.models.stochastic import StochasticDraws
from vitds.plan.activations import saved_bytes, vit_stage

CROPS = 8


def settings_of(name: str, options: dict[str, Any], crop_px: int = 32, **backbone: Any) -> Settings:
    own = {
        "backbone": {"name": name, "options": options, "drop_path": 0.0, "patch_drop": 0.0} | backbone,
        "views": {"crop_px": crop_px},
    }
    return load_settings(recipe="idmm_digits", command="pretrain", flags={}, extra=own)


def both(
    settings: Settings, dtype: torch.dtype = torch.float32, autocast: torch.dtype | None = None
) -> tuple[int, int]:
    """What torch keeps and what the formula says."""
    side = settings.views.crop_px
    backbone = build_backbone(settings.backbone, crop_px=side, seed=0).to(dtype).train()
    StochasticDraws(backbone, seed=0, rows_per_chunk=CROPS, patches=patch_count(backbone)).fill(0, 0, 1)
    stages = module_sizes(backbone, settings).stages
    residual = dtype.itemsize
    counted = saved_bytes(
        stages, CROPS, compute=2 if autocast else residual, residual=residual, checkpointing=False
    )
    images = torch.randn(CROPS, 3, side, side, dtype=dtype)
    weights = {
        shape for weight in backbone.state_dict().values() for shape in (weight.shape, weight.shape[::-1])
    }
    return kept_bytes(lambda: backbone(images), {*weights, images.shape}, autocast), counted


SMALL = {"patch_size": 8, "embed_dim": 96, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize(
    "name, options, more",
    [
        ("vit_tiny_patch16_224", SMALL, {}),
        ("vit_tiny_patch16_224", SMALL | {"global_pool": "avg"}, {"drop_path": 0.1}),
        ("deit_tiny_patch16_224", SMALL | {"mlp_ratio": 2.0}, {"patch_drop": 0.5}),
        ("deit3_small_patch16_224", SMALL, {}),
        ("vit_small_patch14_reg4_dinov2", SMALL, {}),
    ],
    ids=str,
)
def test_formula_counts_what_torch_keeps(name: str, options: dict[str, Any], more: dict[str, float]) -> None:
    kept, counted = both(settings_of(name, options, **more))
    assert counted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(
    "dtype, autocast",
    [(torch.float32, torch.bfloat16), (torch.bfloat16, None)],
    ids=["autocast", "bf16 weights"],
)
def test_formula_counts_what_torch_keeps_in_bf16(dtype: torch.dtype, autocast: torch.dtype | None) -> None:
    kept, counted = both(settings_of("vit_tiny_patch16_224", SMALL), dtype, autocast)
    assert counted == pytest.approx(kept, rel=0.02)


@pytest.mark.parametrize(
    ("name", "options", "crop_px"),
    [
        ("t2t_vit_7", {"depth": 2}, 64),
        ("t2t_vit_t_14", {"depth": 2}, 64),
        ("pvt_v2_b0", {}, 112),
        ("pvt_v2_b3", {"depths": (1, 1, 2, 1)}, 112),
    ],
    ids=str,
)
@pytest.mark.parametrize("precision", ["fp32", "autocast", "bf16 weights"])
def test_formula_counts_what_the_papers_other_backbones_keep(
    monkeypatch: pytest.MonkeyPatch, name: str, options: dict[str, Any], crop_px: int, precision: str
) -> None:
    """Under autocast by a GPU's rule, which has norms in float32; a CPU's keeps less."""
    if precision == "autocast":
        norm = torch.nn.functional.layer_norm
        as_on_gpu = lambda x, *args, **more: norm(x.float(), *args, **more)  # noqa: E731
        monkeypatch.setattr(torch.nn.functional, "layer_norm", as_on_gpu)
    dtype = torch.bfloat16 if precision == "bf16 weights" else torch.float32
    autocast = torch.bfloat16 if precision == "autocast" else None
    settings = settings_of(name, options, crop_px, drop_path=0.1)
    kept, counted = both(settings, dtype, autocast)
    assert counted == pytest.approx(kept, rel=0.05)


def test_checkpointing_keeps_block_inputs_and_one_block() -> None:
    stage = vit_stage(
        width=8, depth=5, heads=2, hidden=16, tokens=3, before_drop=0, pools_first=True, scales_layers=False
    )
    whole, one_block = (
        saved_bytes((stage,), 1, compute=4, residual=4, checkpointing=kind) for kind in (False, True)
    )
    assert whole - one_block == 4 * (whole - 4 * (8 + 2)) // 5 - 5 * 3 * 8 * 4


@pytest.mark.parametrize("name", ["convnext_tiny", "vit_tiny_r_s16_p8_224", "pvt_v2_b2_li"])
def test_other_models_have_no_formula(name: str) -> None:
    settings = settings_of(name, {})
    with torch.device("meta"):
        sizes = module_sizes(build_backbone(settings.backbone, crop_px=224, seed=0), settings)
    assert sizes.stages is None and sum(sizes.trained["backbone"]) > 1e6
