"""pixels.c built otherwise: clean under the sanitizers on fuzzed input, the same bytes on any processor."""

from __future__ import annotations

import ctypes
import platform
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.kernels.pictures import photograph_parts, photographs
from vitds.kernels import views as kernels
from vitds.kernels.views import RAW, VIEW_SPEC, cut_views

SOURCE = Path(kernels.__file__).parent / "pixels.c"
NATIVE = SOURCE.parents[2] / ".venv/native"
COMPILER = shutil.which("gcc") or shutil.which("cc")
pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C compiler")

SANITIZED = [
    "-O1",
    "-g",
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    str(Path(__file__).parent / "fuzz.c"),
]
NARROW = ["-O2", *(["-mno-avx512f", "-mno-avx2", "-mno-avx"] if platform.machine() == "x86_64" else [])]
FUSED = ["-O3", "-ffp-contract=fast", *(["-march=native"] if platform.machine() == "x86_64" else [])]
# The choice that a processor without wide registers makes, and one with 256 bits (`name` is "avx2" or begins
# with "avx512").
CHOOSES_128 = ["-O3", "-UVITDS_PLAIN", "-D__builtin_cpu_supports(name)=0"]
CHOOSES_256 = ["-O3", "-UVITDS_PLAIN", "-D__builtin_cpu_supports(name)=(name[3] == '2')"]
HAS_AVX2 = Path("/proc/cpuinfo").exists() and " avx2 " in Path("/proc/cpuinfo").read_text()
needs_avx2 = pytest.mark.skipif(not HAS_AVX2, reason="no AVX2")


def compile_pixels(out: Path, *options: str) -> None:
    """pixels.c; without its choice among processors, unless the options say otherwise."""
    native = (
        ["-I", str(NATIVE / "include"), "-L", str(NATIVE / "lib"), f"-Wl,-rpath,{NATIVE / 'lib'}"]
        if NATIVE.exists()
        else []
    )
    command = [
        COMPILER,
        "-std=gnu11",
        "-DVITDS_PLAIN",
        "-I",
        str(SOURCE.parent),  # for fuzz.c
        str(SOURCE),
        *options,
        "-o",
        str(out),
        *native,
        "-lturbojpeg",
        "-lm",
    ]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_fuzzed_pictures_specs_and_jpegs_are_clean_under_the_sanitizers(tmp_path: Path) -> None:
    compile_pixels(tmp_path / "fuzz", *SANITIZED)
    first, second = (Image.fromarray(part) for part in photograph_parts(140)[:2])
    first.crop((0, 0, 90, 70)).save(tmp_path / "70x90.jpg")
    second.crop((0, 0, 17, 33)).save(tmp_path / "33x17.jpg", progressive=True)
    second.convert("L").crop((0, 0, 101, 133)).save(tmp_path / "133x101.jpg")
    first.convert("CMYK").crop((0, 0, 40, 40)).save(tmp_path / "40x40.jpg")
    jpegs = sorted(str(path) for path in tmp_path.glob("*.jpg"))
    run = subprocess.run(
        [str(tmp_path / "fuzz"), "4000", "1", *jpegs], capture_output=True, text=True, timeout=100
    )
    assert run.returncode == 0, run.stderr
    made, refused, damaged = map(int, re.findall(r"\d+", run.stdout))
    assert made + refused + damaged == 4000 and made > 2000 and refused > 400 and damaged > 300


def random_specs(pictures: list[np.ndarray], views: int, side: int) -> np.ndarray:
    """(B, views) of VIEW_SPEC with everything on: both filters, colour, blur, policy, flips."""
    random = np.random.default_rng(side)
    specs = np.zeros((len(pictures), views), VIEW_SPEC)
    shape = specs.shape
    for row, picture in zip(specs, pictures, strict=True):
        row["height"], row["width"] = (random.integers(1, size + 1, views) for size in picture.shape[:2])
        row["top"], row["left"] = (
            picture.shape[0] - row["height"],
            random.integers(0, picture.shape[1] - row["width"] + 1),
        )
    specs["resized_height"], specs["resized_width"] = side, side
    for name in ("filter", "flip", "grey", "solarise"):
        specs[name] = random.integers(0, 2, shape)
    specs["colour_order"] = random.permuted(
        np.broadcast_to(np.arange(1, 5, dtype=np.uint8), (*shape, 4)), axis=-1
    )
    for name in ("brightness", "contrast", "saturation"):
        specs[name] = random.uniform(0, 2, shape)
    specs["hue"], specs["blur_sigma"] = random.uniform(-0.5, 0.5, shape), random.uniform(0, 3, shape)
    specs["policy_op"] = random.integers(0, 16, (*shape, 2))
    largest = np.array([0, 0, 20, 2, 0, 8, 0.3, 0.3, 0.45, 0.45, 30, 0, 2, 2, 256, 2])
    specs["policy_value"] = largest[specs["policy_op"]] * random.uniform(0, 1, (*shape, 2))
    specs["cutout_centre"] = random.uniform(0, 1, (*shape, 2))
    return specs


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(NARROW, id="narrow"),
        pytest.param(FUSED, id="fused"),
        pytest.param(CHOOSES_128, id="chooses 128 bits"),
        pytest.param(CHOOSES_256, id="chooses 256 bits", marks=needs_avx2),
    ],
)
def test_every_build_makes_the_same_bytes(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = photographs()[:2] + [part[:37] for part in photograph_parts(91)]
    sizes = [picture.shape[:2] for picture in pictures]
    jobs = [(side, random_specs(pictures, 12, side)) for side in (112, 64, 33, 7)]
    installed = [cut_views(pictures, [RAW] * len(pictures), sizes, specs, side) for side, specs in jobs]
    compile_pixels(tmp_path / "_pixels.so", "-fPIC", "-shared", *options)
    monkeypatch.setattr(kernels, "__file__", str(tmp_path / "views.py"))
    monkeypatch.setattr(kernels, "_idle_scratches", [])
    other: ctypes.CDLL = kernels.library.__wrapped__()
    monkeypatch.setattr(kernels, "library", lambda: other)
    for (side, specs), (views, status) in zip(jobs, installed, strict=True):
        again, status_again = cut_views(pictures, [RAW] * len(pictures), sizes, specs, side)
        assert not status.any() and not status_again.any()
        assert np.array_equal(views, again)
