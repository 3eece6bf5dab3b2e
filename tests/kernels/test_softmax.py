"""softmax.c against float64: both kinds of numbers, what is not finite, threads, other processors' builds."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from vitds.kernels import softmax as kernel
from vitds.kernels.softmax import softmax_rows

COMPILER = shutil.which("gcc") or shutil.which("cc")
X86 = platform.machine() == "x86_64"
BUILDS = {
    "any processor": ["-O3", "-DVITDS_PLAIN"],
    "256 bits": ["-O3", "-D__builtin_cpu_supports(name)=(name[3] == '2' || name[0] == 'f')"],
    "undefined behaviour": ["-O1", "-fsanitize=undefined", "-fno-sanitize-recover=all"],
}


def run(
    logits: torch.Tensor,
    *,
    parts: tuple[torch.Tensor, torch.Tensor] | None = None,
    stores: bool = True,
    threads: int = 2,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(what stands where the logits did, highest, above); `parts` are known, else found."""
    values = logits.clone()
    highest, above = (part.clone() for part in parts) if parts else torch.full((2, len(logits)), 7.0)
    softmax_rows(
        values.data_ptr(),
        is_bf16=values.dtype == torch.bfloat16,
        rows=values.shape[0],
        columns=values.shape[1],
        highest=highest.data_ptr(),
        above=above.data_ptr(),
        finds=parts is None,
        stores=stores,
        threads=threads,
    )
    return values, highest, above


def make_logits(rows: int, columns: int, dtype: torch.dtype, scale: float = 3.0) -> torch.Tensor:
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(columns)) * scale).to(dtype)


def exponentials(x: torch.Tensor) -> torch.Tensor:
    """e^x of a row, which the kernel stores where both parts are given as 0."""
    return run(x[None], parts=(torch.zeros(1), torch.zeros(1)))[0][0]


def check_against_float64(dtype: torch.dtype) -> None:
    for columns in (1, 2, 15, 16, 17, 33, 1365):
        logits = make_logits(7, columns, dtype)
        shares, highest, above = run(logits)
        torch.testing.assert_close(highest, logits.float().amax(1), rtol=0, atol=0)
        torch.testing.assert_close(highest.double() + above, logits.double().logsumexp(1), rtol=0, atol=2e-6)
        rtol = 4e-6 if dtype == torch.float32 else 2**-8  # of above, an ulp of 8 in the exponent
        torch.testing.assert_close(shares.double(), logits.double().softmax(1), rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_become_their_softmax(dtype: torch.dtype) -> None:
    check_against_float64(dtype)


def test_exponentials_are_off_by_two_units_in_the_last_place_at_most() -> None:
    x = torch.linspace(-87, 0, 2_000_003)
    exact = x.double().exp()
    assert ((exponentials(x).double() - exact) / exact).abs().max() <= 2 * 2**-23
    assert exponentials(torch.tensor([0.0, -87.01, -1e30, -torch.inf])).tolist() == [1, 0, 0, 0]


def test_exponentials_of_bfloat16_numbers_are_off_by_their_rounding() -> None:
    x = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    x = x[(x <= 0) & (x >= -87)]  # all there are
    exact = x.double().exp()
    assert ((exponentials(x).double() - exact) / exact).abs().max() <= 2**-8 + 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_highest_logit_is_found_whatever_the_signs(dtype: torch.dtype) -> None:
    for values in (
        [-3.0, -2.0, -7.0],
        [0.0, -1e30, -1.0],
        [-torch.inf, -5.0, 2.0],
        [1e-30, 1e30, -1e38],
        [-1e-38, -1.0, -2.0],
    ):
        logits = torch.tensor(values * 40)[None].to(dtype)
        assert run(logits)[1] == logits.max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_parts_that_are_known_give_the_same_bits(dtype: torch.dtype) -> None:
    logits = make_logits(5, 77, dtype)
    shares, *parts = run(logits)
    again, *same = run(logits, parts=tuple(parts))
    assert torch.equal(again, shares) and torch.equal(same[0], parts[0]) and torch.equal(same[1], parts[1])


def test_logits_stay_where_shares_are_not_wanted() -> None:
    logits = make_logits(5, 77, torch.float32)
    values, highest, above = run(logits, stores=False)
    assert torch.equal(values, logits) and torch.equal(highest + above, sum(run(logits)[1:]))


def test_large_logits_lose_nothing() -> None:
    logits = make_logits(4, 100, torch.float64, scale=1.0)
    for shift in (2.0**20, -(2.0**20)):
        moved = (logits + shift).float()
        shares, highest, above = run(moved)
        torch.testing.assert_close(shares.double(), moved.double().softmax(1), rtol=2e-6, atol=0)
        torch.testing.assert_close(above.double(), moved.double().logsumexp(1) - highest, rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf], ids=["NaN", "-NaN", "inf"])
def test_what_is_not_finite_stays_in_its_row(bad: float, dtype: torch.dtype) -> None:
    logits = make_logits(4, 40, dtype)
    logits[2, 39] = bad
    shares, highest, above = run(logits)
    assert torch.isfinite(highest + above).tolist() == [True, True, False, True]
    assert torch.isfinite(shares).all(1).tolist() == [True, True, False, True]


def test_minus_infinity_takes_no_share() -> None:
    logits = make_logits(1, 40, torch.float32)
    logits[0, 5] = -torch.inf
    shares, highest, above = run(logits)
    assert shares[0, 5] == 0 and torch.isfinite(shares).all()
    torch.testing.assert_close(highest + above, logits.logsumexp(1))


def test_any_number_of_threads_gives_the_same_bits() -> None:
    logits = make_logits(11, 300, torch.bfloat16)
    results = [run(logits, threads=threads) for threads in (1, 2, 3, 16)]
    assert all(
        torch.equal(one, first) for result in results for one, first in zip(result, results[0], strict=True)
    )


def test_its_threads_are_those_of_torch() -> None:
    """Two OpenMP libraries would take the cores from each other: their idle threads wait in a loop."""
    code = "import torch; from vitds.kernels.softmax import library; library(); "
    code += "print(open('/proc/self/maps').read())"
    maps = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len({line.split()[-1] for line in maps.splitlines() if "libgomp" in line}) == 1


@pytest.mark.skipif(COMPILER is None, reason="no C compiler")
@pytest.mark.parametrize("build", [name for name in BUILDS if X86 or name != "256 bits"])
def test_builds_for_other_processors_agree(
    build: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = Path(kernel.__file__).parent / "softmax.c", tmp_path / "_softmax.so"
    command = [
        COMPILER,
        "-std=gnu11",
        "-Wall",
        "-Wextra",
        "-Werror",
        "-Wno-unused-function",
        "-fopenmp",
        "-fPIC",
        "-shared",
    ]
    made = subprocess.run(
        [*command, *BUILDS[build], str(source), "-o", str(out), "-lm"], capture_output=True, text=True
    )
    assert made.returncode == 0, made.stderr
    monkeypatch.setattr(kernel, "__file__", str(tmp_path / "softmax.py"))
    other = kernel.library.__wrapped__()
    monkeypatch.setattr(kernel, "library", lambda: other)
    for dtype in (torch.float32, torch.bfloat16):
        check_against_float64(dtype)
