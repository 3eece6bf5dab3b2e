"""A backbone's form, as vitds/plan/activations.py counts it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from timm.layers import Mlp, PatchEmbed
from timm.models.pvt_v2 import OverlapPatchEmbed, PyramidVisionTransformerV2
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn

from vitds.config.tree import Settings
from vitds.models.build import patch_count
from vitds.models.stochastic import kept_patches
from vitds.models.t2t import DIRECTIONS, TOKEN_WIDTH, PerformerLayer, TokensToToken
from vitds.plan.activations import Stage, pyramid_stage, token_stage, vit_stage


def stages_of(backbone: nn.Module, settings: Settings) -> tuple[Stage, ...] | None:
    """The stages of a plain Vision Transformer, T2T-ViT or PVT v2; None of a model that has no formula."""
    if isinstance(backbone, VisionTransformer) and all(map(_is_plain, backbone.blocks)):
        if isinstance(backbone.patch_embed, PatchEmbed):
            return (_vit_stage(backbone, settings),)
        if isinstance(backbone.patch_embed, TokensToToken):
            return (*_token_stages(backbone.patch_embed), _vit_stage(backbone, settings))
    if isinstance(backbone, PyramidVisionTransformerV2) and backbone.stages[0].blocks[0].attn.pool is None:
        return tuple(_pyramid_stages(backbone, settings.views.crop_px))
    return None


class AttentionShape(NamedTuple):
    """Of a block's attention, for one crop."""

    heads: int
    tokens: int
    width: int


def attention_shape(backbone: nn.Module, settings: Settings) -> AttentionShape | None:
    """What the blocks of a Vision Transformer attend with, tokens as patch drop leaves them; None of another
    model.
    """
    if not isinstance(backbone, VisionTransformer) or not all(map(_is_plain, backbone.blocks)):
        return None
    attention = backbone.blocks[0].attn
    tokens = kept_patches(patch_count(backbone), settings.backbone.patch_drop) + backbone.num_prefix_tokens
    return AttentionShape(attention.num_heads, tokens, attention.head_dim)


def _is_plain(block: nn.Module) -> bool:
    kinds = (type(block), type(getattr(block, "attn", None)), type(getattr(block, "mlp", None)))
    # The types themselves: a subclass may keep other activations than the formula counts.
    if kinds != (Block, Attention, Mlp):
        return False
    return block.attn.fused_attn and isinstance(block.attn.q_norm, nn.Identity)


def _vit_stage(backbone: VisionTransformer, settings: Settings) -> Stage:
    block, drop = backbone.blocks[0], settings.backbone.patch_drop
    patches, prefix = patch_count(backbone), backbone.num_prefix_tokens
    return vit_stage(
        width=backbone.embed_dim,
        depth=len(backbone.blocks),
        heads=block.attn.num_heads,
        hidden=block.mlp.fc1.out_features,
        tokens=kept_patches(patches, drop) + prefix,
        before_drop=patches + prefix if drop else 0,
        pools_first=isinstance(backbone.norm, nn.Identity),
        scales_layers=not isinstance(block.ls1, nn.Identity),
    )


def _token_stages(embed: TokensToToken) -> Iterator[Stage]:
    """The first layer works on a grid of four times the patches' side, the second on one of twice."""
    for layer, tokens in zip(embed.layers, (16 * embed.num_patches, 4 * embed.num_patches), strict=True):
        yield token_stage(
            window=layer.qkv.in_features,
            tokens=tokens,
            width=TOKEN_WIDTH,
            directions=DIRECTIONS if isinstance(layer, PerformerLayer) else 0,
            projected=embed.num_patches * embed.proj.in_features if layer is embed.layers[-1] else 0,
        )


def _pyramid_stages(backbone: PyramidVisionTransformerV2, crop_px: int) -> Iterator[Stage]:
    side, enters = crop_px, 0
    for embed, stage in zip(_patch_embeds(backbone), backbone.stages, strict=True):
        side = _side_after(embed.proj, side)
        attention = stage.blocks[0].attn
        yield pyramid_stage(
            width=attention.dim,
            depth=len(stage.blocks),
            heads=attention.num_heads,
            hidden=stage.blocks[0].mlp.fc1.out_features,
            tokens=side**2,
            reduced=_side_after(attention.sr, side) ** 2 if attention.sr is not None else 0,
            enters=enters,
        )
        enters = side**2 * attention.dim


def _patch_embeds(backbone: PyramidVisionTransformerV2) -> list[OverlapPatchEmbed]:
    """Of each stage; the first one's stands before the stages."""
    return [backbone.patch_embed, *(stage.downsample for stage in list(backbone.stages)[1:])]


def _side_after(convolution: nn.Conv2d, side: int) -> int:
    kernel, stride, padding = (
        each[0] for each in (convolution.kernel_size, convolution.stride, convolution.padding)
    )
    return (side + 2 * padding - kernel) // stride + 1
