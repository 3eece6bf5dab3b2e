"""Small networks between the backbone's features and what a loss compares.

They are thrown away after pretraining. Their batch norm takes its statistics over the real crops of one chunk
(or of one view of it), never over a rank's whole micro batch: so they are the same on any number of ranks and
micro steps. There are no running statistics, for a projector is never evaluated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

EPS = 1e-5  # torch's own of BatchNorm


class ChunkNorm(nn.Module):
    """Batch norm over the crops that belong together; padded ones take no part in the statistics.

    Args:
        width: D.
        form: `affine` has a learned scale and shift, `scale` a scale, `plain` neither.
    """

    def __init__(self, width: int, form: Literal["affine", "scale", "plain"]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width)) if form != "plain" else None
        self.bias = nn.Parameter(torch.zeros(width)) if form == "affine" else None

    def forward(self, x_MD: Float[Tensor, "M D"], is_real_gn: Bool[Tensor, "g n"]) -> Float[Tensor, "M D"]:
        """Each of the g groups of n crops that stand one after the other is normalised by itself; float32."""
        with torch.autocast(x_MD.device.type, enabled=False):
            # (M, D) -> (g, n, D), in float32 or wider: bfloat16 has too few bits for a variance.
            x_gnD = x_MD.to(torch.promote_types(x_MD.dtype, torch.float32)).unflatten(0, is_real_gn.shape)
            counts_gn1 = is_real_gn.to(x_gnD.dtype)[..., None]
            real_g11 = counts_gn1.sum(1, keepdim=True).clamp_min(
                1
            )  # a group of padding alone divides by no 0
            mean_g1D = (x_gnD * counts_gn1).sum(1, keepdim=True) / real_g11
            # Padded crops become 0: where there is nothing else in a group its variance is 0, and they would
            # grow by 1/sqrt(EPS) a layer, in fp16 to infinity, which a weight of 0 in the loss makes NaN.
            centred_gnD = (x_gnD - mean_g1D) * counts_gn1
            # Divided by the number, as torch's batch norm does in training, not by the number less one.
            variance_g1D = centred_gnD.square().sum(1, keepdim=True) / real_g11
            x_MD = (centred_gnD * (variance_g1D + EPS).rsqrt()).flatten(0, 1)
            if self.weight is not None:
                x_MD = x_MD * self.weight
            return x_MD if self.bias is None else x_MD + self.bias


class Projector(nn.Module):
    """Linear layers without bias, a ChunkNorm after each, ReLU between them.

    Args:
        widths: of the input, the hidden layers and the output.
        last: form of the norm after the last layer; None: it has no norm, and so a bias.
    """

    def __init__(self, widths: Sequence[int], *, last: Literal["scale", "plain"] | None) -> None:
        super().__init__()
        # (in, out) of each layer.
        pairs = list(zip(widths, widths[1:], strict=False))
        forms = ["affine"] * (len(pairs) - 1) + ([last] if last else [])
        # No bias in front of a norm, which would take it out again.
        self.layers = nn.ModuleList(
            nn.Linear(before, after, bias=number == len(forms))
            for number, (before, after) in enumerate(pairs)
        )
        self.norms = nn.ModuleList(
            ChunkNorm(after, form) for (_, after), form in zip(pairs, forms, strict=False)
        )

    def forward(self, x_MD: Float[Tensor, "M D"], is_real_gn: Bool[Tensor, "g n"]) -> Float[Tensor, "M d"]:
        """What is compared, float32 where a norm ends it; groups as in ChunkNorm."""
        for number, layer in enumerate(self.layers):
            # Before each layer but the first: between layers, and never after the last one.
            if number:
                x_MD = nn.functional.relu(x_MD)
            # A norm gives float32; where autocast is off, 16-bit weights take their own kind alone.
            x_MD = layer(x_MD if torch.is_autocast_enabled(x_MD.device.type) else x_MD.to(layer.weight.dtype))
            if number < len(self.norms):
                x_MD = self.norms[number](x_MD, is_real_gn)
        return x_MD
