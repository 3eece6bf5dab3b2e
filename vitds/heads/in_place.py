"""The terms of logsumexp.py on a GPU, where a tile's logits themselves become their part of the gradient.

Few and long launches: of each tile one product and one read of it in the forward pass, in the backward pass
the product again, one pass that makes it the gradient of its logits, and two products with that. Products are
cuBLAS's, what is between them is vitds/kernels/softmax_gpu.py, and sums of products are float32 from end to
end. Nothing asks the GPU for a number.

Letters of the shapes: M crops of D numbers, n rows, t rows of a tile, K picked rows a crop.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from vitds.heads.tiles import (
    Tiling,
    each_tile,
    gpu_kernels,
    gradient_memory,
    hand_over,
    refuse_second_derivative,
    tile_logits,
)


class InPlaceRowTerms(torch.autograd.Function):
    """(features, weight, bias, picks, sums_rows, tiling) -> lse (M,), weight[picks] (M, K, D), sum of logits
    (M,): the same as RowTerms gives, but for the last, where RowTerms gives the sum of rows.
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
        kernels = gpu_kernels()
        # The highest logit, sum(exp(logit - highest)) and sum(logit) of each crop, over the tiles so far.
        highest_M, exponentials_M, total_M = x_MD.new_zeros(3, len(x_MD), dtype=torch.float32)
        highest_M.fill_(-math.inf)
        kept = []
        with torch.autocast(x_MD.device.type, enabled=False):
            x = x_MD.to(tiling.product)
            bias = None if bias_n is None else bias_n.to(tiling.product)
            scratch = x.new_empty(0 if tiling.keeps else len(x) * tiling.tile_rows)
            for _, span, rows_tD, _ in each_tile(weight_nD, tiling):
                # (M, D) @ (D, t) -> (M, t)
                logit_Mt = tile_logits(x, rows_tD, bias, span, scratch)
                kernels.find_parts(logit_Mt, highest_M, exponentials_M, total_M)
                if tiling.keeps:
                    kept.append(logit_Mt)
                del rows_tD  # before the next tile's are there
        # As in RowTerms: the log-sum-exp stays in two parts, so that rounding does not grow with the logits.
        above_M = exponentials_M.log()
        ctx.tiling = tiling
        ctx.save_for_backward(x_MD, weight_nD, bias_n, picks_MK, highest_M, above_M, *kept)
        ctx.set_materialize_grads(False)
        picked_MKD = None if picks_MK is None else weight_nD[picks_MK]
        return highest_M + above_M, picked_MKD, total_M if sums_rows else None

    @staticmethod
    def backward(
        ctx: Any, g_lse_M: Tensor | None, g_picked_MKD: Tensor | None, g_total_M: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        x_MD, weight_nD, bias_n, picks_MK, highest_M, above_M, *kept = ctx.saved_tensors
        tiling, kernels = ctx.tiling, gpu_kernels()
        _, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        # d loss / d logit = softmax · the gradient of the log-sum-exp + that of the sum of logits.
        factor_M, constant_M = (
            torch.zeros_like(above_M) if given_M is None else given_M.contiguous()
            for given_M in (g_lse_M, g_total_M)
        )
        into_nD, adds = gradient_memory(weight_nD, tiling) if needs_weight else (None, False)
        g_bias_n = torch.empty_like(bias_n) if needs_bias else None
        g_x_MD = torch.zeros_like(x_MD, dtype=torch.float32)
        with torch.autocast(x_MD.device.type, enabled=False):
            x = x_MD.to(tiling.product)
            bias = None if bias_n is None else bias_n.to(tiling.product)
            scratch = x.new_empty(0 if kept else len(x) * tiling.tile_rows)
            for tile, span, rows_tD, length_t1 in each_tile(weight_nD, tiling):
                g_Mt = kept[tile] if kept else tile_logits(x, rows_tD, bias, span, scratch)
                kernels.weigh(g_Mt, highest_M, above_M, factor_M, constant_M)
                if kept:
                    # So that autograd refuses a second backward pass over logits that are none any more.
                    torch.autograd.graph.increment_version(g_Mt)
                # (M, t) @ (t, D) -> (M, D): each tile adds its part.
                _put_product(g_x_MD, g_Mt, rows_tD, adds=True)
                if needs_weight:
                    # (t, M) @ (M, D) -> (t, D)
                    _put_rows(into_nD[span], g_Mt.T, x, rows_tD, length_t1, adds=adds)
                if needs_bias:
                    torch.sum(g_Mt, 0, dtype=g_bias_n.dtype, out=g_bias_n[span])
                del rows_tD
        if needs_weight:
            into_nD = hand_over(into_nD, weight_nD, picks_MK, g_picked_MKD, tiling)
        return g_x_MD.to(x_MD.dtype), into_nD, g_bias_n, None, None, None


def _put_product(into: Tensor, left: Tensor, right: Tensor, *, adds: bool) -> None:
    """left @ right, put into or added to what has their dtype or float32, in which the sums are kept."""
    wider = {} if into.dtype == left.dtype else {"out_dtype": into.dtype}
    torch.addmm(into, left, right, beta=int(adds), out=into, **wider)


def _put_rows(
    into_tD: Tensor, g_tM: Tensor, x_MD: Tensor, rows_tD: Tensor, length_t1: Tensor | None, *, adds: bool
) -> None:
    """Write or add the gradient of one tile of rows.

    Args:
        into_tD: where it goes.
        g_tM: the gradient of the tile's logits, transposed.
        x_MD: the features as they are multiplied.
        rows_tD: the rows, likewise.
        length_t1: their lengths before they were made one; None where they were not.
        adds: whether it is added to what is there.
    """
    if length_t1 is None and into_tD.dtype in (torch.float32, g_tM.dtype):
        _put_product(into_tD, g_tM, x_MD, adds=adds)
        return
    g_tD = torch.empty_like(into_tD, dtype=torch.float32)
    _put_product(g_tD, g_tM, x_MD, adds=False)
    if length_t1 is not None:
        # The length of a row does not matter: nothing along it, and across it 1 / length.
        along_t1 = (g_tD * rows_tD).sum(1, keepdim=True)
        g_tD.addcmul_(rows_tD, along_t1, value=-1).div_(length_t1)
    into_tD.add_(g_tD) if adds else into_tD.copy_(g_tD)
