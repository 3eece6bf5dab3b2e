"""What a plain Vision Transformer keeps for its backward pass, by arithmetic.

Numbers a token and block:
- in the residual stream's dtype, the inputs of both norms (W each);
- in the products' dtype, the input of qkv, q, k, v, the attention's output and the input of the MLP (W
  each), and the MLP's middle twice (F, before and after GELU).

The logits of attention are not kept: torch's fused attention keeps one log-sum-exp a head.
tests/plan/test_vit.py counts what torch really saves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vit:
    """Sizes of timm's VisionTransformer.

    Attributes:
        width: W.
        depth: how many blocks there are.
        heads: of attention.
        hidden: F, the MLP's width.
        tokens: of one crop, after patch drop, with class and register tokens.
        before_drop: tokens before patch drop, which keeps them; 0 without.
        pools_first: whether the last norm comes after pooling.
        scales_layers: whether there is LayerScale.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    tokens: int
    before_drop: int
    pools_first: bool
    scales_layers: bool


def saved_bytes(vit: Vit, crops: int, *, compute: int, residual: int, checkpointing: bool) -> int:
    """Bytes kept at the end of the forward pass, without the crops; with checkpointing, at the worst moment.

    Args:
        vit: the model's sizes.
        crops: that pass through it.
        compute: bytes of a number in matrix products: 4 in fp32, else 2.
        residual: bytes of what runs beside them: 2 where weights have 2, else 4.
        checkpointing: only the blocks' inputs are kept, and one block's rest while its backward pass runs.
    """
    W = vit.width
    F = vit.hidden
    # LayerScale keeps what each branch adds, which it multiplies.
    branches = 2 * W * compute if vit.scales_layers else 0
    # Beside them a log-sum-exp for each head, and mean and deviation of both norms.
    token = 2 * W * residual + (6 * W + 2 * F) * compute + branches + 4 * vit.heads + 4 * residual
    # Outside the blocks: what patch drop took from, and the last norm with its mean and deviation.
    ends = vit.before_drop * W * residual + (1 if vit.pools_first else vit.tokens) * (W + 2) * residual
    # Inputs of all blocks, and everything of the one whose backward pass runs.
    if checkpointing:
        return crops * (vit.tokens * (vit.depth * W * residual + token) + ends)
    return crops * (vit.tokens * vit.depth * token + ends)


def backward_bytes(vit: Vit, crops: int, *, compute: int, residual: int) -> int:
    """What the backward pass needs beside what was saved: gradients of one MLP and of the residual stream.

    The arguments are those of `saved_bytes`.
    """
    return crops * vit.tokens * (vit.hidden * compute + 2 * vit.width * residual)
