"""Log-sum-exp over the rows of a linear layer without its logits: the one operation of a head that touches all N rows (DESIGN 5).

The rows are taken chunk by chunk. Forward: a chunk's logits, its own log-sum-exp. Backward: the logits again, their softmax within the
chunk, and two products; the factor exp(lse_chunk - lse) that makes it a softmax over all rows is put on the (M, D) sides, which are
smaller. So M·N numbers pass through the cache and never lie in memory. Where all of them fit KEEP_BYTES the softmaxes are kept instead
and the product is not repeated. On a CPU the softmax is vitds/kernels/softmax.c. What was tried and measured is in
docs/instance_head.md.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitds.errors import ShapeError
from vitds.kernels.softmax import softmax_rows

CPU_CHUNK_NUMBERS = {
    2: 1 << 21,
    4: 1 << 19,
    8: 1 << 18,
}  # logits of a chunk by their bytes: they stay in the caches
GPU_CHUNK_NUMBERS = 1 << 23  # enough tiles for every multiprocessor
KEEP_BYTES = 64 << 20
SHORTEST_ROW = 1e-12  # below this length a row is not brought to length one


@dataclass(frozen=True)
class Plan:
    """How the rows are worked through. Only `is_cosine` changes the result beyond rounding.

    Attributes:
        chunk_rows: rows taken at once. keeps: whether the chunks' softmaxes stay in memory for the backward pass.
        product: dtype in which matrices are multiplied; sums are kept in max(float32, inputs' dtype).
        is_cosine: rows are brought to length one. gradient: where the backward pass puts the weight's gradient itself (see `row_terms`).
    """

    chunk_rows: int
    keeps: bool
    product: torch.dtype
    is_cosine: bool = False
    gradient: Tensor | None = None


def linear_logsumexp(
    features: Float[Tensor, "M D"],
    weight: Float[Tensor, "n _"],
    bias: Float[Tensor, "_"] | None = None,
    *,
    chunk_rows: int | Literal["auto"] = "auto",
    keep_bytes: int = KEEP_BYTES,
) -> Float[Tensor, "M"]:
    """Log-sum-exp over the rows of `features @ weight.T + bias`, without holding the (M, n) logits.

    Args:
        weight: (n, D). bias: (n,).
        chunk_rows: changes speed and memory, the result only by rounding. Extra memory is O(M·(chunk_rows + n / chunk_rows)).
        keep_bytes: where M·n numbers fit, they are kept for the backward pass, which then needs two products instead of three.
    Returns: natural log, in max(float32, the inputs' dtype), in which the sums are kept too. Gradients have the inputs' dtypes. Under
        autocast matrices are multiplied in its dtype; with bfloat16 logits are rounded to 8 bits, as torch's own linear layer does.
    Raises: ShapeError if the widths differ or n is 0. ValueError if chunk_rows < 1. Non-finite input gives non-finite output, not an
        error. A second backward pass is torch's RuntimeError, a gradient of the gradient NotImplementedError.
    Source: online softmax, arXiv:1805.02867; recompute in backward, arXiv:2411.09009. Reference: tests/heads/reference.py.
    """
    check_widths(features, weight, bias)
    plan = make_plan(features, weight, chunk_rows=chunk_rows, keep_bytes=keep_bytes)
    return _RowTerms.apply(features, weight, bias, None, False, plan)[0]


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
    """All that a smoothed, mixed cross-entropy needs of n rows: the log-sum-exp, K logits of each row of features, the sum of all logits.

    Args:
        picks: rows 0..n-1 whose logits are wanted. sums_rows: whether the sum of all logits is, else None is returned for it.
        is_cosine: the rows are brought to length one; the features are used as they are.
        gradient: (n, D) memory into which the backward pass writes the weight's gradient, making it `weight.grad`, or adds it where
            `weight.grad` is set already. Only for an owner of its rows: autograd and its hooks do not see it. None: a gradient as usual.
        keep_bytes: as in `linear_logsumexp`.
    Returns: float32 or wider; logits are rounded as the product's dtype rounds them, so that none exceeds the log-sum-exp.
    """
    plan = make_plan(features, weight, is_cosine=is_cosine, gradient=gradient, keep_bytes=keep_bytes)
    lse_M, picked_MKD, total_D = _RowTerms.apply(features, weight, bias, picks, sums_rows, plan)
    with torch.autocast(features.device.type, enabled=False):
        x_MD = features.to(lse_M.dtype)
        if is_cosine:
            picked_MKD = torch.nn.functional.normalize(picked_MKD.to(lse_M.dtype), dim=2, eps=SHORTEST_ROW)
        logit_MK = torch.einsum(
            "md,mkd->mk", *(part.to(plan.product).to(lse_M.dtype) for part in (features, picked_MKD))
        )
        logit_MK = logit_MK if bias is None else logit_MK + bias[picks]
        total_M = None
        if sums_rows:
            total_M = x_MD @ total_D if bias is None else x_MD @ total_D + bias.sum()
        return lse_M, logit_MK.to(plan.product).to(lse_M.dtype), total_M


@torch.no_grad()
def highest_logits(
    features: Float[Tensor, "M D"],
    weight: Float[Tensor, "n D"],
    bias: Float[Tensor, "n"] | None,
    picks: Int[Tensor, "M"],
    *,
    is_cosine: bool,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "M"]]:
    """Each row's highest logit over all n rows, and the logit of its own pick; -inf where the pick is not one of 0..n-1.

    Both come out of the same products, so that they are equal bit by bit where the pick is the highest.
    """
    plan = make_plan(features, weight, is_cosine=is_cosine)
    highest_M, own_M = (torch.full_like(features[:, 0], -math.inf) for _ in range(2))
    for span, rows_cD, _ in _chunks(weight, plan):
        logit_Mc = _logits(features, rows_cD, bias, span, features.new_empty(0))
        highest_M = torch.maximum(highest_M, logit_Mc.amax(1))
        is_here_M = (picks >= span.start) & (picks < span.stop)
        own_M[is_here_M] = logit_Mc[is_here_M, picks[is_here_M] - span.start]
    return highest_M, own_M


def check_widths(features: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
    """Raises: ShapeError if features and rows differ in width, there are no rows, or not as many biases."""
    width, rows = features.shape[1], weight.shape[0]
    if width != weight.shape[1]:
        raise ShapeError(
            f"features are {width} wide, the head's rows {weight.shape[1]}; was it built for another backbone?"
        )
    if rows == 0:
        raise ShapeError("the head has no rows: a log-sum-exp needs one at least")
    if bias is not None and bias.shape[0] != rows:
        raise ShapeError(f"the head has {rows} rows and {bias.shape[0]} biases")


def chunk_numbers(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """How many numbers a piece of work should have: few enough for a CPU's cache, enough to fill a GPU."""
    return GPU_CHUNK_NUMBERS if device.type == "cuda" else CPU_CHUNK_NUMBERS[dtype.itemsize]


def make_plan(
    features: Tensor,
    weight: Tensor,
    *,
    chunk_rows: int | Literal["auto"] = "auto",
    keep_bytes: int = KEEP_BYTES,
    is_cosine: bool = False,
    gradient: Tensor | None = None,
) -> Plan:
    """Chunk size, dtype and what is kept, for these shapes on this device.

    Raises: ValueError if chunk_rows < 1.
    """
    device, (M, n) = features.device.type, (features.shape[0], weight.shape[0])
    product = torch.promote_types(features.dtype, weight.dtype)
    if torch.is_autocast_enabled(device) and product != torch.float64:
        product = torch.get_autocast_dtype(device)
    if chunk_rows == "auto":
        # The forward pass keeps M numbers a chunk: with sqrt(n) rows in each these are no more than a chunk's logits, however large M is.
        wanted = max(chunk_numbers(features.device, product) / max(features.shape), math.sqrt(n))
        chunk_rows = 16 * (
            int(wanted) // 16 | 1
        )  # odd multiples: a power of two between rows maps them to the same cache lines (4 %)
    if chunk_rows < 1:
        raise ValueError(f"chunk_rows must be 1 or more, got {chunk_rows}")
    return Plan(min(chunk_rows, n), M * n * product.itemsize <= keep_bytes, product, is_cosine, gradient)


class _RowTerms(torch.autograd.Function):
    """(features, weight, bias, picks, sums_rows, plan) -> lse (M,), weight[picks] (M, K, D), sum of the rows (D,).

    One function, so that the weight's gradient is one piece of memory: the sparse part of the picks and the constant part of the sum
    are added to it in place.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_MD: Tensor,
        weight_nD: Tensor,
        bias_n: Tensor | None,
        picks_MK: Tensor | None,
        sums_rows: bool,
        plan: Plan,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        sums = torch.promote_types(plan.product, torch.float32)
        total_D = x_MD.new_zeros(x_MD.shape[1], dtype=sums) if sums_rows else None
        chunks, kept = -(-len(weight_nD) // plan.chunk_rows), []
        highest_cM, above_cM = (x_MD.new_empty(chunks, len(x_MD), dtype=sums) for _ in range(2))
        with torch.autocast(x_MD.device.type, enabled=False):
            x = x_MD.to(plan.product)
            scratch = x.new_empty(0 if plan.keeps else len(x) * plan.chunk_rows)
            for chunk, (span, rows_cD, _) in enumerate(_chunks(weight_nD, plan)):
                if total_D is not None:
                    total_D += rows_cD.sum(0, dtype=sums)
                logit_Mc = _logits(x, rows_cD, bias_n, span, scratch)
                _softmax(logit_Mc, highest_cM[chunk], above_cM[chunk], finds=True, stores=plan.keeps)
                if plan.keeps:
                    kept.append(logit_Mc)
        # Log-sum-exps are kept as differences from the highest logit: small numbers, in which rounding does not grow with the logits.
        highest_M = highest_cM.amax(0)
        above_M = (highest_cM - highest_M + above_cM).logsumexp(0)
        ctx.plan = plan
        ctx.save_for_backward(
            x_MD, weight_nD, bias_n, picks_MK, highest_cM, above_cM, highest_M, above_M, *kept
        )
        ctx.set_materialize_grads(False)
        return highest_M + above_M, None if picks_MK is None else weight_nD[picks_MK], total_D

    @staticmethod
    def backward(
        ctx: Any, g_lse_M: Tensor | None, g_picked_MKD: Tensor | None, g_total_D: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "linear_logsumexp can be differentiated once: call backward without create_graph"
            )
        x_MD, weight_nD, bias_n, picks_MK, highest_cM, above_cM, highest_M, above_M, *kept = ctx.saved_tensors
        plan, (_, needs_weight, needs_bias, *_) = ctx.plan, ctx.needs_input_grad
        share_cM = (highest_cM - highest_M + above_cM - above_M).exp() * (0.0 if g_lse_M is None else g_lse_M)
        into_nD, adds = _gradient_memory(weight_nD, plan) if needs_weight else (None, False)
        g_bias_n = torch.empty_like(bias_n) if needs_bias else None
        g_x_MD = torch.zeros_like(x_MD, dtype=share_cM.dtype)
        with torch.autocast(x_MD.device.type, enabled=False):
            x = x_MD.to(plan.product)
            scratch, shared_MD = x.new_empty(0 if kept else len(x) * plan.chunk_rows), torch.empty_like(x)
            for chunk, (span, rows_cD, length_c1) in enumerate(_chunks(weight_nD, plan)):
                if kept:
                    p_Mc = kept[chunk]
                else:
                    p_Mc = _logits(x, rows_cD, bias_n, span, scratch)
                    _softmax(p_Mc, highest_cM[chunk], above_cM[chunk], finds=False, stores=True)
                share_M = share_cM[chunk]
                g_x_MD.addcmul_(p_Mc @ rows_cD, share_M[:, None])
                if needs_weight:
                    torch.mul(x_MD, share_M[:, None], out=shared_MD)
                    _put_rows(into_nD[span], adds, p_Mc.T, shared_MD, g_total_D, rows_cD, length_c1)
                if needs_bias:
                    g_bias_n[span] = share_M.to(plan.product) @ p_Mc
        if needs_weight and g_picked_MKD is not None:
            into_nD.index_add_(0, picks_MK.flatten(), g_picked_MKD.flatten(0, 1).to(into_nD.dtype))
        if needs_weight and plan.gradient is not None:
            weight_nD.grad, into_nD = into_nD, None
        return g_x_MD.to(x_MD.dtype), into_nD, g_bias_n, None, None, None


def _chunks(weight_nD: Tensor, plan: Plan) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Each chunk's place, its rows as they are multiplied, and, where they were brought to length one, their lengths before."""
    for first in range(0, len(weight_nD), plan.chunk_rows):
        span = slice(first, min(first + plan.chunk_rows, len(weight_nD)))
        rows_cD, length_c1 = weight_nD[span], None
        if plan.is_cosine:
            rows_cD = rows_cD.to(torch.promote_types(rows_cD.dtype, torch.float32))
            length_c1 = torch.linalg.vector_norm(rows_cD, dim=1, keepdim=True).clamp_min(SHORTEST_ROW)
            rows_cD = rows_cD / length_c1
        yield span, rows_cD.to(plan.product), length_c1


def _logits(x_MD: Tensor, rows_cD: Tensor, bias_n: Tensor | None, span: slice, scratch: Tensor) -> Tensor:
    """The logits of one chunk (M, c), in scratch memory where there is some."""
    size = (len(x_MD), len(rows_cD))
    out = scratch[: size[0] * size[1]].view(size) if len(scratch) else x_MD.new_empty(size)
    if bias_n is None:
        return torch.mm(x_MD, rows_cD.T, out=out)
    return torch.addmm(bias_n[span].to(x_MD.dtype), x_MD, rows_cD.T, out=out)


def _softmax(logit_Mc: Tensor, highest_M: Tensor, above_M: Tensor, *, finds: bool, stores: bool) -> None:
    """Find each row's highest logit and its log-sum-exp above that, or take them as found before; make the logits their softmax.

    The kernel's numbers are float32 and bfloat16 on a CPU. Elsewhere torch's softmax is its quickest exponential, and the sum comes
    back out of the largest share: it is exp(0) / sum.
    """
    if logit_Mc.device.type == "cpu" and highest_M.dtype == torch.float32 and logit_Mc.dtype != torch.float16:
        rows, columns = logit_Mc.shape
        softmax_rows(
            logit_Mc.data_ptr(), is_bf16=logit_Mc.dtype == torch.bfloat16, rows=rows, columns=columns, highest=highest_M.data_ptr(),
            above=above_M.data_ptr(), finds=finds, stores=stores, threads=torch.get_num_threads(),
        )  # fmt: skip
        return
    if finds:
        p_Mc = torch.softmax(logit_Mc, 1, dtype=above_M.dtype)
        highest_M.copy_(logit_Mc.amax(1))
        above_M.copy_(-p_Mc.amax(1).log())
        if stores:
            logit_Mc.copy_(p_Mc)
    else:
        torch.softmax(logit_Mc, 1, out=logit_Mc)


def _gradient_memory(weight_nD: Tensor, plan: Plan) -> tuple[Tensor, bool]:
    """Where the weight's gradient goes, and whether it is added to what is there."""
    if plan.gradient is None:
        return torch.empty_like(weight_nD), False
    return plan.gradient, weight_nD.grad is not None


def _put_rows(
    into_cD: Tensor,
    adds: bool,
    p_cM: Tensor,
    x_MD: Tensor,
    g_total_D: Tensor | None,
    rows_cD: Tensor,
    length_c1: Tensor | None,
) -> None:
    """Write or add the gradient of one chunk of rows."""
    if length_c1 is None and into_cD.dtype == p_cM.dtype:
        torch.addmm(into_cD, p_cM, x_MD, beta=int(adds), out=into_cD)
    else:
        g_cD = p_cM @ x_MD
        if length_c1 is not None:  # along the row nothing changes, across it 1 / length
            g_cD = g_cD if g_total_D is None else g_cD + g_total_D
            g_cD = (g_cD - rows_cD * (g_cD * rows_cD).sum(1, keepdim=True)) / length_c1
        into_cD.add_(g_cD) if adds else into_cD.copy_(g_cD)
    if g_total_D is not None and length_c1 is None:
        into_cD += g_total_D
