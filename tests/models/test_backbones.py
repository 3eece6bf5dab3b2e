"""timm's backbones as built here: sizes, seeds, what is refused."""

from __future__ import annotations

import pytest
import timm
import torch

from vitds.config.tree import Backbone
from vitds.errors import SettingsError
from vitds.models.build import build_backbone, checkpoint_activations
from vitds.models.facts import ModelFacts, model_facts

TINY = {"patch_size": 4, "embed_dim": 24, "depth": 3, "num_heads": 3}


@pytest.mark.parametrize(
    ("name", "crop_px", "millions"),
    [
        ("deit_tiny_patch16_224", 112, 5.52),
        ("deit_tiny_patch16_224", 224, 5.54),
        ("deit_tiny_patch16_224", 448, 5.66),
        ("deit_base_patch16_224", 224, 85.9),
        ("pvt_v2_b0", 112, 3.44),
        ("pvt_v2_b3", 112, 44.8),
        ("t2t_vit_7", 112, 4.02),  # without the fixed positions and directions
        ("t2t_vit_14", 112, 21.1),
        ("t2t_vit_t_14", 112, 21.1),
    ],
)
def test_sizes_with_a_102_class_head_are_the_papers(name: str, crop_px: int, millions: float) -> None:
    facts = model_facts(Backbone(name=name), crop_px)
    head = 102 * facts.width + 102
    # The sizes of the authors' code; what is fixed is not counted.
    assert (facts.parameters + head) / 1e6 == pytest.approx(millions, rel=0.0015)


def test_a_transformers_facts_are_those_of_its_arithmetic() -> None:
    """Per token and block 24 D² in the products of weights, 4 T D in those of attention."""
    facts = model_facts(Backbone(options=TINY), crop_px=16)
    tokens, width = 17, 24
    products = 3 * tokens * (24 * width**2 + 4 * tokens * width) + 16 * 2 * width * 3 * 4**2
    assert (facts.width, facts.patches, facts.flops) == (24, 16, products)


def test_the_backbone_carries_its_facts() -> None:
    backbone = build_backbone(Backbone(name="mobilenetv3_small_050"), crop_px=64, seed=0).eval()
    assert isinstance(backbone.facts, ModelFacts)
    # timm's own attribute is 288: the width before the last layer.
    assert backbone.facts.width == 1024 == backbone(torch.zeros(1, 3, 64, 64)).shape[1]
    assert backbone.facts.parameters == sum(weight.numel() for weight in backbone.parameters())


def test_weights_are_a_function_of_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = build_backbone(Backbone(options=TINY), crop_px=16, seed=3).state_dict()
    torch.manual_seed(2)
    again, other = (
        build_backbone(Backbone(options=TINY), crop_px=16, seed=seed).state_dict() for seed in (3, 4)
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["patch_embed.proj.weight"], other["patch_embed.proj.weight"])
    # Truncated normal 0.02, not torch's default.
    assert 0.015 < float(first["blocks.0.mlp.fc1.weight"].std()) < 0.025


def test_convolutions_see_the_channels_of_a_pixel_side_by_side() -> None:
    backbone = build_backbone(Backbone(name="resnet18"), crop_px=32, seed=0).eval()
    own = timm.create_model("resnet18", num_classes=0).eval()
    own.load_state_dict(backbone.state_dict())
    crops, orders = torch.randn(2, 3, 32, 32), []
    backbone.layer2.register_forward_hook(
        lambda _, inputs, map_MCSS: orders.append(map_MCSS.is_contiguous(memory_format=torch.channels_last))
    )
    torch.testing.assert_close(backbone(crops), own(crops))
    assert orders == [True]


def test_the_callers_generator_is_left_as_it_was() -> None:
    before = torch.get_rng_state()
    build_backbone(Backbone(options=TINY), crop_px=16, seed=3)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("settings", "crop_px", "said"),
    [
        (
            {"name": "deit_tiny_patch16_244"},
            112,
            "'deit_tiny_patch16_244' is no timm model; near names: .*_224",
        ),
        ({"options": {"colour": 1}}, 112, "cannot be built: .*colour"),
        (
            {"options": {"depth": 1}},
            100,
            "views.crop_px 100 is not a multiple of deit_tiny_patch16_224's patch of 16 pixels; "
            "views.crop_px may be 96 or 112$",
        ),
        (
            {"name": "eva02_tiny_patch14_224", "patch_drop": 0.5, "drop_path": 0},
            28,
            "this model's position embedding needs all patches; set backbone.patch_drop=0$",
        ),
        (
            {"name": "repvit_m1"},
            64,
            "unexpected keyword argument 'drop_path_rate'; set backbone.drop_path=0$",
        ),
        (
            {"name": "dla46x_c", "drop_path": 0},
            112,
            r"dla46x_c cannot take crops of 112 pixels \(.*\); views.crop_px may be \d+ or \d+$",
        ),
        ({"name": "dla46x_c"}, 112, r"; views.crop_px may be \d+ or \d+ with backbone.drop_path=0$"),
        (
            {"name": "lcnet_035"},
            64,
            "lcnet_035 has no branch that could be left out; set backbone.drop_path=0$",
        ),
        (
            {"name": "mvitv2_tiny"},
            112,
            r"112 pixels \(index 5 is out of bounds .*\); try another views.crop_px",
        ),
        ({"name": "efficientformer_l1"}, 112, r"take crops of 112 pixels .*; views.crop_px may be 224$"),
        (
            {"name": "mobilevit_xxs", "drop_path": 0, "patch_drop": 0.5},
            64,
            "unexpected keyword argument 'patch_drop_rate'; set backbone.patch_drop=0$",
        ),
        (
            {"options": TINY | {"global_pool": ""}},
            16,
            r"gives \[17, 24\] for a crop, .* backbone.options.global_pool",
        ),
    ],
)
def test_what_cannot_train_is_refused_with_what_can(settings: dict, crop_px: int, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        build_backbone(Backbone(**settings), crop_px=crop_px, seed=0)


def test_a_drop_path_whose_rows_are_not_whole_crops_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model of this timm does so; one is made of a ViT that turns its tokens around."""

    class Turned(timm.models.vision_transformer.Block):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x.transpose(0, 1)).transpose(0, 1)

    monkeypatch.setattr(timm.models.vision_transformer, "Block", Turned)
    with pytest.raises(SettingsError, match="rows of a crop are not together; set backbone.drop_path=0$"):
        build_backbone(Backbone(options=TINY | {"block_fn": Turned}), crop_px=16, seed=0)


@pytest.mark.parametrize("name", ["vgg11", "selecsls42"])
def test_checkpointing_that_a_model_cannot_do_is_refused_in_words(name: str) -> None:
    with pytest.raises(
        SettingsError, match=f"engine.activation_checkpointing: timm's {name} cannot do it; set"
    ):
        checkpoint_activations(timm.create_model(name, num_classes=0), name)
