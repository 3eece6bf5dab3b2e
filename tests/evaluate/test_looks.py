"""Where a network looks, against the same in plain loops, and on networks of several kinds."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch

from vitds.evaluate.looks import ATTENTION, GRADIENT, attention_rollout, gradient_maps, looks
from vitds.evaluate.map import plane

SWIN = {"img_size": 64, "depths": (1, 1, 1, 1), "window_size": 2}
VIT = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 0}


def images(side: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def rollout_by_loops(backbone: torch.nn.Module, x_M3SS: torch.Tensor) -> np.ndarray:
    """Block after block, head after head, as the paper has it."""
    token_MND = backbone.patch_embed(x_M3SS)
    token_MND = backbone.norm_pre(backbone.patch_drop(backbone._pos_embed(token_MND)))
    flow = [np.eye(token_MND.shape[1]) for _ in x_M3SS]
    for block in backbone.blocks:
        normed, attention = block.norm1(token_MND), block.attn
        width = normed.shape[-1]
        part = width // attention.num_heads
        weight, bias = attention.qkv.weight.detach(), attention.qkv.bias.detach()
        for i in range(len(x_M3SS)):
            mean = 0
            for head in range(attention.num_heads):
                at = slice(head * part, (head + 1) * part)
                q = normed[i] @ weight[:width][at].T + bias[:width][at]
                k = normed[i] @ weight[width : 2 * width][at].T + bias[width : 2 * width][at]
                mean = mean + torch.softmax(q @ k.T / part**0.5, -1).detach().numpy() / attention.num_heads
            flow[i] = (0.5 * mean + 0.5 * np.eye(len(mean))) @ flow[i]
        token_MND = block(token_MND)
    return np.stack(flow)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_rollout_is_that_of_plain_loops(pool: str) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("vit_tiny_patch16_224", **VIT, global_pool=pool).eval()
    x_M3SS = images(32)
    with torch.no_grad():
        flow_MNN = rollout_by_loops(backbone, x_M3SS)
    prefix = backbone.num_prefix_tokens
    rows = flow_MNN[:, 0, prefix:] if pool == "token" else flow_MNN[:, prefix:, prefix:].mean(1)
    found = attention_rollout(backbone, x_M3SS)
    assert found.shape == (3, 4, 4)
    np.testing.assert_allclose(found.numpy(), rows.reshape(3, 4, 4), rtol=1e-4, atol=1e-7)


def test_a_gradient_map_is_channels_weighted_by_mean_gradients() -> None:
    torch.manual_seed(0)
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    x_M3SS, weight_D = images(64, 2), torch.randn(512)
    found = gradient_maps(backbone, x_M3SS, lambda feature_MD: feature_MD @ weight_D)
    # Of a mean over the grid, the gradient is the weight itself over the number of cells.
    with torch.no_grad():
        grid = backbone.forward_features(x_M3SS)
    expected = torch.einsum("mchw,c->mhw", grid, weight_D / grid[0, 0].numel()).relu()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "side", "kind"),
    [
        ("vit_tiny_patch16_224", VIT, 32, ATTENTION),
        ("deit_tiny_distilled_patch16_224", {"img_size": 32}, 32, ATTENTION),
        ("resnet18", {}, 64, GRADIENT),
        ("convnext_atto", {}, 64, GRADIENT),
        (
            "swin_tiny_patch4_window7_224",
            {"img_size": 64, "depths": (1, 1, 1, 1), "window_size": 2},
            64,
            GRADIENT,
        ),
    ],
)
def test_maps_of_several_kinds_of_networks(name: str, options: dict, side: int, kind: str) -> None:
    torch.manual_seed(0)
    backbone = timm.create_model(name, **{"num_classes": 0, **options}).eval()
    found = looks(backbone, images(side), lambda feature_MD: feature_MD.square().sum(1))
    assert found is not None and found[0] == kind
    assert found[1].shape[0] == 3 and found[1].min() >= 0
    torch.testing.assert_close(found[1].amax((1, 2)), torch.ones(3))


def test_a_network_that_ends_in_one_cell_has_no_map() -> None:
    backbone = timm.create_model("resnet18", num_classes=0).eval()
    assert looks(backbone, images(32), lambda feature_MD: feature_MD.sum(1)) is None


def test_images_of_one_kind_lie_together_on_the_plane() -> None:
    kind_M = torch.arange(60) % 3
    rows_MD = 5 * torch.eye(3, 16)[kind_M] + 0.3 * torch.randn(
        60, 16, generator=torch.Generator().manual_seed(0)
    )
    at = plane(rows_MD)
    assert at.shape == (60, 2) and at.min() == 0 and at.max() == 1
    apart = ((at[:, None] - at[None]) ** 2).sum(2) + 9 * np.eye(60)
    assert (kind_M[apart.argmin(1)] == kind_M).float().mean() > 0.95
    assert (plane(rows_MD) == at).all()


def test_features_that_collapsed_have_a_plane() -> None:
    assert np.isfinite(plane(torch.ones(20, 8))).all()
