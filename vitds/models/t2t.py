"""T2T-ViT (Yuan et al. 2021, arXiv:2101.11986), which timm lacks; importing this module registers it there.

A Vision Transformer whose patches are made in three soft splits, each of windows that overlap: 7 x 7 pixels
every 4, then twice 3 x 3 tokens every 2. Between two splits a token layer lets windows see each other, by
plain attention (T2T-ViT_t) or by kernel attention, which needs no (T, T) matrix.

The crops' side divides by 16: 49 tokens at 112 px, 196 at 224, 784 at 448. What is fixed and not trained, the
table of positions and the kernel's directions, are buffers, so they are saved and loaded like weights.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from timm.layers import LayerNorm
from timm.models import build_model_with_cfg, checkpoint, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention, unfold

TOKEN_WIDTH = 64
DIRECTIONS = 32
DROPOUT = 0.1
PATCH_PX = 16  # what the strides of the three splits come to

default_cfgs = generate_default_cfgs(
    {
        name: {"input_size": (3, 224, 224), "crop_pct": 0.9, "interpolation": "bicubic", "classifier": "head"}
        for name in ("t2t_vit_7", "t2t_vit_14", "t2t_vit_19", "t2t_vit_24", "t2t_vit_t_14")
    }
)


def positive_features(
    x_MTd: Float[Tensor, "M T d"], directions_md: Float[Tensor, "m d"]
) -> Float[Tensor, "M T m"]:
    """exp(w·x - |x|²/2) / √m for each direction w: their products estimate exp(x·y) (arXiv:2009.14794)."""
    # The root lies in the exponent, so that one result is kept for the backward pass and not two.
    shift_MT1 = (x_MTd.square().sum(-1, keepdim=True) + math.log(len(directions_md))) / 2
    return (x_MTd @ directions_md.T - shift_MT1).exp()


def kernel_attention(
    query_MTd: Float[Tensor, "M T d"],
    key_MTd: Float[Tensor, "M T d"],
    value_MTd: Float[Tensor, "M T d"],
    directions_md: Float[Tensor, "m d"],
) -> Float[Tensor, "M T d"]:
    """Attention with weights φ(query)·φ(key) over their sum, in time and memory linear in T.

    Returns: in the dtype of the values; computed in float32, for exp and its sums over thousands of tokens
        leave the range of 16 bits.
    """
    with _no_autocast(value_MTd.device.type):
        directions_md = directions_md.float()
        query_MTm = positive_features(query_MTd.float(), directions_md)
        key_MTm = positive_features(key_MTd.float(), directions_md)
        # Keys meet values first: (m, d) in place of (T, T).
        summary_Mmd = key_MTm.transpose(1, 2) @ value_MTd.float()
        weight_MT1 = query_MTm @ key_MTm.sum(1)[:, :, None]
        return (query_MTm @ summary_Mmd / (weight_MT1 + 1e-8)).to(value_MTd.dtype)


def _no_autocast(kind: str) -> AbstractContextManager:
    """Products in their numbers' own dtype; torch's meta device knows no autocast."""
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


class TokenLayer(nn.Module):
    """One head of attention over windows and an MLP, as narrow as tokens are.

    The values take the place of the residual branch: windows are wider than tokens.
    """

    def __init__(self, width: int, *, qkv_bias: bool, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * TOKEN_WIDTH, bias=qkv_bias)
        self.proj = nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH)
        self.drop = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(TOKEN_WIDTH)
        self.mlp = nn.Sequential(
            nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH),
            nn.GELU(),
            nn.Linear(TOKEN_WIDTH, TOKEN_WIDTH),
            nn.Dropout(dropout),
        )

    def forward(self, window_MTw: Float[Tensor, "M T w"]) -> Float[Tensor, "M T d"]:
        """Windows to tokens."""
        query, key, value = self.qkv(self.norm1(window_MTw)).chunk(3, -1)
        token_MTd = value + self.drop(self.proj(self.attend(query, key, value)))
        return token_MTd + self.mlp(self.norm2(token_MTd))


class PerformerLayer(TokenLayer):
    """A token layer with kernel attention."""

    def __init__(self, width: int) -> None:
        super().__init__(width, qkv_bias=True, dropout=DROPOUT)
        # Drawn from torch's generator when the model is built, so they are a function of the run's seed.
        directions = nn.init.orthogonal_(torch.empty(DIRECTIONS, TOKEN_WIDTH)) * math.sqrt(DIRECTIONS)
        self.register_buffer("directions", directions)

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(M, T, d) each."""
        return kernel_attention(query, key, value, self.directions)


class TransformerLayer(TokenLayer):
    """A token layer with plain attention, whose logits are scaled by the windows' width."""

    def __init__(self, width: int) -> None:
        super().__init__(width, qkv_bias=False, dropout=0.0)
        self.scale = width**-0.5

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(M, T, d) each; the head's axis is for torch's fused kernels."""
        return scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=self.scale)[
            :, 0
        ]


def soft_split(map_MCSS: Float[Tensor, "M C S S"], side: int, stride: int) -> Float[Tensor, "M T w"]:
    """Windows of side x side, one every `stride`, that overlap and reach beyond the border.

    Contiguous, as a norm would make them anyway: torch.compile expects of a norm the strides of what enters.
    """
    return (
        unfold(map_MCSS, side, stride=stride, padding=(side - stride + 1) // 2).transpose(1, 2).contiguous()
    )


class TokensToToken(nn.Module):
    """Crops to patches, in the place of a Vision Transformer's patch projection.

    Args:
        layer: PerformerLayer or TransformerLayer.
        img_size: side of the crops, in pixels.
        in_chans: their channels.
        embed_dim: width of a patch.
        unread: what timm gives to patch projections of its own.
    """

    def __init__(
        self, layer: type[TokenLayer], *, img_size: int, in_chans: int, embed_dim: int, **unread: Any
    ) -> None:
        super().__init__()
        self.patch_size = (PATCH_PX, PATCH_PX)
        self.grid_size = (img_size // PATCH_PX, img_size // PATCH_PX)
        self.num_patches = math.prod(self.grid_size)
        self.layers = nn.ModuleList([layer(in_chans * 7 * 7), layer(TOKEN_WIDTH * 3 * 3)])
        self.proj = nn.Linear(TOKEN_WIDTH * 3 * 3, embed_dim)
        self.grad_checkpointing = False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Called by timm's VisionTransformer with its own."""
        self.grad_checkpointing = enable

    def forward(self, image_M3SS: Float[Tensor, "M C S S"]) -> Float[Tensor, "M P D"]:
        """Three soft splits, a token layer after each of the first two."""
        window_MTw = soft_split(image_M3SS, 7, stride=4)
        for layer in self.layers:
            token_MTd = checkpoint(layer, window_MTw) if self.grad_checkpointing else layer(window_MTw)
            side = math.isqrt(token_MTd.shape[1])
            map_Mdss = token_MTd.transpose(1, 2).unflatten(2, (side, side))
            window_MTw = soft_split(map_Mdss, 3, stride=2)
        return self.proj(window_MTw)


class T2tVit(VisionTransformer):
    """timm's Vision Transformer behind TokensToToken, with fixed positions and no bias in qkv."""

    def __init__(self, *, layer: type[TokenLayer] = PerformerLayer, **options: Any) -> None:
        super().__init__(
            patch_size=PATCH_PX,
            embed_layer=partial(TokensToToken, layer),
            qkv_bias=False,
            norm_layer=partial(LayerNorm, eps=1e-5),
            pos_embed="none",
            **options,
        )
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        del self.pos_embed  # timm's None, whose name is taken
        self.register_buffer("pos_embed", sinusoids(1 + self.patch_embed.num_patches, self.embed_dim))


def sinusoids(positions: int, width: int) -> Float[Tensor, "1 T D"]:
    """Row t has sin(t / 10000^(2i / width)) at 2i, and the cosine beside it."""
    rates = 10_000 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * rates
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(1).float()[None]


def _register(name: str, **own: Any) -> None:
    """Make a model known to timm, which calls a function of its name."""

    def build(pretrained: bool = False, **options: Any) -> T2tVit:
        return build_model_with_cfg(T2tVit, name, pretrained, **own | options)

    build.__name__ = name
    register_model(build)


# 4.3, 21.5, 39.1 and 64.0 million trained parameters with timm's 1000 classes.
_register("t2t_vit_7", embed_dim=256, depth=7, num_heads=4, mlp_ratio=2.0)
_register("t2t_vit_14", embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0)
_register("t2t_vit_19", embed_dim=448, depth=19, num_heads=7, mlp_ratio=3.0)
_register("t2t_vit_24", embed_dim=512, depth=24, num_heads=8, mlp_ratio=3.0)
# T2T-ViT-14 with plain attention in its token layers.
_register("t2t_vit_t_14", layer=TransformerLayer, embed_dim=384, depth=14, num_heads=6, mlp_ratio=3.0)
