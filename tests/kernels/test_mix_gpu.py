"""mix_gpu.py against the plain reference on Triton's interpreter, and compiled for GPUs that are not here."""

from __future__ import annotations

import os
import re
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.interpreted import Interpreted
from tests.kernels.mixing import SCALE, SHIFT, Case, K, case, written_plainly

KINDS = ("none", "cutmix", "mixup")


def written(crops: Tensor, mixing: object, dtype: torch.dtype) -> Tensor:
    """In blocks that no side's square is."""
    from vitds.kernels import mix_gpu as kernel  # only where TRITON_INTERPRET was set before

    kernel.PIXELS = 16
    images = torch.full((crops.shape[:2].numel(), *crops.shape[2:]), torch.nan, dtype=dtype)
    kernel.write_images(crops, images, SCALE, SHIFT, mixing, chunk_images=K)
    return images


@pytest.mark.parametrize("side", [1, 5])
@pytest.mark.parametrize("kind", ["plain", *KINDS])
def test_the_bits_are_those_of_the_reference(kind: str, side: int, interpreted: Interpreted) -> None:
    given = case(kind, side)
    exact = written_plainly(*given)
    assert torch.equal(interpreted(written, *given, torch.float32), exact)
    # The interpreter cuts bits off where a GPU rounds.
    cut = (exact.view(torch.int32) & -(1 << 16)).view(torch.float32).bfloat16()
    assert torch.equal(interpreted(written, *given, torch.bfloat16), cut)


def test_one_view_and_one_chunk(interpreted: Interpreted) -> None:
    for views, chunks in ((1, 2), (4, 1)):
        given = case("cutmix", 5, views=views, chunks=chunks)
        assert torch.equal(interpreted(written, *given, torch.float32), written_plainly(*given))


def test_crops_that_are_every_other_view_of_a_batch(interpreted: Interpreted) -> None:
    crops, mixing = case("mixup", 4)
    spread = torch.zeros(len(crops), 4, 3, 4, 4, dtype=torch.uint8)
    spread[:, ::2] = crops
    given = Case(spread[:, ::2], mixing)
    assert torch.equal(interpreted(written, *given, torch.float32), written_plainly(*given))


def compiled(folder: Path) -> list[tuple[str, str, bool, str]]:
    """(kind, dtype, whether there is code for the GPU, its assembly), for an A100 or an H100."""
    os.environ["TRITON_CACHE_DIR"] = str(folder)
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from vitds.kernels import mix_gpu as kernel

    made = []
    for kind, (dtype, capability) in product(KINDS, (("fp32", 80), ("bf16", 90), ("fp16", 80))):
        types = ["*u8", f"*{dtype}", "*i64", "*i64", "*fp32", *["i32"] * 5, *["fp32"] * 6, *["constexpr"] * 3]
        source = ASTSource(
            kernel._write_images,
            dict(zip(kernel._write_images.arg_names, types, strict=True)),
            constexprs={(16,): kind, (17,): 112, (18,): kernel.PIXELS},
            # As Triton finds them at a launch: addresses and strides are multiples of 16.
            attrs={(place,): [["tt.divisibility", 16]] for place in range(7)},
        )
        options = {"enable_fp_fusion": False}
        code = compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm
        made.append((kind, dtype, bool(code["cubin"]), code["ptx"]))
    return made


def test_it_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    # In a process of its own: the checks of shapes that the tests add to functions are no code for a GPU.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        made = pool.submit(compiled, tmp_path).result()
    assert len(made) == 9
    for kind, dtype, has_code, ptx in made:
        assert has_code
        # Each number is rounded where the reference rounds it: .rn is never joined to another operation.
        found = re.findall(r"(?:fma|mul|add|sub)(?:\.\w+)*\.f32", ptx)
        joined = {"fma.rn.f32", "sub.rn.f32"} if kind == "mixup" else set()
        assert set(found) - {"add.rn.f32"} == {"mul.rn.f32"} | joined
        assert ("cvt.rn.bf16" in ptx) == (dtype == "bf16")
        assert ("cvt.rn.f16" in ptx) == (dtype == "fp16")
