"""The fifteen operations of the policy against the plain reference, PIL and torchvision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from tests.kernels import reference
from tests.kernels.pictures import assert_close, cut, photograph_parts, policy, whole_spec
from tests.kernels.test_colour import torchvision_float
from vitds.kernels.views import POLICY_OPS

SIDE = 96
FILL = (128, 128, 128)
AFFINE, BICUBIC = Image.Transform.AFFINE, Image.Resampling.BICUBIC
Pil = Callable[[Image.Image], Image.Image]

EXACT_IN_PIL: list[tuple[str, float, Pil]] = [
    ("invert", 0, ImageOps.invert),
    ("posterize", 8, lambda image: ImageOps.posterize(image, 8)),
    ("posterize", 4, lambda image: ImageOps.posterize(image, 4)),
    ("solarize", 256, lambda image: ImageOps.solarize(image, 256)),
    ("solarize", 113.8, lambda image: ImageOps.solarize(image, 113.8)),
    ("solarize", 0, lambda image: ImageOps.solarize(image, 0)),
    ("equalize", 0, ImageOps.equalize),
    ("rotate", 17, lambda image: image.rotate(17, fillcolor=FILL)),
    ("rotate", 30, lambda image: image.rotate(30, fillcolor=FILL)),
    (
        "translate_x",
        0.31,
        lambda image: image.transform(image.size, AFFINE, (1, 0, 0.31 * SIDE, 0, 1, 0), fillcolor=FILL),
    ),
    (
        "translate_x",
        -0.2,
        lambda image: image.transform(image.size, AFFINE, (1, 0, -0.2 * SIDE, 0, 1, 0), fillcolor=FILL),
    ),
    (
        "translate_y",
        0.31,
        lambda image: image.transform(image.size, AFFINE, (1, 0, 0, 0, 1, 0.31 * SIDE), fillcolor=FILL),
    ),
    (
        "translate_y",
        -0.2,
        lambda image: image.transform(image.size, AFFINE, (1, 0, 0, 0, 1, -0.2 * SIDE), fillcolor=FILL),
    ),
]
NEAR_PIL: list[tuple[str, float, Pil]] = [
    ("autocontrast", 0, ImageOps.autocontrast),
    ("sharpness", 0.2, lambda image: ImageEnhance.Sharpness(image).enhance(0.2)),
    ("sharpness", 1.9, lambda image: ImageEnhance.Sharpness(image).enhance(1.9)),
    ("contrast", 0.2, lambda image: ImageEnhance.Contrast(image).enhance(0.2)),
    ("contrast", 1.9, lambda image: ImageEnhance.Contrast(image).enhance(1.9)),
    ("colour", 0.2, lambda image: ImageEnhance.Color(image).enhance(0.2)),
    ("colour", 1.9, lambda image: ImageEnhance.Color(image).enhance(1.9)),
    ("brightness", 0.2, lambda image: ImageEnhance.Brightness(image).enhance(0.2)),
    ("brightness", 1.9, lambda image: ImageEnhance.Brightness(image).enhance(1.9)),
    (
        "shear_x",
        0.3,
        lambda image: image.transform(image.size, AFFINE, (1, 0.3, 0, 0, 1, 0), BICUBIC, fillcolor=FILL),
    ),
    (
        "shear_x",
        -0.1,
        lambda image: image.transform(image.size, AFFINE, (1, -0.1, 0, 0, 1, 0), BICUBIC, fillcolor=FILL),
    ),
    (
        "shear_y",
        0.3,
        lambda image: image.transform(image.size, AFFINE, (1, 0, 0, 0.3, 1, 0), BICUBIC, fillcolor=FILL),
    ),
    (
        "shear_y",
        -0.1,
        lambda image: image.transform(image.size, AFFINE, (1, 0, 0, -0.1, 1, 0), BICUBIC, fillcolor=FILL),
    ),
]
REFERENCE_NAMES = {"colour": "saturation"}
WITHOUT_VALUE = ("invert", "autocontrast", "equalize")


def run(picture: np.ndarray, name: str, value: float, **fields: Any) -> np.ndarray:
    side = len(picture)
    return cut(picture, whole_spec(side, side, side, **policy(name, value), **fields), side)[0]


def wanted_by_reference(picture: np.ndarray, name: str, value: float) -> np.ndarray:
    operation = getattr(reference, REFERENCE_NAMES.get(name, name))
    levels = picture.astype(float)
    if name in WITHOUT_VALUE:
        return operation(levels)
    return operation(levels, int(value), (0.5, 0.5)) if name == "cutout" else operation(levels, value)


@pytest.mark.parametrize(("name", "value", "pil"), EXACT_IN_PIL)
def test_operation_is_pils_level_for_level(name: str, value: float, pil: Pil) -> None:
    for picture in photograph_parts(SIDE):
        assert np.array_equal(run(picture, name, value), np.asarray(pil(Image.fromarray(picture))))


@pytest.mark.parametrize(("name", "value", "pil"), NEAR_PIL)
def test_operation_is_pils_within_two_levels(name: str, value: float, pil: Pil) -> None:
    # PIL cuts fractions off, of the mean grey and of each level, where the kernels round.
    for picture in photograph_parts(SIDE):
        wanted = np.asarray(pil(Image.fromarray(picture))).astype(float)
        assert_close(run(picture, name, value), wanted, mean=0.85, percentile_99=2, largest=2)


@pytest.mark.parametrize(
    ("name", "value", "operation"),
    [
        ("invert", 0, F.invert),
        ("sharpness", 0.3, lambda x: F.adjust_sharpness(x, 0.3)),
        ("sharpness", 1.8, lambda x: F.adjust_sharpness(x, 1.8)),
        ("autocontrast", 0, F.autocontrast),
        ("solarize", 113.8, lambda x: F.solarize(x, 113.8 / 255)),
        ("contrast", 1.7, lambda x: F.adjust_contrast(x, 1.7)),
        ("colour", 1.7, lambda x: F.adjust_saturation(x, 1.7)),
        ("brightness", 1.7, lambda x: F.adjust_brightness(x, 1.7)),
    ],
)
def test_operation_is_torchvisions_in_float(name: str, value: float, operation: Callable) -> None:
    for picture in photograph_parts(SIDE):
        assert_close(
            run(picture, name, value),
            torchvision_float(operation, picture),
            mean=0.5,
            percentile_99=2,
            largest=2,
        )


RANGES = {
    "invert": (0, 0),
    "cutout": (0, 60),
    "sharpness": (0, 3),
    "autocontrast": (0, 0),
    "posterize": (0, 8),
    "shear_x": (-2, 2),
    "shear_y": (-2, 2),
    "translate_x": (-2, 2),
    "translate_y": (-2, 2),
    "rotate": (-360, 360),
    "equalize": (0, 0),
    "contrast": (0, 3),
    "colour": (0, 3),
    "solarize": (0, 256),
    "brightness": (0, 3),
}


def test_every_operation_is_compared_with_the_reference() -> None:
    assert set(RANGES) == set(POLICY_OPS[1:])


@settings(max_examples=300, deadline=None)
@given(st.integers(1, 40), st.integers(0, 999), st.sampled_from(sorted(RANGES)), st.floats(0, 1))
def test_any_operation_value_and_side_is_the_reference(side: int, seed: int, name: str, share: float) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    low, high = RANGES[name]
    value = float(np.float32(low + share * (high - low)))
    value = float(int(value)) if name == "posterize" else value
    apart = np.abs(run(picture, name, value) - wanted_by_reference(picture, name, value))
    if name == "rotate":  # a pixel may come from the neighbour where sine and cosine are rounded differently
        assert (apart > 0).mean() <= 0.01
    else:
        assert apart.max() <= 2


@pytest.mark.parametrize("centre", [(0.0, 0.0), (0.5, 0.5), (0.99, 0.1), (1.0, 1.0)])
@pytest.mark.parametrize("square", [0, 2, 7, 20])
def test_cutout_fills_a_square_clipped_at_the_edges(square: int, centre: tuple[float, float]) -> None:
    picture = photograph_parts(SIDE)[0]
    view = cut(picture, whole_spec(SIDE, SIDE, SIDE, **policy("cutout", square, centre)), SIDE)[0]
    assert np.array_equal(view, reference.cutout(picture.astype(float), square, centre))


def test_two_operations_follow_each_other() -> None:
    picture = photograph_parts(SIDE)[0]
    spec = whole_spec(
        SIDE,
        SIDE,
        SIDE,
        policy_op=(POLICY_OPS.index("rotate"), POLICY_OPS.index("solarize")),
        policy_value=(20, 100),
    )
    assert np.array_equal(cut(picture, spec, SIDE)[0], run(run(picture, "rotate", 20), "solarize", 100))


@pytest.mark.parametrize("name", POLICY_OPS[1:])
def test_flip_comes_after_the_policy(name: str) -> None:
    picture = photograph_parts(SIDE)[0]
    value = 6 if name == "posterize" else 20 if name in ("cutout", "rotate") else 0.4
    fields = {"flip": 1, **colour_fields()}
    assert np.array_equal(
        run(picture, name, value, **fields), run(picture, name, value, **colour_fields())[:, ::-1]
    )


def colour_fields() -> dict[str, Any]:
    return {
        "colour_order": (4, 2, 1, 3),
        "brightness": 0.9,
        "contrast": 1.2,
        "saturation": 0.6,
        "hue": 0.1,
        "blur_sigma": 0.8,
    }
