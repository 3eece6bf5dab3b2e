"""Some of timm's families that behave differently; tests/models/walk.py takes all."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from tests.models.walk import assert_masks_are_of_crops, train_once
from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.jobs.models import print_models
from vitds.models.facts import side_step
from vitds.models.stochastic import KeyedDropPath, KeyedPatchDrop

FAMILIES = {
    "test_vit": {},  # plain, of its side
    "test_vit_relpos": {},  # relative positions
    "vit_tiny_patch16_dinov3_qkvb": {"options": {"depth": 2}},  # rotary, register tokens
    "mobilenetv3_small_050": {},  # features wider than num_features
    "mobilevit_xxs": {},  # drop path sees patches of crops
    "test_maxvit": {},  # windows and grids
    "swin_tiny_patch4_window7_224": {"options": {"depths": [1, 1], "embed_dim": 24, "num_heads": [2, 2]}},
    "levit_128s": {},  # says nowhere that it takes a side
    "test_convnext": {},
    "test_nfnet": {},
    "pvt_v2_b0": {"options": {"depths": [1, 1, 1, 1]}},
    "deit_tiny_distilled_patch16_224": {"options": {"depth": 2}},  # two tokens
    "t2t_vit_7": {"options": {"depth": 2}},  # not timm's own; draws dropout
    "t2t_vit_t_14": {"options": {"depth": 2}},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_trains_and_drops_the_branches_of_whole_crops(name: str) -> None:
    backbone = train_once(Backbone(name=name, drop_path=0.2, **FAMILIES[name]), 64)
    assert any(isinstance(module, KeyedDropPath) for module in backbone.modules())
    assert_masks_are_of_crops(backbone, 64)


@pytest.mark.parametrize("name", ["test_vit", "deit_tiny_distilled_patch16_224", "t2t_vit_7"])
def test_a_family_with_patch_drop_trains_on_half_the_patches(name: str) -> None:
    backbone = train_once(Backbone(name=name, patch_drop=0.5, **FAMILIES[name]), 64)
    assert any(isinstance(module, KeyedPatchDrop) for module in backbone.modules())


@pytest.mark.parametrize(
    ("name", "step"),
    [("test_vit", 16), ("test_convnext", 1), ("efficientformer_l1", 0)],
)
def test_the_sides_a_model_takes_are_found(name: str, step: int) -> None:
    assert side_step(Backbone(name=name, drop_path=0), 112) == step


def test_models_are_listed_with_what_they_are(capsys: pytest.CaptureFixture) -> None:
    shown = print_models("test_v*t", as_json=True)
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row == asdict(shown[0])
    assert row | {"gflop": 0} == {
        "name": "test_vit",
        "parameters": 306240,
        "width": 64,
        "side_step": 16,
        "published_px": 160,
        "gflop": 0,
        "side_px": 160,
        "drop_path": True,
    }
    assert row["gflop"] == pytest.approx(0.075, abs=0.001)


def test_the_table_of_models_counts_operations_at_the_side_asked_for(capsys: pytest.CaptureFixture) -> None:
    print_models("test_convnext", side_px=32)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.split() == ["test_convnext", "0.21M", "64", "n", "px", "0.00249", "32", "yes"]


def test_a_pattern_that_fits_no_model_is_refused() -> None:
    with pytest.raises(SettingsError, match="no timm model's name fits 'nope'; [*] stands for anything"):
        print_models("nope")


def test_a_fault_of_a_mask_is_seen() -> None:
    """The check itself: a factor that is laid over the windows in the wrong order changes other crops."""

    class Wrong(KeyedDropPath):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor.repeat(len(x) // len(self.factor)).view(-1, *[1] * (x.dim() - 1))

    backbone = train_once(Backbone(name="mobilevit_xxs", drop_path=0.2), 64)
    for module in backbone.modules():
        if isinstance(module, KeyedDropPath):
            module.__class__ = Wrong
    with pytest.raises(AssertionError, match="Mismatched elements"):
        assert_masks_are_of_crops(backbone, 64)
