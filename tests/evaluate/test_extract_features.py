"""Features of a frozen model: order, precision, and that the model is left as it was."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from torch import Tensor, nn

from vitds.errors import NumericsError, ShapeError
from vitds.evaluate.features import extract_features

CHANNELS = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}


@dataclass(frozen=True)
class Batch:
    crops: Tensor
    label: Tensor
    index: Tensor


def make_batches(images, batch_images, side_px=16):
    """The same images for every batch size, in a shuffled order of the file."""
    draw = torch.Generator().manual_seed(0)
    crops = torch.randint(256, (images, 3, side_px, side_px), dtype=torch.uint8, generator=draw)
    index = torch.randperm(images, generator=draw)
    return [
        Batch(*parts)
        for parts in zip(*(rows.split(batch_images) for rows in (crops, index % 3, index)), strict=True)
    ]


@pytest.fixture
def vit():
    torch.manual_seed(0)
    options = {
        "img_size": 16,
        "patch_size": 4,
        "embed_dim": 32,
        "depth": 2,
        "num_heads": 2,
        "drop_rate": 0.5,
        "drop_path_rate": 0.5,
    }
    return timm.create_model("vit_tiny_patch16_224", num_classes=0, **options).train()


def test_rows_equal_a_plain_forward_pass_of_each_image(vit):
    batches = make_batches(10, 4)
    features = extract_features(vit, batches, device="cpu", **CHANNELS)
    crops = torch.cat([batch.crops for batch in batches]).double() / 255
    images = (crops - torch.tensor(CHANNELS["mean"]).view(3, 1, 1)) / torch.tensor(CHANNELS["std"]).view(
        3, 1, 1
    )
    vit.eval()
    with torch.no_grad():
        plain = torch.cat([vit(image[None].float()) for image in images])
    torch.testing.assert_close(features.rows_MD, plain, rtol=1e-4, atol=1e-5)


def test_labels_and_indices_come_in_the_order_of_the_images(vit):
    batches = make_batches(10, 4)
    features = extract_features(vit, batches, device="cpu", **CHANNELS)
    assert features.index_M.tolist() == [int(index) for batch in batches for index in batch.index]
    assert features.label_M.tolist() == [int(index) % 3 for index in features.index_M]


def test_the_cut_into_batches_does_not_matter(vit):
    one, many = (extract_features(vit, make_batches(11, size), device="cpu", **CHANNELS) for size in (11, 3))
    torch.testing.assert_close(one.rows_MD, many.rows_MD, rtol=1e-4, atol=1e-5)
    assert one.index_M.tolist() == many.index_M.tolist()


def test_a_model_with_a_classifier_gives_logits(vit):
    vit.reset_classifier(7)
    assert extract_features(vit, make_batches(5, 2), device="cpu", **CHANNELS).rows_MD.shape == (5, 7)


@pytest.mark.parametrize("mode", [True, False])
def test_the_models_mode_is_restored(vit, mode):
    vit.train(mode)
    extract_features(vit, make_batches(4, 4), device="cpu", **CHANNELS)
    assert all(module.training is mode for module in vit.modules())


def test_a_frozen_part_of_a_training_model_stays_frozen(vit):
    vit.blocks[0].eval()
    extract_features(vit, make_batches(4, 4), device="cpu", **CHANNELS)
    assert vit.training and vit.blocks[1].training and not vit.blocks[0].attn.training


def test_running_statistics_and_generators_are_left_alone():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    extract_features(model, make_batches(8, 4), device="cpu", **CHANNELS)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_training_goes_on_after_an_extraction_as_without_it():
    """No cached tensor of the inference pass may reach a later backward pass."""
    images, losses = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(1)), []
    for looks in (0, 1):
        torch.manual_seed(0)
        model = timm.create_model(
            "vit_tiny_patch16_224",
            num_classes=4,
            img_size=16,
            patch_size=4,
            embed_dim=32,
            depth=2,
            num_heads=2,
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(3):
            for _ in range(looks):
                extract_features(model, make_batches(4, 4), device="cpu", autocast=torch.bfloat16, **CHANNELS)
            loss = nn.functional.cross_entropy(model(images), torch.arange(4))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[:3] == losses[3:] and losses[2] < losses[0]


def test_rows_can_enter_a_trained_probe(vit):
    rows = extract_features(vit, make_batches(4, 4), device="cpu", **CHANNELS).rows_MD
    probe = nn.Linear(32, 2)
    probe(rows).sum().backward()
    assert probe.weight.grad is not None and not rows.requires_grad


def test_autocast_gives_float32_rows_close_to_the_full_ones(vit):
    vit.reset_classifier(7)  # ends in a product, which autocast leaves in bfloat16
    full, low = (
        extract_features(vit, make_batches(6, 3), device="cpu", autocast=dtype, **CHANNELS).rows_MD
        for dtype in (None, torch.bfloat16)
    )
    assert low.dtype == torch.float32 and not torch.equal(low, full)
    torch.testing.assert_close(low, full, rtol=0.1, atol=0.1)


class Broken(nn.Module):
    """Gives NaN for images that begin with a dark pixel."""

    def forward(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)).masked_fill(images[:, :1, 0, 0] < -1, float("nan"))


def test_features_that_are_not_finite_name_the_image_and_leave_the_models_mode():
    batches = make_batches(40, 8)
    dark = [
        int(index)
        for batch in batches
        for crop, index in zip(batch.crops, batch.index, strict=True)
        if crop[0, 0, 0] / 255 < 0.3
    ]
    model = Broken().train()
    with pytest.raises(
        NumericsError, match=f"^the model's output: image {dark[0]} gives values that are not finite"
    ):
        extract_features(model, batches, device="cpu", **CHANNELS)
    assert model.training


def test_no_batch_is_refused(vit):
    with pytest.raises(ValueError, match="no images to evaluate: the loader gave no batch"):
        extract_features(vit, [], device="cpu", **CHANNELS)


def test_several_crops_an_image_are_refused_with_their_shape(vit):
    batch = Batch(torch.zeros(2, 6, 3, 16, 16, dtype=torch.uint8), torch.zeros(2).long(), torch.arange(2))
    with pytest.raises(
        ShapeError,
        match=r"evaluation takes one crop an image, \(B, 3, S, S\); this batch has \(2, 6, 3, 16, 16\)",
    ):
        extract_features(vit, [batch], device="cpu", **CHANNELS)


def test_a_model_that_does_not_pool_is_refused_with_its_shape(vit):
    vit.global_pool, vit.attn_pool = "", None
    with pytest.raises(
        ShapeError,
        match=r"the model returned \(4, 17, 32\) for 4 images, .* use a backbone that pools its tokens",
    ):
        extract_features(vit, make_batches(4, 4), device="cpu", **CHANNELS)
