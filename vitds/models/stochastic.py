"""Drop path and patch drop whose choices are a function of keys, in place of timm's, which ask torch's generator.

The modules read a buffer that `fill` writes before each forward pass. So the choices do not depend on ranks or accumulation, a resume
repeats them, and activation checkpointing sees the same mask twice.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from timm.layers import DropPath, PatchDropout
from torch import Tensor, nn

from vitds import rng
from vitds.errors import SettingsError
from vitds.rng import Purpose


class KeyedDropPath(nn.Module):
    """Stochastic depth: a row's residual branch is left out with probability `rate`, else scaled by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.register_buffer("factor", torch.ones(0), persistent=False)

    def forward(self, x: Float[Tensor, "M ..."]) -> Float[Tensor, "M ..."]:
        """x times its row's factor in training, x itself in evaluation."""
        if not self.training:
            return x
        return x * self.factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class KeyedPatchDrop(nn.Module):
    """Keeps a share 1 - rate of each row's patches in training; class and register tokens always stay (arXiv:2208.07220)."""

    def __init__(self, rate: float, prefix_tokens: int) -> None:
        super().__init__()
        self.rate, self.prefix_tokens = rate, prefix_tokens
        self.register_buffer("order", torch.zeros(0, 0, dtype=torch.int64), persistent=False)

    def forward(self, x: Float[Tensor, "M T D"]) -> Float[Tensor, "M t D"]:
        """The prefix tokens and the kept patches, in the order of the image."""
        if not self.training:
            return x
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        kept = self.order[:, :, None].expand(-1, -1, x.shape[2])
        return torch.cat([prefix, patches.gather(1, kept)], 1)


def replace_stochastic(backbone: nn.Module) -> None:
    """Put keyed modules in the place of timm's DropPath and PatchDropout, in place.

    Raises: SettingsError for a model whose patch drop hands indices on (rotary embeddings): ours does not.
    """
    for module in list(backbone.modules()):
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                setattr(module, name, KeyedDropPath(child.drop_prob) if child.drop_prob else nn.Identity())
            elif type(child) is PatchDropout:
                setattr(module, name, KeyedPatchDrop(child.prob, child.num_prefix_tokens))
            elif type(child).__name__ == "PatchDropoutWithIndices":
                raise SettingsError(
                    "backbone.patch_drop: this model's position embedding needs all patches; set backbone.patch_drop=0"
                )


class StochasticDraws:
    """Fills the keyed modules of a backbone before a forward pass.

    Args:
        backbone: after `replace_stochastic`. rows_per_chunk: V·K. patches: patches of an image, for patch drop.
    """

    def __init__(self, backbone: nn.Module, *, seed: int, rows_per_chunk: int, patches: int) -> None:
        self.seed, self.rows_per_chunk, self.patches = seed, rows_per_chunk, patches
        self.drop_paths = [module for module in backbone.modules() if isinstance(module, KeyedDropPath)]
        self.patch_drops = [module for module in backbone.modules() if isinstance(module, KeyedPatchDrop)]

    def fill(self, step: int, first_chunk: int, chunks: int) -> None:
        """Write the masks of chunks first_chunk .. first_chunk + chunks - 1 of a step; keys (seed, step, chunk, layer, row)."""
        chunk = np.arange(first_chunk, first_chunk + chunks)[:, None]
        row = np.arange(self.rows_per_chunk)
        for layer, module in enumerate(self.drop_paths):
            kept = rng.uniform(Purpose.DROP_PATH, self.seed, step, chunk, layer, row) >= module.rate
            _write(module, "factor", (kept / (1 - module.rate)).astype(np.float32).reshape(-1))
        for module in self.patch_drops:
            words = rng.words(
                Purpose.PATCH_DROP, self.seed, step, chunk[:, :, None], row[:, None], np.arange(self.patches)
            )
            keep = max(1, int(self.patches * (1 - module.rate)))
            order = np.sort(np.argsort(words, axis=-1)[..., :keep], axis=-1)
            _write(module, "order", order.reshape(-1, keep))


def _write(module: nn.Module, name: str, values: np.ndarray) -> None:
    """Copy into the module's buffer, which is made anew only when the shape changes: a compiled model keeps its addresses."""
    buffer = getattr(module, name)
    if buffer.shape != values.shape:
        buffer = torch.empty(values.shape, dtype=buffer.dtype, device=buffer.device)
        setattr(module, name, buffer)
    buffer.copy_(torch.from_numpy(values))
