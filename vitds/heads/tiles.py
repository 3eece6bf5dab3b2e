"""Tiles of a head's rows: their size, their logits, the softmax of these, their part of the gradient.

Letters of the shapes: M crops of D numbers, n rows, t rows of a tile.
"""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor

from vitds.kernels.softmax import softmax_rows

_log = logging.getLogger(__name__)


# Logits of a tile, by the bytes of one of them: on a CPU they stay in its caches.
CPU_TILE_NUMBERS = {2: 1 << 21, 4: 1 << 19, 8: 1 << 18}
# Enough work for every multiprocessor of a GPU.
GPU_TILE_NUMBERS = 1 << 23
# Bytes of a tile where a GPU's kernels work on it in place: logits, and a copy of its rows. 40 MiB leave
# enough of 64 MB to all else that a head needs (docs/instance_head.md), and stay in an H100's second cache.
IN_PLACE_BYTES = 40 << 20
KEEP_BYTES = 64 << 20
# A row that is shorter is not brought to length one: its direction would be noise.
SHORTEST_ROW = 1e-12


Softmax = Literal["C", "Triton", "torch"]


@dataclass(frozen=True)
class Tiling:
    """How the rows are worked through. Only `is_cosine` changes the result beyond rounding.

    Attributes:
        tile_rows: rows worked on at once.
        keeps: whether the tiles' softmaxes stay in memory for the backward pass.
        product: dtype in which matrices are multiplied; sums are kept in max(float32, the inputs' dtype).
        softmax: whose code makes it, see `choose_softmax`.
        is_cosine: rows are brought to length one.
        gradient: where the backward pass puts the weight's gradient itself; see `row_terms` in logsumexp.py.
    """

    tile_rows: int
    keeps: bool
    product: torch.dtype
    softmax: Softmax
    is_cosine: bool = False
    gradient: Tensor | None = None


def tile_numbers(device: torch.device, dtype: torch.dtype = torch.float32) -> int:
    """How many numbers to work on at once: few enough for a CPU's cache, enough to fill a GPU."""
    return GPU_TILE_NUMBERS if device.type == "cuda" else CPU_TILE_NUMBERS[dtype.itemsize]


def choose_softmax(device: torch.device, product: torch.dtype) -> Softmax:
    """Whose code makes the softmax of a tile: the kernel in C, those in Triton, or torch.

    The kernels know float32 and bfloat16. In float16 the part of a crop in the gradient would be too small.
    """
    if product not in (torch.float32, torch.bfloat16):
        return "torch"
    if device.type == "cpu":
        return "C"
    return "Triton" if device.type == "cuda" and gpu_kernels() else "torch"


@functools.cache
def gpu_kernels() -> ModuleType | None:
    """The module with the Triton kernels, or None where in_place.py does not run, which the log then says."""
    try:
        kernels = import_module("vitds.kernels.softmax_gpu")
        kernels.find_parts(*torch.zeros(1, 1, 16, device="cuda"), *torch.zeros(3, 1, device="cuda"))
        square, total = (torch.zeros(16, 16, device="cuda", dtype=dtype) for dtype in (torch.bfloat16, None))
        torch.addmm(total, square, square, out_dtype=total.dtype, out=total)
    except Exception as error:  # whatever it lacks: Triton, a C compiler, a GPU it knows, torch 2.10
        _log.warning(
            "The head's GPU kernels do not run here, and torch's operations, which are slower, take their "
            "place: %s: %s. The kernels need torch 2.10, Triton, a C compiler and Python's headers.",
            type(error).__name__,
            error,
        )
        return None
    return kernels


def in_place_row_bytes(crops: int, width: int, product: int, is_cosine: bool) -> int:
    """What a row of a tile takes in in_place.py, beside itself and its gradient.

    Args:
        crops: M.
        width: D.
        product: bytes of a number in matrix products.
        is_cosine: rows are brought to length one, which takes the gradient before and a product in float32.
    """
    return product * (crops + width) + 8 * width * is_cosine


def choose_tiling(
    features: Tensor,
    weight: Tensor,
    *,
    tile_rows: int | Literal["auto"] = "auto",
    keep_bytes: int = KEEP_BYTES,
    is_cosine: bool = False,
    gradient: Tensor | None = None,
) -> Tiling:
    """The size of a tile, the dtype of products, the softmax, what is kept: for these shapes on this device.

    Raises: ValueError if tile_rows < 1.
    """
    device = features.device
    M, n = features.shape[0], weight.shape[0]
    # As autocast would choose it for a product: its own dtype, but float64 stays.
    product = torch.promote_types(features.dtype, weight.dtype)
    if torch.is_autocast_enabled(device.type) and product != torch.float64:
        product = torch.get_autocast_dtype(device.type)
    softmax = choose_softmax(device, product)
    if tile_rows == "auto":
        wanted = tile_numbers(device, product) / max(features.shape)
        if softmax == "Triton":
            wanted = IN_PLACE_BYTES / in_place_row_bytes(*features.shape, product.itemsize, is_cosine)
        # The forward pass keeps two numbers a crop and tile. With sqrt(n) rows in each these are no more than
        # a tile's logits, however large M is.
        wanted = max(wanted, math.sqrt(n))
        # Odd multiples of 16: a power of two between rows maps them to the same cache lines (4 % slower).
        tile_rows = 16 * (int(wanted) // 16 | 1)
    if tile_rows < 1:
        raise ValueError(f"tile_rows must be 1 or more, got {tile_rows}")
    keeps = M * n * product.itemsize <= keep_bytes
    # A tile is never taller than the weight. Logits or softmaxes are kept only if those of all tiles fit.
    return Tiling(min(tile_rows, n), keeps, product, softmax, is_cosine, gradient)


def each_tile(weight_nD: Tensor, tiling: Tiling) -> Iterator[tuple[int, slice, Tensor, Tensor | None]]:
    """Each tile's number and place, its rows as they are multiplied, their lengths where they were made one.

    Nothing here holds on to the rows while they are worked on.
    """
    for tile, first in enumerate(range(0, len(weight_nD), tiling.tile_rows)):
        span = slice(first, min(first + tiling.tile_rows, len(weight_nD)))
        rows_tD = weight_nD[span]
        if not tiling.is_cosine:
            yield tile, span, rows_tD.to(tiling.product), None
            continue
        # Divided in float32 or wider, also where rows are bfloat16; rounded to the product's dtype last.
        rows_tD = rows_tD.to(torch.promote_types(rows_tD.dtype, torch.float32))
        length_t1 = torch.linalg.vector_norm(rows_tD, dim=1, keepdim=True).clamp_min(SHORTEST_ROW)
        yield tile, span, (rows_tD / length_t1).to(tiling.product), length_t1


def tile_logits(x_MD: Tensor, rows_tD: Tensor, bias_n: Tensor | None, span: slice, scratch: Tensor) -> Tensor:
    """The logits of one tile (M, t), in scratch memory where there is some."""
    size = (len(x_MD), len(rows_tD))
    out = scratch[: size[0] * size[1]].view(size) if len(scratch) else x_MD.new_empty(size)
    if bias_n is None:
        return torch.mm(x_MD, rows_tD.T, out=out)
    # The bias rides along in the product: no second pass over (M, t).
    return torch.addmm(bias_n[span].to(x_MD.dtype), x_MD, rows_tD.T, out=out)


def tile_softmax(
    logit_Mt: Tensor, highest_M: Tensor, above_M: Tensor, kind: Softmax, *, finds: bool, stores: bool
) -> None:
    """Make the logits of a tile their softmax, in place.

    Args:
        logit_Mt: contiguous.
        highest_M: each crop's highest logit: found here, or taken as it was found before.
        above_M: its log-sum-exp less that, likewise.
        kind: "C" or "torch".
        finds: whether the two are found.
        stores: whether the logits give way to their softmax.
    """
    if kind == "C":
        rows, columns = logit_Mt.shape
        softmax_rows(
            logit_Mt.data_ptr(),
            is_bf16=logit_Mt.dtype == torch.bfloat16,
            rows=rows,
            columns=columns,
            highest=highest_M.data_ptr(),
            above=above_M.data_ptr(),
            finds=finds,
            stores=stores,
            threads=torch.get_num_threads(),
        )
        return
    if finds:
        # torch's softmax is its quickest exponential. The sum comes back out of the largest share, which is
        # exp(0) / sum.
        p_Mt = torch.softmax(logit_Mt, 1, dtype=above_M.dtype)
        highest_M.copy_(logit_Mt.amax(1))
        above_M.copy_(-p_Mt.amax(1).log())
        if stores:
            logit_Mt.copy_(p_Mt)
    else:
        # torch has no softmax with a known maximum and sum: it finds them again.
        torch.softmax(logit_Mt, 1, out=logit_Mt)


def gradient_memory(weight_nD: Tensor, tiling: Tiling) -> tuple[Tensor, bool]:
    """Where the weight's gradient goes, and whether it is added to what is there."""
    if tiling.gradient is None:
        return torch.empty_like(weight_nD), False
    # A gradient that is set is of an earlier micro step of this step: add to it.
    return tiling.gradient, weight_nD.grad is not None


def put_rows(
    into_tD: Tensor,
    adds: bool,
    p_tM: Tensor,
    x_MD: Tensor,
    g_total_D: Tensor | None,
    rows_tD: Tensor,
    length_t1: Tensor | None,
) -> None:
    """Write or add the gradient of one tile of rows.

    Args:
        into_tD: where it goes.
        adds: whether it is added to what is there.
        p_tM: the tile's softmax, transposed.
        x_MD: the features, each times its share of the softmax over all rows.
        g_total_D: gradient of the sum of all rows.
        rows_tD: as they were multiplied.
        length_t1: their lengths before they were made one; None where they were not.
    """
    if length_t1 is None and into_tD.dtype == p_tM.dtype:
        # The common case in one call and without a temporary: into = beta · into + p^T x.
        torch.addmm(into_tD, p_tM, x_MD, beta=int(adds), out=into_tD)
    else:
        g_tD = p_tM @ x_MD
        if length_t1 is not None:
            # The length of a row does not matter: nothing along it, and across it 1 / length.
            # The sum is of rows of length one, so its gradient is projected like the rest.
            g_tD = g_tD if g_total_D is None else g_tD + g_total_D
            g_tD = (g_tD - rows_tD * (g_tD * rows_tD).sum(1, keepdim=True)) / length_t1
        into_tD.add_(g_tD) if adds else into_tD.copy_(g_tD)
    # The constant part: each row enters the sum once, so each gets the same gradient.
    if g_total_D is not None and length_t1 is None:
        into_tD += g_total_D


def hand_over(
    into_nD: Tensor, weight_nD: Tensor, picks_MK: Tensor | None, g_picked_MKD: Tensor | None, tiling: Tiling
) -> Tensor | None:
    """The gradient of the weight, whole with that of the picked rows, as a function gives it to autograd.

    Args:
        into_nD: from `gradient_memory`, with the part of all rows.
        weight_nD: the rows.
        picks_MK: the picked ones.
        g_picked_MKD: the gradient of these.
        tiling: where it names the gradient's memory, that becomes `weight.grad`, and autograd gets None.
    """
    # The sparse part. index_add_ and no assignment, for two crops may have picked the same row.
    if g_picked_MKD is not None:
        into_nD.index_add_(0, picks_MK.flatten(), g_picked_MKD.flatten(0, 1).to(into_nD.dtype))
    if tiling.gradient is None:
        return into_nD
    # Set by hand, and autograd gets None: it would add what it gets to .grad, and so count it twice.
    weight_nD.grad = into_nD
    return None


def refuse_second_derivative() -> None:
    """Raises: NotImplementedError in a backward pass that is to be differentiated itself."""
    # In a backward pass gradients are on only under create_graph=True.
    if torch.is_grad_enabled():
        raise NotImplementedError(
            "linear_logsumexp can be differentiated once: call backward without create_graph"
        )
