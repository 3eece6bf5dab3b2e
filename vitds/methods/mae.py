"""MAE: a small decoder paints the patches that the backbone did not see.

Source: He et al. 2022, arXiv:2111.06377, and the authors' code. The decoder's default size is that of SDMAE
(the repository Talented-Q/SDMAE), for small sets.

The patches that are left out are those of `backbone.patch_drop`: keyed by seed, step, chunk and crop, and
gone before the first block. Evaluation sees all patches. Features are not linear in what they know, so judge
them after fine-tuning.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from timm.layers import PatchEmbed, build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from vitds.batch import Targets
from vitds.config.tree import Settings
from vitds.errors import SettingsError
from vitds.heads.bytes import FLOAT, Activations
from vitds.methods import base
from vitds.models.facts import model_facts
from vitds.models.stochastic import kept_patches

HEAD_WIDTH = 32  # of the decoder's attention, as the authors' 16 heads of a width of 512
EPS = 1e-6


def patches_of(images: Float[Tensor, "M 3 S S"], patch_px: int) -> Float[Tensor, "M L p"]:
    """The pixels of each patch, patches row by row; p = 3 · patch_px² numbers."""
    side = images.shape[-1] // patch_px
    split = images.unflatten(3, (side, patch_px)).unflatten(2, (side, patch_px))
    # (M, 3, row, y, column, x) -> (M, row, column, y, x, 3)
    return split.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def reconstruction(
    painted_MLp: Float[Tensor, "M L p"], pixels_MLp: Float[Tensor, "M L p"], kept_Mk: Int[Tensor, "M k"]
) -> Float[Tensor, "M"]:
    """Mean squared error over the patches that were not kept, each patch less its mean, by its deviation."""
    variance, mean = torch.var_mean(pixels_MLp, 2, keepdim=True)
    error_ML = (painted_MLp - (pixels_MLp - mean) * (variance + EPS).rsqrt()).square().mean(2)
    # 0 for what was seen, so the sum is that of the others.
    hidden = pixels_MLp.shape[1] - kept_Mk.shape[1]
    return error_ML.scatter(1, kept_Mk, 0.0).sum(1) / hidden


class Decoder(nn.Module):
    """Tokens of the kept patches -> pixels of all patches, (M, L, p).

    Args:
        width_in: D of the backbone.
        width: of its own tokens, a multiple of HEAD_WIDTH.
        depth: how many blocks it has.
        side: patches along a side of a crop: L = side².
        prefix: class and register tokens, which come first.
        pixels: p, the numbers of a patch.
    """

    def __init__(self, *, width_in: int, width: int, depth: int, side: int, prefix: int, pixels: int) -> None:
        super().__init__()
        self.prefix = prefix
        self.embedding = nn.Linear(width_in, width)
        self.hidden = nn.Parameter(torch.zeros(1, 1, width))
        # Fixed, so it is in no checkpoint.
        place = build_sincos2d_pos_embed([side, side], width)
        self.register_buffer("place", place, persistent=False)
        self.blocks = nn.Sequential(*(Block(width, width // HEAD_WIDTH, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.painting = nn.Linear(width, pixels)
        nn.init.normal_(self.hidden, std=0.02)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):
                nn.init.xavier_uniform_(layer.weight)
                nn.init.zeros_(layer.bias)

    def forward(self, x_MtD: Float[Tensor, "M t D"], kept_Mk: Int[Tensor, "M k"]) -> Float[Tensor, "M L p"]:
        """See the class; `kept_Mk` are the places of the kept patches in the crop."""
        x_Mtw = self.embedding(x_MtD)
        prefix, seen = x_Mtw[:, : self.prefix], x_Mtw[:, self.prefix :]
        # One token for each place: the one that is learned where the backbone saw nothing.
        whole = self.hidden.to(seen.dtype).expand(len(seen), len(self.place), -1)
        whole = whole.scatter(1, kept_Mk[..., None].expand_as(seen), seen) + self.place
        x_MTw = self.blocks(torch.cat([prefix.to(whole.dtype), whole], 1))
        return self.painting(self.norm(x_MTw[:, self.prefix :]))


class Painting(nn.Module):
    """Backbone and decoder; forward returns this rank's part of the mean over all crops, (1,)."""

    def __init__(self, backbone: VisionTransformer, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.decoder = decoder

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "1"]:
        """See the class."""
        tokens_MtD = self.backbone(images)
        # Read after the pass: the places that patch drop kept in it.
        kept_Mk = self.backbone.patch_drop.order
        painted_MLp = self.decoder(tokens_MtD, kept_Mk)
        with torch.autocast(images.device.type, enabled=False):
            wide = torch.promote_types(painted_MLp.dtype, torch.float32)
            pixels_MLp = patches_of(images, self.backbone.patch_embed.patch_size[0])
            losses_M = reconstruction(painted_MLp.to(wide), pixels_MLp.to(wide), kept_Mk)
        return targets.part_of_mean(losses_M)[None]


def _check_plain(backbone: nn.Module, name: str) -> None:
    """Raises: SettingsError for a backbone other than timm's plain Vision Transformer."""
    is_plain = type(backbone) is VisionTransformer and type(backbone.patch_embed) is PatchEmbed
    if not is_plain or backbone.attn_pool is not None:
        raise SettingsError(
            f"backbone.name {name}: method mae hides patches from a plain Vision Transformer, which this is "
            "not; take one of timm's vit_ or deit_ models, such as deit_tiny_patch16_224"
        )


class Method(base.Method):
    """See the module."""

    terms = ("reconstruction",)

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        _check_plain(backbone, settings.backbone.name)
        own, facts = settings.mae, backbone.facts
        patch_px = backbone.patch_embed.patch_size[0]
        # Its tokens and not their mean; a backbone for evaluation is built anew, and pools.
        backbone.global_pool = ""
        with base.added_parts(settings):
            decoder = Decoder(
                width_in=facts.width,
                width=own.width,
                depth=own.depth,
                side=settings.views.crop_px // patch_px,
                prefix=backbone.num_prefix_tokens,
                pixels=3 * patch_px**2,
            )
        self.module = Painting(backbone, decoder)
        kept = kept_patches(facts.patches, settings.backbone.patch_drop)
        if kept == facts.patches:
            raise SettingsError(
                f"method mae paints patches that it does not see, and of the {kept} of a crop "
                f"backbone.patch_drop {settings.backbone.patch_drop:g} leaves none out; take larger crops or "
                "smaller patches"
            )
        self.about = f"decoder of {own.depth} x {own.width} on {kept} of {facts.patches} patches of each crop"

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """Of the decoder, whose tokens are those of all patches, and a class token."""
        own, W = settings.mae, settings.mae.width
        patches = model_facts(settings.backbone, settings.views.crop_px).patches
        crops = settings.views.count * settings.batch.micro_images
        tokens = crops * (patches + 1)
        # As plan/activations.py counts a block, its MLP four times as wide.
        block = 2 * W * FLOAT + 14 * W * product + 4 * (W // HEAD_WIDTH + 4)
        pixels = 3 * settings.views.crop_px**2 * crops
        kept = tokens * (own.depth * block + W * (FLOAT + product)) + pixels * FLOAT
        return {"activations of the decoder": Activations(kept, tokens * 6 * W * FLOAT)}
