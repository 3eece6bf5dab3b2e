"""What a plain Vision Transformer keeps for its backward pass, by arithmetic.

Numbers a token and block: the inputs of both norms (W each, in the residual stream's dtype); the input of qkv, q, k, v, the attention's
output, the input of the MLP (W each) and the MLP's middle twice (F, before and after GELU), in the products' dtype. The logits of
attention are not kept: torch's fused attention keeps one log-sum-exp a head. tests/plan/test_vit.py counts what torch really saves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Vit:
    """Sizes of timm's VisionTransformer.

    Attributes:
        tokens: of one crop, after patch drop, with class and register tokens. hidden: F, the MLP's width.
        before_drop: tokens before patch drop, which keeps them; 0 without.
        pools_first: the last norm comes after pooling. scales_layers: with LayerScale.
    """

    width: int
    depth: int
    heads: int
    hidden: int
    tokens: int
    before_drop: int
    pools_first: bool
    scales_layers: bool


def saved_bytes(vit: Vit, rows: int, *, compute: int, residual: int, checkpointing: bool) -> int:
    """Bytes kept at the end of the forward pass of `rows` crops, the crops themselves apart; with checkpointing, of the worst moment.

    Args:
        compute: bytes a number in matrix products: 4 in fp32, else 2. residual: of what runs beside them: 2 where weights have 2, else 4.
        checkpointing: only the blocks' inputs are kept, and one block's rest while its backward pass runs.
    """
    W, F = vit.width, vit.hidden
    branches = 2 * W * compute if vit.scales_layers else 0
    token = 2 * W * residual + (6 * W + 2 * F) * compute + branches + 4 * vit.heads + 4 * residual
    ends = vit.before_drop * W * residual + (1 if vit.pools_first else vit.tokens) * (W + 2) * residual
    if checkpointing:
        return rows * (vit.tokens * (vit.depth * W * residual + token) + ends)
    return rows * (vit.tokens * vit.depth * token + ends)


def backward_bytes(vit: Vit, rows: int, *, compute: int, residual: int) -> int:
    """What the backward pass needs beside what was saved: the gradients of a token's MLP and of the residual stream."""
    return rows * vit.tokens * (vit.hidden * compute + 2 * vit.width * residual)
