"""A process in which kernels for a GPU run on tensors of the CPU, by Triton's interpreter.

It needs a process of its own, because Triton reads TRITON_INTERPRET when it is imported.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

Interpreted = Callable[..., Any]


@contextmanager
def interpreter() -> Iterator[Interpreted]:
    """What it gives calls a function, with its arguments, in that process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_start) as pool:
        yield lambda function, *given, **named: pool.submit(function, *given, **named).result()


def _start() -> None:
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    np.seterr(all="ignore")  # the interpreter computes with NumPy, which warns of log(0) and inf - inf
    from triton.runtime.interpreter import InterpreterBuilder

    InterpreterBuilder.create_fma = _fused
    global _library
    # A GPU's product of two bfloat16 matrices with float32 sums, which torch lacks on a CPU.
    _library = torch.library.Library("aten", "IMPL")
    _library.impl("addmm.dtype_out", _addmm_into_float32, "CPU")


def _fused(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z in float32, rounded once as a GPU does; the interpreter's own rounds twice."""
    from triton.runtime.interpreter import TensorHandle

    # The product is exact in 64 bits, and so is the sum but for a chance of 2^-40.
    total = x.data.astype(np.longdouble) * y.data + z.data
    return TensorHandle(total.astype(z.data.dtype), z.dtype.scalar)


def _addmm_into_float32(
    self: Tensor,
    mat1: Tensor,
    mat2: Tensor,
    out_dtype: torch.dtype,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    assert (
        mat1.dtype == mat2.dtype == torch.bfloat16 and self.dtype == out.dtype == out_dtype == torch.float32
    )
    return torch.addmm(self, mat1.float(), mat2.float(), beta=beta, alpha=alpha, out=out)
