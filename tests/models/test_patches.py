"""The patch projection as a product against timm's convolution."""

from __future__ import annotations

import pytest
import torch
from timm.layers import PatchEmbed
from torch import nn

from vitds.models.patches import PatchProduct, multiply_patches


def embedding(**options: object) -> nn.Module:
    """A backbone that is nothing but its patch projection."""
    torch.manual_seed(0)
    backbone = nn.Module()
    backbone.patch_embed = PatchEmbed(**options)
    return backbone


@pytest.mark.parametrize("options", [{"patch_size": 4}, {"patch_size": (4, 8), "bias": False}], ids=str)
def test_patches_times_the_weight_are_the_convolution_and_its_gradients(options: dict[str, object]) -> None:
    plain, product = (embedding(img_size=16, embed_dim=12, **options) for _ in range(2))
    names = list(product.state_dict())
    multiply_patches(product)
    assert type(product.patch_embed.proj) is PatchProduct and list(product.state_dict()) == names
    images = torch.randn(5, 3, 16, 16)
    found = []
    for module in (plain, product):
        x = images.clone().requires_grad_()
        out = module.patch_embed(x)
        (out * torch.arange(out[0].numel()).view_as(out[0])).sum().mul(1e-3).backward()
        found.append([out, x.grad, *(parameter.grad for parameter in module.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-6, atol=1e-6)


def test_what_a_patch_does_not_divide_is_left_out_as_a_convolution_does() -> None:
    plain = nn.Conv2d(3, 8, 4, 4)
    product = nn.Conv2d(3, 8, 4, 4)
    product.load_state_dict(plain.state_dict())
    product.__class__ = PatchProduct
    images = torch.randn(2, 3, 11, 11)
    torch.testing.assert_close(product(images), plain(images), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convolution", [nn.Conv2d(3, 8, 4, 2), nn.Conv2d(3, 8, 4, 4, padding=2)], ids=str)
def test_a_projection_whose_windows_overlap_or_reach_out_stays_a_convolution(convolution: nn.Conv2d) -> None:
    backbone = nn.Module()
    backbone.patch_embed = nn.Module()
    backbone.patch_embed.proj = convolution
    multiply_patches(backbone)
    assert type(convolution) is nn.Conv2d
