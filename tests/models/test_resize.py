"""Position embeddings and bias tables of one grid made fit for another: what stays, and what is refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from vitds.config.tree import Backbone
from vitds.errors import ShapeError
from vitds.models.create import create_model
from vitds.models.resize import resized, why_not_at

SWIN = {"depths": [1, 1, 1, 1], "embed_dim": 12, "num_heads": [1, 1, 2, 2]}


@pytest.mark.parametrize(
    ("name", "options", "kind"),
    [
        ("test_vit", {}, "pos_embed"),
        (
            "beit_base_patch16_224",
            {"depth": 1, "embed_dim": 24, "num_heads": 2},
            "relative_position_bias_table",
        ),
        ("swin_tiny_patch4_window7_224", SWIN, "relative_position_bias_table"),
        ("pit_ti_224", {"depth": [1, 1, 1]}, "pos_embed"),
        ("nest_tiny", {}, "pos_embed"),
        ("levit_128s", {}, "attention_biases"),
        ("mvitv2_tiny", {}, "rel_pos_h"),
        ("visformer_tiny", {}, "pos_embed1"),
    ],
)
def test_weights_of_a_family_go_from_112_to_224(name: str, options: dict, kind: str) -> None:
    settings = Backbone(name=name, options=options, drop_path=0)
    with torch.device("meta"):
        small, large = (create_model(settings, side).state_dict() for side in (112, 224))
    assert any(key.endswith(kind) for key in large if small[key].shape != large[key].shape)
    assert why_not_at(settings, 112, 224) == ""


def test_prefix_tokens_stay_and_the_grid_is_interpolated() -> None:
    value = torch.randn(1, 49 + 5, 8)
    fitted = resized("pos_embed", value, torch.zeros(1, 196 + 5, 8))
    grid = value[:, 5:].unflatten(1, (7, 7)).movedim(3, 1)
    expected = nn.functional.interpolate(grid, size=(14, 14), mode="bicubic", align_corners=False)
    assert torch.equal(fitted[:, :5], value[:, :5])
    assert torch.allclose(fitted[:, 5:].unflatten(1, (14, 14)).movedim(3, 1), expected)


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pos_embed", (1, 8, 7, 7), (1, 8, 14, 14)),  # PiT
        ("pos_embed", (1, 7, 7, 8), (1, 14, 14, 8)),  # VOLO
        ("pos_embed", (1, 4, 9, 8), (1, 4, 36, 8)),  # NesT: four blocks
        ("blocks.0.attn.rel_pos_w", (13, 8), (27, 8)),  # SAM, MViT
        ("blocks.0.attn.attention_biases", (3, 16), (3, 49)),  # LeViT
        ("blocks.0.attn.relative_position_bias_table", (169, 3), (729, 3)),  # Swin
        ("blocks.0.attn.relative_position_bias_table", (172, 3), (732, 3)),  # BEiT: three for the class token
        ("blocks.0.attn.relative_position_bias_table", (3, 13, 13), (3, 27, 27)),  # MaxViT
    ],
)
def test_every_kind_keeps_a_constant_and_its_dtype(name: str, before: tuple, after: tuple) -> None:
    fitted = resized(name, torch.full(before, 0.5, dtype=torch.float16), torch.zeros(after))
    assert fitted.shape == after and fitted.dtype == torch.float16
    torch.testing.assert_close(fitted, torch.full(after, 0.5, dtype=torch.float16), rtol=0, atol=1e-3)


def test_rows_of_a_map_stay_rows() -> None:
    """A ramp down the image is one after resizing: height and width are not taken for each other."""
    ramp = torch.linspace(0, 1, 7)
    as_map = resized("pos_embed", ramp.view(1, 7, 1, 1).expand(1, 7, 7, 8), torch.zeros(1, 14, 14, 8))
    as_tokens = resized("pos_embed", ramp.repeat_interleave(7).view(1, 49, 1), torch.zeros(1, 196, 1))
    for down in (as_map[0, :, 3, 0], as_tokens.view(14, 14)[:, 3]):
        assert torch.all(down[2:-2].diff() > 0)
    assert torch.allclose(as_map[0, 5, :, 0], as_map[0, 5, :1, 0])


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("pos_embed", (1, 51, 8), (1, 197, 8)),  # no grid
        ("pos_embed", (1, 50, 8), (1, 197, 16)),  # another width
        ("blocks.0.mlp.fc1.weight", (96, 24), (192, 48)),
        ("blocks.0.attn.relative_position_bias_table", (169, 3), (729, 6)),
    ],
)
def test_what_is_no_grid_is_refused(name: str, before: tuple, after: tuple) -> None:
    with pytest.raises(ShapeError, match=rf"{name} has shape \[.*\], the backbone's has \[.*\]"):
        resized(name, torch.zeros(before), torch.zeros(after))


def test_a_model_whose_weights_belong_to_one_side_is_known_before_training() -> None:
    mixer = Backbone(name="gmlp_ti16_224", drop_path=0)
    assert "gate.proj.weight has shape [49, 49], the backbone's has [196, 196]" in why_not_at(mixer, 112, 224)


def test_a_side_that_a_model_does_not_take_later_is_known_before_training() -> None:
    assert why_not_at(Backbone(), 112, 200) == "deit_tiny_patch16_224 does not take crops of 200 pixels"
