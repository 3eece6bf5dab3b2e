"""softmax_gpu.py against float64 on Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import math
import os
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.interpreted import Interpreted

BLOCK = 16


def make_logits(crops: int, columns: int, dtype: torch.dtype, scale: float = 3.0) -> Tensor:
    return (torch.randn(crops, columns, generator=torch.Generator().manual_seed(columns)) * scale).to(dtype)


def found_in(*tiles: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(highest, exponentials, total) after the tiles, in blocks that the tests' widths do not divide."""
    from vitds.kernels import softmax_gpu as kernel  # only where TRITON_INTERPRET was set before

    kernel.FIND_NUMBERS = BLOCK
    highest, exponentials, total = torch.zeros(3, len(tiles[0]))
    highest.fill_(-math.inf)
    for tile in tiles:
        kernel.find_parts(tile, highest, exponentials, total)
    return highest, exponentials, total


def weighed(logits: Tensor, highest: Tensor, above: Tensor, factor: Tensor, constant: Tensor) -> Tensor:
    from vitds.kernels import softmax_gpu as kernel

    kernel.WEIGH_NUMBERS = BLOCK
    values = logits.clone()
    kernel.weigh(values, highest, above, factor, constant)
    return values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 50])
def test_parts_of_one_tile(columns: int, dtype: torch.dtype, interpreted: Interpreted) -> None:
    logits = make_logits(3, columns, dtype)
    highest, exponentials, total = interpreted(found_in, logits)
    exact = logits.double()
    torch.testing.assert_close(highest, logits.float().amax(1), rtol=0, atol=0)
    torch.testing.assert_close(highest.double() + exponentials.log(), exact.logsumexp(1), rtol=0, atol=2e-6)
    torch.testing.assert_close(total.double(), exact.sum(1), rtol=0, atol=2e-5)


def test_parts_of_tiles_are_those_of_all_logits(interpreted: Interpreted) -> None:
    logits = make_logits(4, 61, torch.float32)
    logits[0, :40] -= 1e4  # all that counts is in the last tile
    logits[1, 40:] -= 1e4  # and in the first ones
    highest, exponentials, total = interpreted(found_in, *(each.contiguous() for each in logits.split(20, 1)))
    torch.testing.assert_close(highest, logits.amax(1), rtol=0, atol=0)
    torch.testing.assert_close(exponentials.double(), (logits.double() - highest[:, None]).exp().sum(1))
    torch.testing.assert_close(total.double(), logits.double().sum(1), rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_in_its_crop(bad: float, interpreted: Interpreted) -> None:
    logits = make_logits(4, 40, torch.float32)
    logits[2, 3] = bad
    highest, exponentials, total = interpreted(
        found_in, logits[:, :20].contiguous(), logits[:, 20:].contiguous()
    )
    for part in (exponentials, total):
        assert torch.isfinite(part).tolist() == [True, True, False, True]
    assert torch.isnan(exponentials[2])


def test_minus_infinity_takes_no_part(interpreted: Interpreted) -> None:
    logits = make_logits(3, 40, torch.float32)
    logits[0, 5] = -math.inf
    logits[1, :20] = -math.inf  # a whole block, and then a whole tile
    logits[2] = -math.inf
    highest, exponentials, _ = interpreted(found_in, logits[:, :20].contiguous(), logits[:, 20:].contiguous())
    torch.testing.assert_close((highest + exponentials.log())[:2], logits[:2].logsumexp(1))
    assert not torch.isfinite(highest + exponentials.log())[2]
    zeros = torch.zeros(3)
    shares = interpreted(weighed, logits, highest, exponentials.log(), zeros + 1, zeros)
    torch.testing.assert_close(shares[:2], logits[:2].softmax(1), rtol=2e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("columns", [1, 15, 16, 17, 50])
def test_logits_become_their_gradient(columns: int, dtype: torch.dtype, interpreted: Interpreted) -> None:
    logits = make_logits(3, columns, dtype)
    highest, above = logits.float().amax(1), (logits.double().logsumexp(1) - logits.double().amax(1)).float()
    factor, constant = torch.tensor([1.0, 1e-3, 1e-20]), torch.tensor([0.0, -1e-5, 0.0])
    found = interpreted(weighed, logits, highest, above, factor, constant)
    exact = logits.double().softmax(1) * factor.double()[:, None] + constant.double()[:, None]
    assert found.dtype == dtype
    # The interpreter cuts bits off where a GPU rounds: to a whole unit of bfloat16's eighth bit.
    rtol = 4e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(found.double(), exact, rtol=rtol, atol=1e-11 if columns > 1 else 0)


def test_large_logits_lose_nothing(interpreted: Interpreted) -> None:
    logits = make_logits(2, 50, torch.float64, scale=1.0)
    for shift in (1e4, 2.0**20, -(2.0**20)):
        moved = (logits + shift).float()
        highest, exponentials, _ = interpreted(found_in, moved)
        above = exponentials.log()
        torch.testing.assert_close(above.double(), moved.double().logsumexp(1) - highest, rtol=0, atol=2e-6)
        found = interpreted(weighed, moved, highest, above, torch.ones(2), torch.zeros(2))
        torch.testing.assert_close(found.double(), moved.double().softmax(1), rtol=4e-6, atol=0)


def compiled(folder: Path) -> list[tuple[str, str, bool, str]]:
    """(kernel, dtype, whether there is code for the GPU, its assembly), for an A100 and an H100."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vitds.kernels import softmax_gpu as kernel

    made = []
    blocks = {kernel._find_parts: kernel.FIND_NUMBERS, kernel._weigh: kernel.WEIGH_NUMBERS}
    for (function, numbers), dtype, capability in product(blocks.items(), ("fp32", "bf16"), (80, 90)):
        pointers = len(function.arg_names) - 2
        types = [f"*{dtype}", *["*fp32"] * (pointers - 1), "i32", "constexpr"]
        source = ASTSource(
            function,
            dict(zip(function.arg_names, types, strict=True)),
            constexprs={(pointers + 1,): numbers},
            # As Triton finds them at a launch: addresses and width are multiples of 16.
            attrs={(place,): [["tt.divisibility", 16]] for place in range(pointers + 1)},
        )
        code = compile(source, target=GPUTarget("cuda", capability, 32)).asm
        made.append((function.__name__, dtype, bool(code["cubin"]), code["ptx"]))
    return made


def test_they_compile_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    # In a process of its own: the checks of shapes that the tests add to functions are no code for a GPU.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        made = pool.submit(compiled, tmp_path).result()
    assert len(made) == 8
    for name, dtype, has_code, ptx in made:
        assert has_code
        # Read 16 bytes at a time, and rounded to the nearest bfloat16.
        assert "ld.global.v4" in ptx
        assert ("cvt.rn.bf16" in ptx) == (dtype == "bf16" and name == "_weigh")
