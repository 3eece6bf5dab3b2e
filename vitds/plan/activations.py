"""What a backbone keeps for its backward pass, by arithmetic: its layers in stages that are alike.

Counted is what torch's operations save, as a plain run saves it. Of attention these are queries, keys, values
and the output; its logits are not kept: torch's fused attention keeps one log-sum-exp a head.
tests/plan/test_activations.py counts what torch really saves.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kept:
    """Numbers of one crop, by what decides their bytes.

    Attributes:
        residual: in the dtype of what runs beside products.
        compute: in the dtype of products.
        casts: copies in that dtype that only autocast makes.
        float32: in float32 whatever the precision.
    """

    residual: int = 0
    compute: int = 0
    casts: int = 0
    float32: int = 0

    def bytes(self, *, compute: int, residual: int) -> int:
        """Bytes of one crop, with so many for a number."""
        casts = self.casts * compute if compute < residual else 0
        return self.residual * residual + self.compute * compute + casts + 4 * self.float32


@dataclass(frozen=True)
class Stage:
    """Layers of a backbone that are alike.

    Attributes:
        depth: how many there are.
        layer: what each keeps.
        enters: what enters each, which is all that activation checkpointing keeps of it.
        ends: what is kept before and behind the layers.
        passing: what the backward pass of a layer needs beside what is kept. Only the last stage's counts:
            the others come when the last ones have given more back than they need.
    """

    depth: int
    layer: Kept
    enters: Kept
    ends: Kept
    passing: Kept = Kept()


def saved_bytes(
    stages: tuple[Stage, ...], crops: int, *, compute: int, residual: int, checkpointing: bool
) -> int:
    """Bytes kept at the end of the forward pass, without the crops; with checkpointing, at the worst moment.

    Args:
        stages: the backbone's, in their order.
        crops: that pass through it.
        compute: bytes of a number in matrix products: 4 in fp32, else 2.
        residual: bytes of what runs beside them: 2 where weights have 2, else 4.
        checkpointing: only the layers' inputs are kept, and one layer's rest while its backward pass runs.
    """
    size = {"compute": compute, "residual": residual}
    held = [stage.enters if checkpointing else stage.layer for stage in stages]
    a_crop = sum(
        stage.depth * kept.bytes(**size) + stage.ends.bytes(**size)
        for stage, kept in zip(stages, held, strict=True)
    )
    if checkpointing:
        a_crop += max(stage.layer.bytes(**size) for stage in stages)
    return crops * a_crop


def passing_bytes(stages: tuple[Stage, ...], crops: int, *, compute: int, residual: int) -> int:
    """What the backward pass needs beside what was saved; the arguments are those of `saved_bytes`."""
    return crops * stages[-1].passing.bytes(compute=compute, residual=residual)


def vit_stage(
    *,
    width: int,
    depth: int,
    heads: int,
    hidden: int,
    tokens: int,
    before_drop: int,
    pools_first: bool,
    scales_layers: bool,
) -> Stage:
    """The blocks of a plain Vision Transformer.

    Args:
        width: W.
        depth: how many blocks there are.
        heads: of attention.
        hidden: F, the MLP's width.
        tokens: of one crop, after patch drop, with class and register tokens.
        before_drop: tokens before patch drop, which keeps them; 0 without.
        pools_first: whether the last norm comes after pooling.
        scales_layers: whether there is LayerScale, which keeps what each branch adds.
    """
    W, F = width, hidden
    return Stage(
        depth,
        layer=Kept(
            # Inputs of both norms, each with a mean and a deviation.
            residual=tokens * 2 * (W + 2),
            # Input of qkv, q, k, v, attention's output, the MLP's input; its middle before and after GELU.
            compute=tokens * (6 * W + 2 * F + (2 * W if scales_layers else 0)),
            float32=tokens * heads,
        ),
        enters=Kept(residual=tokens * W),
        # What patch drop took from, and the last norm.
        ends=Kept(residual=before_drop * W + (1 if pools_first else tokens) * (W + 2)),
        # Gradients of one MLP and of the residual stream.
        passing=Kept(compute=tokens * F, residual=tokens * 2 * W),
    )


def token_stage(*, window: int, tokens: int, width: int, directions: int, projected: int) -> Stage:
    """A token layer of T2T-ViT between two soft splits.

    Args:
        window: w, the width of what the first split gives.
        tokens: T, how many windows there are.
        width: d, of a token.
        directions: m, of kernel attention; 0 with plain attention, where there is no dropout either.
        projected: numbers of the windows that the next split gives to a projection; 0 if to a layer.
    """
    w, d, m = window, width, directions
    # The first norm's input and output; tokens into the second norm, the MLP's three products, GELU, dropout.
    compute = w + 5 * d
    if m:
        # Two factors of dropout, which a CPU keeps as numbers; query, key, value, the features of two of
        # them, the sum of weighted values.
        compute += 2 * d
        float32 = 4 * d + 2 * m + 1
    else:
        compute += 3 * d
        float32 = 1
    return Stage(
        1,
        layer=Kept(residual=tokens * (w + 4), compute=tokens * compute, float32=tokens * float32),
        enters=Kept(residual=tokens * w),
        ends=Kept(compute=projected),
    )


def pyramid_stage(
    *, width: int, depth: int, heads: int, hidden: int, tokens: int, reduced: int, enters: int
) -> Stage:
    """A stage of PVT v2.

    Args:
        width: W.
        depth: how many blocks there are.
        heads: of attention.
        hidden: F, the MLP's width.
        tokens: of one crop.
        reduced: tokens whose keys and values are attended to, after a convolution; 0 without one.
        enters: numbers of the stage before that enter this one's patch embedding; 0 of pixels.
    """
    W, F = width, hidden
    # Input of queries, queries, the attention's output, the MLP's input; its middle before and after the
    # convolution, and after GELU.
    compute = tokens * (4 * W + 3 * F)
    # Keys and values, and with a convolution its output and their input.
    compute += reduced * 4 * W if reduced else tokens * 2 * W
    return Stage(
        depth,
        layer=Kept(
            residual=tokens * 2 * (W + 2) + reduced * 2,
            compute=compute,
            casts=tokens * W,  # the first norm's output, once for queries and once for keys and values
            float32=tokens * heads,
        ),
        enters=Kept(residual=tokens * W),
        # The norms behind patch embedding and blocks.
        ends=Kept(compute=enters, residual=tokens * 2 * (W + 2)),
        passing=Kept(compute=tokens * F, residual=tokens * 2 * W),
    )
