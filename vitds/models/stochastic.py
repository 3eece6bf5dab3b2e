"""Drop path and patch drop whose choices are a function of keys; timm's ask torch's generator.

The modules read a buffer that `fill` writes before each forward pass. So the choices do not depend on ranks
or accumulation, a resume repeats them, and activation checkpointing sees the same mask twice.
"""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

from vitds import rng
from vitds.batch import Masks
from vitds.errors import SettingsError
from vitds.rng import Purpose


class KeyedDropPath(nn.Module):
    """Stochastic depth: a crop's residual branch is left out at a rate, else scaled by 1 / (1 - rate).

    A block that calls it twice leaves both its branches out together; timm would draw for each.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        # Not persistent: `fill` makes it anew, so no checkpoint needs it.
        self.register_buffer("factor", torch.ones(0), persistent=False)

    def forward(self, x: Float[Tensor, "R ..."]) -> Float[Tensor, "R ..."]:
        """x times its crop's factor in training, x itself in evaluation; R = M, or a multiple."""
        if not self.training:
            return x
        factor = self.factor
        if len(x) != len(
            factor
        ):  # windows or patches stand in the first axis, those of a crop one after the other
            factor = factor.repeat_interleave(len(x) // len(factor))
        # (R,) -> (R, 1, ..., 1): one number for all of a crop.
        return x * factor.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


class KeyedPatchDrop(nn.Module):
    """Keeps a share 1 - rate of each crop's patches in training (arXiv:2208.07220).

    Class and register tokens always stay.
    """

    def __init__(self, rate: float, prefix_tokens: int) -> None:
        super().__init__()
        self.rate = rate
        self.prefix_tokens = prefix_tokens
        self.register_buffer("order", torch.zeros(0, 0, dtype=torch.int64), persistent=False)

    def forward(self, x: Float[Tensor, "M T D"]) -> Float[Tensor, "M t D"]:
        """The prefix tokens and the kept patches, in the order of the image."""
        if not self.training:
            return x
        # (M, prefix + patches, D), cut in two.
        prefix, patches = x[:, : self.prefix_tokens], x[:, self.prefix_tokens :]
        # (M, kept) -> (M, kept, D): gather wants an index for each number.
        kept = self.order[:, :, None].expand(-1, -1, x.shape[2])
        return torch.cat([prefix, patches.gather(1, kept)], 1)


def kept_patches(patches: int, rate: float) -> int:
    """How many patches of a crop stay at a drop rate: timm's count."""
    return max(1, int(patches * (1 - rate)))


def replace_stochastic(backbone: nn.Module) -> None:
    """Put keyed modules in the place of timm's DropPath and PatchDropout, in place.

    Raises: SettingsError for a model whose patch drop hands indices on (rotary embeddings): ours does not.
    """
    for module in list(backbone.modules()):
        # By setattr in the parent: a module cannot replace itself.
        for name, child in module.named_children():
            if isinstance(child, DropPath):
                # A rate of 0, as in a ViT's first block, needs no mask.
                setattr(module, name, KeyedDropPath(child.drop_prob) if child.drop_prob else nn.Identity())
            elif isinstance(child, PatchDropout):
                setattr(module, name, KeyedPatchDrop(child.prob, child.num_prefix_tokens))
            elif isinstance(child, PatchDropoutWithIndices):
                raise SettingsError("backbone.patch_drop: this model's position embedding needs all patches")


def without_stochastic(module: nn.Module) -> nn.Module:
    """Take keyed drop path and patch drop out of a module, in place: a teacher sees the whole network."""
    for parent in list(module.modules()):
        for name, child in parent.named_children():
            if isinstance(child, KeyedDropPath | KeyedPatchDrop):
                setattr(parent, name, nn.Identity())
    return module


class StochasticDraws:
    """Fills the keyed modules of a backbone before a forward pass.

    Args:
        backbone: after `replace_stochastic`.
        seed: of the run.
        rows_per_chunk: V·K crops.
        patches: of a crop, for patch drop.
    """

    def __init__(self, backbone: nn.Module, *, seed: int, rows_per_chunk: int, patches: int) -> None:
        self.seed = seed
        self.rows_per_chunk = rows_per_chunk
        self.patches = patches
        # In the order of the model's modules, whose number is the layer's in the key.
        self.drop_paths = [module for module in backbone.modules() if isinstance(module, KeyedDropPath)]
        self.patch_drops = [module for module in backbone.modules() if isinstance(module, KeyedPatchDrop)]

    def draw(self, step: int, first_chunk: int, chunks: int) -> Masks:
        """The masks of chunks first_chunk .. first_chunk + chunks - 1 of a step; any thread may ask.

        Keys are (seed, step, chunk, layer, row) and (seed, step, chunk, row, patch): nothing of ranks or
        micro batches.
        """
        # (layers, 1, 1) against (chunks, 1) and (rows,): each layer's draws of each crop, all at once.
        layer = np.arange(len(self.drop_paths))[:, None, None]
        chunk = np.arange(first_chunk, first_chunk + chunks)[:, None]
        row = np.arange(self.rows_per_chunk)
        share = rng.uniform(Purpose.DROP_PATH, self.seed, step, chunk, layer, row)
        # Kept crops are scaled by 1 / (1 - rate), so that the mean of a branch stays.
        factors = tuple(
            torch.from_numpy(((drawn >= module.rate) / (1 - module.rate)).astype(np.float32).reshape(-1))
            for drawn, module in zip(share, self.drop_paths, strict=True)
        )
        return Masks(factors, tuple(self._kept(module, step, chunk, row) for module in self.patch_drops))

    def _kept(
        self, module: KeyedPatchDrop, step: int, chunk: NDArray[np.int64], row: NDArray[np.int64]
    ) -> Int[Tensor, "M kept"]:
        # (chunks, rows, patches)
        words = rng.words(
            Purpose.PATCH_DROP, self.seed, step, chunk[:, :, None], row[:, None], np.arange(self.patches)
        )
        keep = kept_patches(self.patches, module.rate)
        # The patches with the smallest words stay, in the order in which they lie in the image.
        return torch.from_numpy(np.sort(np.argsort(words, axis=-1)[..., :keep], axis=-1).reshape(-1, keep))

    def write(self, masks: Masks) -> None:
        """Put the masks where the next forward pass reads them."""
        for module, factor in zip(self.drop_paths, masks.factors, strict=True):
            _write(module, "factor", factor)
        for module, kept in zip(self.patch_drops, masks.kept, strict=True):
            _write(module, "order", kept)

    def fill(self, step: int, first_chunk: int, chunks: int) -> None:
        """Draw and write."""
        self.write(self.draw(step, first_chunk, chunks))


def _write(module: nn.Module, name: str, values: Tensor) -> None:
    """Copy into the module's buffer; only a new shape makes a new one: a compiled model keeps addresses."""
    buffer = getattr(module, name)
    if buffer.shape != values.shape:
        # Assigned to a registered name it remains a buffer, and moves with the module.
        buffer = torch.empty(values.shape, dtype=buffer.dtype, device=buffer.device)
        setattr(module, name, buffer)
    buffer.copy_(values)
