"""mix.c against the plain reference, bit by bit: edges of boxes and lambdas, strides, threads, builds."""

from __future__ import annotations

import platform
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.kernels.mixing import SCALE, SHIFT, Case, K, case, written_plainly
from vitds.augment.images import write_by_torch
from vitds.kernels import mix as kernel

COMPILER = shutil.which("gcc") or shutil.which("cc")
X86 = platform.machine() == "x86_64"
BUILDS = {
    "any processor": ["-O3", "-DVITDS_PLAIN"],
    "256 bits": ["-O3", "-D__builtin_cpu_supports(name)=(name[3] == '2' || name[0] == 'f')"],
    "undefined behaviour": ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
}
KINDS = ("plain", "none", "cutmix", "mixup")
SIDES = (1, 2, 5, 16, 33)


def written(given: Case, dtype: torch.dtype = torch.float32, write: Callable = kernel.write_images) -> Tensor:
    crops = given.crops
    images = torch.full((crops.shape[:2].numel(), *crops.shape[2:]), torch.nan, dtype=dtype)
    write(crops, images, SCALE, SHIFT, given.mixing, chunk_images=K)
    return images


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_bits_are_those_of_the_reference(kind: str, side: int) -> None:
    given = case(kind, side)
    exact = written_plainly(*given)
    assert torch.equal(written(given), exact)
    assert torch.equal(written(given, torch.bfloat16), exact.bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_torchs_operations_write_the_same_bits(kind: str) -> None:
    for side in SIDES:
        given = case(kind, side)
        for dtype in (torch.float32, torch.bfloat16):
            assert torch.equal(written(given, dtype, write_by_torch), written(given, dtype))


def test_one_view_and_one_chunk() -> None:
    for views, chunks in ((1, 2), (4, 1)):
        given = case("cutmix", 9, views=views, chunks=chunks)
        assert torch.equal(written(given), written_plainly(*given))


def test_crops_that_are_every_other_view_of_a_batch() -> None:
    crops, mixing = case("mixup", 8)
    spread = torch.zeros(len(crops), 4, 3, 8, 8, dtype=torch.uint8)
    spread[:, ::2] = crops
    assert torch.equal(written(Case(spread[:, ::2], mixing)), written(Case(crops, mixing)))


def test_images_of_a_type_that_the_kernel_does_not_write_are_refused() -> None:
    with pytest.raises(TypeError, match="float16; mix.c writes float32 and bfloat16"):
        written(case("none", 2), torch.float16)


def test_any_number_of_threads_gives_the_same_bits() -> None:
    given, before = case("mixup", 33), torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            assert torch.equal(written(given), written_plainly(*given))
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize("build", [name for name in BUILDS if X86 or name != "256 bits"])
def test_builds_for_other_processors_write_the_same_bits(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Path(kernel.__file__).parent / "mix.c", tmp_path / "_mix.so"
    flags = "-std=gnu11 -Wall -Wextra -Werror -Wno-unused-function -fopenmp -ffp-contract=off -fPIC -shared"
    command = [COMPILER, *flags.split(), *BUILDS[build], str(source), "-o", str(out), "-lm"]
    made = subprocess.run(command, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    monkeypatch.setattr(kernel, "__file__", str(tmp_path / "mix.py"))
    other = kernel.library.__wrapped__()
    monkeypatch.setattr(kernel, "library", lambda: other)
    for kind in KINDS:
        for side in SIDES:
            given = case(kind, side)
            exact = written_plainly(*given)
            assert torch.equal(written(given), exact)
            assert torch.equal(written(given, torch.bfloat16), exact.bfloat16())
