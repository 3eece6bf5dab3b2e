"""Log-sum-exp over the rows of a linear layer without its logits: the one operation of a head on all n rows.

The rows are taken tile by tile.
- Forward: a tile's logits and its own log-sum-exp.
- Backward: the logits again, their softmax within the tile, and two products. The factor exp(lse_tile - lse)
  makes it a softmax over all rows. It is put on the (M, D) sides, which are smaller than (M, t).

So M·n numbers pass through the cache and never lie in memory. Where all of them fit `keep_bytes` the
softmaxes are kept instead, and the first product is not repeated. On a CPU the softmax is
vitds/kernels/softmax.c; on a GPU in_place.py goes another way to the same terms. What was tried and measured
is in docs/instance_head.md.

Letters of the shapes: M crops of D numbers, n rows, t rows of a tile, T tiles, K picked rows a crop.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitds.errors import ShapeError
from vitds.heads.in_place import InPlaceRowTerms
from vitds.heads.tiles import (
    KEEP_BYTES,
    SHORTEST_ROW,
    Tiling,
    choose_tiling,
    each_tile,
    gradient_memory,
    hand_over,
    put_rows,
    refuse_second_derivative,
    tile_logits,
    tile_softmax,
)


def linear_logsumexp(
    features: Float[Tensor, "M D"],
    weight: Float[Tensor, "n _"],
    bias: Float[Tensor, "_"] | None = None,
    *,
    tile_rows: int | Literal["auto"] = "auto",
    keep_bytes: int = KEEP_BYTES,
) -> Float[Tensor, "M"]:
    """Log-sum-exp over the rows of `features @ weight.T + bias`, without holding the (M, n) logits.

    Gradients have the inputs' dtypes. Under autocast matrices are multiplied in its dtype; with bfloat16,
    logits are rounded to 8 bits, as torch's own linear layer does. What is not finite gives an output that is
    not finite, not an error.

    Args:
        features: of M crops.
        weight: (n, D).
        bias: (n,).
        tile_rows: changes speed and memory, the result only by rounding. Extra memory is
            O(M·(tile_rows + n / tile_rows)).
        keep_bytes: where M·n numbers fit, they are kept for the backward pass, which then needs two products
            instead of three.
    Returns: natural log, in max(float32, the inputs' dtype), in which the sums are kept too.
    Raises: ShapeError if the widths differ or n is 0. ValueError if tile_rows < 1. A second backward pass is
        torch's RuntimeError, a gradient of the gradient NotImplementedError.
    Source: online softmax, arXiv:1805.02867; recomputing in the backward pass, arXiv:2411.09009.
    """
    check_widths(features, weight, bias)
    tiling = choose_tiling(features, weight, tile_rows=tile_rows, keep_bytes=keep_bytes)
    return _function(tiling).apply(features, weight, bias, None, False, tiling)[0]


def row_terms(
    features: Float[Tensor, "M D"],
    weight: Float[Tensor, "n D"],
    bias: Float[Tensor, "n"] | None,
    picks: Int[Tensor, "M K"],
    *,
    sums_rows: bool,
    is_cosine: bool,
    gradient: Tensor | None = None,
    keep_bytes: int = KEEP_BYTES,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M K"], Float[Tensor, "M"] | None]:
    """What a smoothed, mixed cross-entropy needs of n rows.

    Args:
        features: of M crops; used as they are, in the cosine form too.
        weight: the rows.
        bias: of the rows.
        picks: rows 0..n-1 whose logits are wanted.
        sums_rows: whether the sum of all logits is wanted.
        is_cosine: the rows are brought to length one.
        gradient: (n, D) memory into which the backward pass writes the weight's gradient, making it
            `weight.grad`, or adds it where `weight.grad` is set already. Only for an owner of its rows:
            autograd and its hooks do not see it. None: a gradient as usual.
        keep_bytes: as in `linear_logsumexp`.
    Returns: of each crop the log-sum-exp, the logits of its picks, and the sum of all logits or None; float32
        or wider. Logits are rounded as the product's dtype rounds them, so that none exceeds the log-sum-exp.
    """
    tiling = choose_tiling(features, weight, is_cosine=is_cosine, gradient=gradient, keep_bytes=keep_bytes)
    lse_M, picked_MKD, total = _function(tiling).apply(features, weight, bias, picks, sums_rows, tiling)
    with torch.autocast(features.device.type, enabled=False):
        # Autocast is off here: it would make these sums in 16 bits.
        x_MD = features.to(lse_M.dtype)
        # The picks come as they are stored; their gradient goes through this normalisation by autograd.
        if is_cosine:
            picked_MKD = torch.nn.functional.normalize(picked_MKD.to(lse_M.dtype), dim=2, eps=SHORTEST_ROW)
        # Both factors are rounded as in the tiles, and only then multiplied in float32.
        rounded = (part.to(tiling.product).to(lse_M.dtype) for part in (features, picked_MKD))
        # (M, D) · (M, K, D) -> (M, K). Autograd takes the gradient of the picks from here to the picked rows.
        logit_MK = torch.einsum("md,mkd->mk", *rounded)
        logit_MK = logit_MK if bias is None else logit_MK + bias[picks]
        total_M = total
        if sums_rows and tiling.softmax != "Triton":
            # A crop's sum of logits is its feature times the sum of all rows: (M, D) @ (D,) -> (M,).
            total_M = x_MD @ total if bias is None else x_MD @ total + bias.sum()
        return lse_M, logit_MK.to(tiling.product).to(lse_M.dtype), total_M


@torch.no_grad()
def highest_logits(
    features: Float[Tensor, "M D"],
    weight: Float[Tensor, "n D"],
    bias: Float[Tensor, "n"] | None,
    picks: Int[Tensor, "M"],
    *,
    is_cosine: bool,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Each crop's highest logit over all n rows, and the logit of its own pick.

    Both come out of the same products, so that they are equal bit by bit where the pick is the highest.

    Args:
        features: of M crops.
        weight: the rows.
        bias: of the rows.
        picks: a row a crop; where it is not one of 0..n-1, its logit is -inf.
        is_cosine: the rows are brought to length one.
    """
    tiling = choose_tiling(features, weight, is_cosine=is_cosine)
    # -inf stays where the pick is another rank's row, and loses the maximum over ranks.
    highest_M, own_M = (torch.full_like(features[:, 0], -math.inf) for _ in range(2))
    # Tile by tile, so no more than (M, t) logits are there at once.
    for _, span, rows_tD, _ in each_tile(weight, tiling):
        logit_Mt = tile_logits(features, rows_tD, bias, span, features.new_empty(0))
        highest_M = torch.maximum(highest_M, logit_Mt.amax(1))
        is_here_M = (picks >= span.start) & (picks < span.stop)
        own_M[is_here_M] = logit_Mt[is_here_M, picks[is_here_M] - span.start]
    return highest_M, own_M


def check_widths(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raises: ShapeError if features and rows differ in width, there are no rows, or not as many biases."""
    width, rows = features.shape[1], weight.shape[0]
    if width != weight.shape[1]:
        raise ShapeError(
            f"features are {width} wide, the head's rows {weight.shape[1]}; "
            "was it built for another backbone?"
        )
    if rows == 0:
        raise ShapeError("the head has no rows: a log-sum-exp needs one at least")
    if bias is not None and bias.shape[0] != rows:
        raise ShapeError(f"the head has {rows} rows and {bias.shape[0]} biases")


def _function(tiling: Tiling) -> type[torch.autograd.Function]:
    return InPlaceRowTerms if tiling.softmax == "Triton" else RowTerms


class RowTerms(torch.autograd.Function):
    """(features, weight, bias, picks, sums_rows, tiling) -> lse (M,), weight[picks] (M, K, D), row sum (D,).

    One function, so that the weight's gradient is one piece of memory: the sparse part of the picks and the
    constant part of the sum are added to it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight_nD: Tensor,
        bias_n: Tensor | None,
        picks_MK: Tensor | None,
        sums_rows: bool,
        tiling: Tiling,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        # bfloat16 has 8 bits, too few to add up thousands of numbers; float64 stays float64.
        sums = torch.promote_types(tiling.product, torch.float32)
        total_D = x_MD.new_zeros(x_MD.shape[1], dtype=sums) if sums_rows else None
        tiles = -(-len(weight_nD) // tiling.tile_rows)
        # Two numbers a tile and crop, (T, M): the highest logit, and log(sum(exp(logit - highest))).
        highest_TM, above_TM = (x_MD.new_empty(tiles, len(x_MD), dtype=sums) for _ in range(2))
        kept = []
        with torch.autocast(x_MD.device.type, enabled=False):
            # Dtypes are cast by hand in here; autocast would cast once more.
            x = x_MD.to(tiling.product)
            # One piece of memory for the logits of all tiles in turn, unless each softmax is kept.
            scratch = x.new_empty(0 if tiling.keeps else len(x) * tiling.tile_rows)
            for tile, span, rows_tD, _ in each_tile(weight_nD, tiling):
                # Rows as they are multiplied, in the cosine form of length one: the mean logit is of those.
                if total_D is not None:
                    total_D += rows_tD.sum(0, dtype=sums)
                # (M, D) @ (D, t) -> (M, t). Where it is kept, its softmax then takes its place.
                logit_Mt = tile_logits(x, rows_tD, bias_n, span, scratch)
                parts = (highest_TM[tile], above_TM[tile])
                tile_softmax(logit_Mt, *parts, tiling.softmax, finds=True, stores=tiling.keeps)
                if tiling.keeps:
                    kept.append(logit_Mt)
        # Log-sum-exps are kept as differences from the highest logit: small numbers, in which rounding does
        # not grow with the logits.
        highest_M = highest_TM.amax(0)
        # (T, M) -> (M,): the tiles' log-sum-exps joined to one over all rows.
        above_M = (highest_TM - highest_M + above_TM).logsumexp(0)
        ctx.tiling = tiling
        ctx.save_for_backward(
            x_MD, weight_nD, bias_n, picks_MK, highest_TM, above_TM, highest_M, above_M, *kept
        )
        # An output that nobody used then has the gradient None, not a tensor of zeros.
        ctx.set_materialize_grads(False)
        # Picked rows leave as vectors (M, K, D): row_terms makes their logits, and autograd their gradient.
        return highest_M + above_M, None if picks_MK is None else weight_nD[picks_MK], total_D

    @staticmethod
    def backward(
        ctx: Any, g_lse_M: Tensor | None, g_picked_MKD: Tensor | None, g_total_D: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x_MD, weight_nD, bias_n, picks_MK, highest_TM, above_TM, highest_M, above_M, *kept = ctx.saved_tensors
        tiling = ctx.tiling
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # What turns a softmax within a tile into a share of the gradient.
        # (T, M): exp(lse_tile - lse), times the gradient that arrives at the crop's log-sum-exp.
        share_TM = (highest_TM - highest_M + above_TM - above_M).exp() * (0.0 if g_lse_M is None else g_lse_M)
        into_nD, adds = gradient_memory(weight_nD, tiling) if needs_weight else (None, False)
        g_bias_n = torch.empty_like(bias_n) if needs_bias else None
        # d lse / d x = sum over rows of p · w: each tile adds its part.
        g_x_MD = torch.zeros_like(x_MD, dtype=share_TM.dtype)
        with torch.autocast(x_MD.device.type, enabled=False):
            x = x_MD.to(tiling.product)
            scratch = x.new_empty(0 if kept else len(x) * tiling.tile_rows)
            shared_MD = torch.empty_like(x)
            for tile, span, rows_tD, length_t1 in each_tile(weight_nD, tiling):
                # p: the softmax within the tile, kept or made anew.
                if kept:
                    p_Mt = kept[tile]
                else:
                    p_Mt = tile_logits(x, rows_tD, bias_n, span, scratch)
                    parts = (highest_TM[tile], above_TM[tile])
                    tile_softmax(p_Mt, *parts, tiling.softmax, finds=False, stores=True)
                share_M = share_TM[tile]
                # (M, t) @ (t, D) -> (M, D); only then the share, for (M, D) is smaller than (M, t).
                g_x_MD.addcmul_(p_Mt @ rows_tD, share_M[:, None])
                if needs_weight:
                    # d lse / d w = p · x: (t, M) @ (M, D) -> (t, D), the share multiplied into x beforehand.
                    torch.mul(x_MD, share_M[:, None], out=shared_MD)
                    put_rows(into_nD[span], adds, p_Mt.T, shared_MD, g_total_D, rows_tD, length_t1)
                if needs_bias:
                    # (M,) @ (M, t) -> (t,)
                    g_bias_n[span] = share_M.to(tiling.product) @ p_Mt
        if needs_weight:
            into_nD = hand_over(into_nD, weight_nD, picks_MK, g_picked_MKD, tiling)
        # One gradient for each argument of forward.
        return g_x_MD.to(x_MD.dtype), into_nD, g_bias_n, None, None, None
