"""MAE's loss against a plain reference and at its known values, what its decoder sees, what it refuses."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.reference import mae_losses
from vitds.batch import CropBatch
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.errors import SettingsError
from vitds.methods.mae import Decoder, Method, patches_of, reconstruction
from vitds.models.build import build_backbone, patch_count
from vitds.models.stochastic import StochasticDraws

CPU = torch.device("cpu")
CROPS, SIDE, PATCH = 3, 12, 4
LENGTH, PIXELS = (SIDE // PATCH) ** 2, 3 * PATCH**2
KEPT = torch.tensor([[0, 4, 5], [1, 2, 8], [3, 6, 7]])
HIDDEN = torch.ones(CROPS, LENGTH, dtype=torch.bool).scatter(1, KEPT, False)


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loss_of(painted: Tensor, images: Tensor) -> Tensor:
    return reconstruction(painted, patches_of(images, PATCH), KEPT)


def test_losses_equal_the_plain_reference() -> None:
    painted, images = numbers(0, CROPS, LENGTH, PIXELS), numbers(1, CROPS, 3, SIDE, SIDE)
    torch.testing.assert_close(loss_of(painted, images), mae_losses(painted, images, KEPT, PATCH))


def test_the_gradient_is_that_of_finite_differences_and_none_for_what_was_seen() -> None:
    painted, images = numbers(2, CROPS, LENGTH, PIXELS).requires_grad_(), numbers(3, CROPS, 3, SIDE, SIDE)
    assert torch.autograd.gradcheck(lambda x: loss_of(x, images), painted)
    loss_of(painted, images).sum().backward()
    assert painted.grad[HIDDEN].abs().min() > 0 and not painted.grad[~HIDDEN].any()


def test_what_was_seen_is_no_target() -> None:
    painted, images = numbers(4, CROPS, LENGTH, PIXELS), numbers(5, CROPS, 3, SIDE, SIDE)
    changed = torch.where(HIDDEN[..., None], patches_of(images, PATCH), 7.0)
    assert torch.equal(reconstruction(painted, changed, KEPT), loss_of(painted, images))


@pytest.mark.parametrize(("patch_px", "expected"), [(16, 0.9987), (8, 0.9948), (4, 0.9792)])
def test_painting_nothing_costs_one_less_the_lost_mean(patch_px: int, expected: float) -> None:
    pixels = numbers(6, 2, 4, 3 * patch_px**2)
    loss = reconstruction(torch.zeros_like(pixels), pixels, torch.tensor([[0], [3]]))
    assert loss.tolist() == pytest.approx([expected, expected], abs=1e-4)


def test_a_patch_of_one_colour_costs_what_is_painted_and_stays_finite() -> None:
    painted = torch.full((1, 4, PIXELS), 0.5, dtype=torch.float64)
    loss = reconstruction(painted, torch.ones(1, 4, PIXELS, dtype=torch.float64), torch.tensor([[0]]))
    assert loss.item() == pytest.approx(0.25)


def test_the_decoder_puts_each_token_back_in_its_place_and_its_own_where_nothing_was_seen() -> None:
    decoder = Decoder(width_in=6, width=32, depth=0, side=3, prefix=1, pixels=PIXELS).double()
    tokens = numbers(7, CROPS, 4, 6)
    expected = decoder.hidden.expand(CROPS, LENGTH, -1).clone()
    for crop in range(CROPS):
        for number, place in enumerate(KEPT[crop]):
            expected[crop, place] = decoder.embedding(tokens[crop, number + 1])
    expected = decoder.painting(decoder.norm(expected + decoder.place))
    torch.testing.assert_close(decoder(tokens, KEPT), expected)


# The method as it trains


def small_settings(*words: str) -> Settings:
    return load_settings(recipe="mae_digits", command="pretrain", assignments=words, flags={})


def built(settings: Settings, images: int = 8) -> tuple[Method, CropBatch]:
    """The method with the masks of its first step, and crops of noise."""
    side, views = settings.views.crop_px, settings.views.count
    backbone = build_backbone(settings.backbone, crop_px=side, seed=0)
    rows = views * settings.batch.chunk_images
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=rows, patches=patch_count(backbone))
    method = Method(settings, backbone, 0)
    method.module.train()
    draws.fill(0, 0, images // settings.batch.chunk_images)
    batch = CropBatch(
        crops=torch.randint(
            0,
            256,
            (images, views, 3, side, side),
            dtype=torch.uint8,
            generator=torch.Generator().manual_seed(1),
        ),
        index=torch.arange(images),
        label=torch.zeros(images, dtype=torch.int64),
        is_real=torch.ones(images, dtype=torch.bool),
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=images,
    )
    return method, batch


def test_of_each_crop_the_share_is_hidden_by_its_own_draw() -> None:
    settings = small_settings("backbone.patch_drop=0.6")
    method, _ = built(settings)
    kept = method.module.backbone.patch_drop.order
    assert kept.shape == (8, 3)  # int(9 · 0.4)
    assert len({tuple(row) for row in kept.tolist()}) > 4 and all(len(set(row)) == 3 for row in kept.tolist())


def test_hidden_pixels_do_not_reach_the_backbone_and_seen_ones_do() -> None:
    settings = small_settings()
    method, batch = built(settings)
    images = method.prepare(batch, settings, CPU).images
    backbone = method.module.backbone
    tokens, kept = backbone(images), backbone.patch_drop.order
    is_hidden = torch.ones(len(images), 9, dtype=torch.bool).scatter(1, kept, False).view(-1, 1, 3, 1, 3, 1)
    is_hidden = is_hidden.expand(-1, 3, -1, 4, -1, 4).reshape(images.shape)
    assert torch.equal(backbone(torch.where(is_hidden, 9.0, images)), tokens)
    assert not torch.equal(backbone(torch.where(is_hidden, images, 9.0)), tokens)


def test_the_loss_starts_at_nothing_painted_and_what_a_new_decoder_paints() -> None:
    """A normed token of width w times Xavier's weights has a variance of 2 w / (w + p)."""
    settings = small_settings()
    method, batch = built(settings, 32)
    (loss,) = method.losses(method.module, method.prepare(batch, settings, CPU), 0)
    assert loss.item() == pytest.approx(47 / 48 + 2 * 64 / (64 + 48), rel=0.1)


def test_padded_crops_add_nothing() -> None:
    settings = small_settings()
    method, batch = built(settings)
    prepared = method.prepare(batch, settings, CPU)
    whole = method.losses(method.module, prepared, 0)
    prepared.targets.weight[3] = 0
    prepared.images[3] = float(9)
    (less,) = method.losses(method.module, prepared, 0)
    prepared.images[3] = float(-9)
    assert method.losses(method.module, prepared, 0).item() == less.item() < whole.item()


def test_eight_images_are_learned_by_heart() -> None:
    settings = small_settings("backbone.options={patch_size: 4, embed_dim: 48, depth: 1, num_heads: 2}")
    method, batch = built(settings)
    optimizer = torch.optim.AdamW(method.module.parameters(), lr=4e-3)
    prepared = method.prepare(batch, settings, CPU)
    for _ in range(150):
        loss = method.losses(method.module, prepared, 0).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1


def test_every_part_of_the_backbone_learns() -> None:
    settings = small_settings()
    method, batch = built(settings)
    method.losses(method.module, method.prepare(batch, settings, CPU), 0).sum().backward()
    assert [name for name, value in method.module.named_parameters() if value.grad is None] == []


def test_a_mask_of_nothing_is_refused() -> None:
    with pytest.raises(SettingsError) as caught:
        small_settings("backbone.patch_drop=0")
    assert str(caught.value).startswith(
        "backbone.patch_drop: method mae paints the patches that are left out, so it needs more than 0, got 0"
    )


def test_a_crop_whose_only_patch_has_to_be_seen_is_refused() -> None:
    settings = small_settings("views.crop_px=4")
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=4, seed=0)
    with pytest.raises(SettingsError, match="of the 1 of a crop backbone.patch_drop 0.* leaves none out"):
        Method(settings, backbone, 0)


@pytest.mark.parametrize("name", ["deit_tiny_distilled_patch16_224", "vit_base_patch16_siglip_224"])
def test_a_backbone_that_is_no_plain_vision_transformer_is_refused(name: str) -> None:
    settings = small_settings(f"backbone.name={name}", "backbone.options={}", "views.crop_px=32")
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=32, seed=0)
    with pytest.raises(SettingsError) as caught:
        Method(settings, backbone, 0)
    assert str(caught.value) == (
        f"backbone.name {name}: method mae hides patches from a plain Vision Transformer, which this is not; "
        "take one of timm's vit_ or deit_ models, such as deit_tiny_patch16_224"
    )
