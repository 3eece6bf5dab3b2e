"""Where a network looks: how much of its features, or of its answer, comes from each part of an image."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt

import torch
from jaxtyping import Float
from timm.layers import Attention
from timm.models import VisionTransformer
from torch import Tensor, nn

Score = Callable[[Float[Tensor, "M D"]], Float[Tensor, " M"]]
ATTENTION = "attention"
GRADIENT = "gradient"


def looks(
    backbone: nn.Module, images_M3SS: Float[Tensor, "M 3 S S"], score: Score
) -> tuple[str, Float[Tensor, "M h w"]] | None:
    """A map an image, each scaled to 0..1; all 1 where it is flat.

    Args:
        backbone: in evaluation mode, on the images' device.
        images_M3SS: normalised.
        score: of an image's features, for the gradient maps: one number an image.
    Returns: ATTENTION for a Vision Transformer whose blocks have timm's plain attention, GRADIENT for any
        other network, and the maps; None where the network has no grid of features to draw on.
    """
    is_plain = isinstance(backbone, VisionTransformer) and all(
        type(getattr(block, "attn", None)) is Attention for block in backbone.blocks
    )
    kind, map_Mhw = ATTENTION, attention_rollout(backbone, images_M3SS) if is_plain else None
    if map_Mhw is None:
        kind, map_Mhw = GRADIENT, gradient_maps(backbone, images_M3SS, score)
    if map_Mhw is None or map_Mhw[0].numel() < 4:
        return None
    low_M11, high_M11 = map_Mhw.amin((1, 2), keepdim=True), map_Mhw.amax((1, 2), keepdim=True)
    flat_Mhw = torch.ones_like(map_Mhw)
    return kind, torch.where(high_M11 > low_M11, (map_Mhw - low_M11) / (high_M11 - low_M11), flat_Mhw)


@torch.inference_mode()
def attention_rollout(
    backbone: VisionTransformer, images_M3SS: Float[Tensor, "M 3 S S"]
) -> Float[Tensor, "M h w"] | None:
    """How much of each patch flows into the class token, or into the mean of the patches where that is taken.

    The attention of all blocks is multiplied, each averaged over its heads and mixed with the identity, which
    stands for the residual branch.

    Returns: shares that sum to at most 1; None where the patches are no whole grid.
    Source: Abnar and Zuidema 2020 (arXiv:2005.00928).
    """
    tokens: list[Tensor] = []
    hooks = [
        block.attn.register_forward_pre_hook(lambda module, args: tokens.append(args[0]))
        for block in backbone.blocks
    ]
    try:
        backbone(images_M3SS)
    finally:
        for hook in hooks:
            hook.remove()
    flow_MNN = torch.eye(tokens[0].shape[1], device=images_M3SS.device).expand(len(images_M3SS), -1, -1)
    for block, token_MND in zip(backbone.blocks, tokens, strict=True):
        share_MNN = (_attention(block.attn, token_MND) + torch.eye(token_MND.shape[1]).to(token_MND)) / 2
        flow_MNN = share_MNN @ flow_MNN
    prefix = backbone.num_prefix_tokens
    pooled = slice(0, 1) if backbone.global_pool == "token" else slice(prefix, None)
    patch_MP = flow_MNN[:, pooled, prefix:].mean(1)
    height, width = backbone.patch_embed.grid_size
    return patch_MP.reshape(-1, height, width) if height * width == patch_MP.shape[1] else None


def _attention(module: Attention, token_MND: Float[Tensor, "M N D"]) -> Float[Tensor, "M N N"]:
    """Mean over the heads of what a block's attention gives each token of each other one."""
    images, tokens, _ = token_MND.shape
    qkv = module.qkv(token_MND).reshape(images, tokens, 3, module.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = module.q_norm(qkv[0]), module.k_norm(qkv[1])
    return (query @ key.transpose(-2, -1) * module.scale).softmax(-1).mean(1)


def gradient_maps(
    backbone: nn.Module, images_M3SS: Float[Tensor, "M 3 S S"], score: Score
) -> Float[Tensor, "M h w"] | None:
    """The parts of the last grid of features that raise a score: the channels, weighted by their gradients.

    Returns: 0 where a part lowers the score; None where the network has no such grid.
    Source: Grad-CAM, Selvaraju et al. 2017 (arXiv:1610.02391).
    """
    with torch.inference_mode():
        whole_MD = backbone(images_M3SS)
        last = backbone.forward_features(images_M3SS)
    if not isinstance(last, Tensor):
        return None
    with torch.enable_grad():
        last = last.clone().requires_grad_()
        feature_MD = backbone.forward_head(last)
        if feature_MD.shape != whole_MD.shape or not torch.allclose(feature_MD, whole_MD, 1e-3, 1e-4):
            return None  # the network has a path past this grid
        gradient = torch.autograd.grad(score(feature_MD).sum(), last)[0]
    grid_MhwC, gradient_MhwC = _as_grid(backbone, last.detach()), _as_grid(backbone, gradient)
    if grid_MhwC is None or gradient_MhwC is None:
        return None
    weight_M11C = gradient_MhwC.mean((1, 2), keepdim=True)
    return (grid_MhwC * weight_M11C).sum(-1).relu()


def _as_grid(backbone: nn.Module, last: Tensor) -> Float[Tensor, "M h w C"] | None:
    """Whatever a network's last features are, channels last; tokens as the square that they came from."""
    if last.dim() == 4:
        return last if "NHWC" in str(getattr(backbone, "output_fmt", "NCHW")) else last.permute(0, 2, 3, 1)
    if last.dim() != 3:
        return None
    patch_MPC = last[:, getattr(backbone, "num_prefix_tokens", 0) :]
    side = isqrt(patch_MPC.shape[1])
    return patch_MPC.unflatten(1, (side, side)) if side and side**2 == patch_MPC.shape[1] else None
