"""Jitter, grey, blur and solarise against the plain reference and torchvision, on photographs and noise."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from tests.kernels import reference
from tests.kernels.pictures import assert_close, colour, cut, photograph_parts, policy, whole_spec
from vitds.kernels.views import COLOUR_OPS

SIDE = 112
FACTORS = (0.0, 0.2, 0.73, 1.0, 1.31, 1.8)
TURNS = (-0.5, -0.2, -0.07, 0.0, 0.004, 0.13, 0.2, 0.5)
TORCHVISION: dict[str, Callable[[Tensor, float], Tensor]] = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
    "hue": F.adjust_hue,
}
OPERATIONS = [(name, value) for name in TORCHVISION for value in (TURNS if name == "hue" else FACTORS)]


def torchvision_float(operation: Callable[[Tensor], Tensor], picture: np.ndarray) -> np.ndarray:
    """A float operation of torchvision on levels 0 to 255."""
    levels = torch.from_numpy(picture.astype(np.float32) / 255).permute(2, 0, 1)
    return operation(levels).permute(1, 2, 0).double().numpy() * 255


def gaussian_blur(levels: Tensor, sigma: float) -> Tensor:
    return F.gaussian_blur(levels, [2 * math.ceil(3 * np.float32(sigma)) + 1] * 2, [sigma] * 2)


@pytest.mark.parametrize(("name", "value"), OPERATIONS)
def test_jitter_of_photographs_is_the_reference_and_torchvisions(name: str, value: float) -> None:
    for picture in photograph_parts(SIDE):
        view = cut(picture, whole_spec(SIDE, SIDE, SIDE, **colour(name, value)), SIDE)[0]
        assert_close(
            view, getattr(reference, name)(picture.astype(float), value), mean=0.5, percentile_99=2, largest=2
        )
        assert_close(
            view,
            torchvision_float(lambda x: TORCHVISION[name](x, value), picture),
            mean=0.5,
            percentile_99=2,
            largest=2,
        )


@pytest.mark.parametrize(
    ("name", "value"), [("brightness", 1.0), ("contrast", 1.0), ("saturation", 1.0), ("hue", 0.0)]
)
def test_neutral_values_change_nothing(name: str, value: float) -> None:
    every_colour = np.array(list(itertools.product(range(0, 256, 5), repeat=3)), np.uint8)[
        : 364 * 364
    ].reshape(364, 364, 3)
    assert np.array_equal(
        cut(every_colour, whole_spec(364, 364, 364, **colour(name, value)), 364)[0], every_colour
    )


@pytest.mark.parametrize("turns", TURNS)
def test_hue_of_all_colours_is_the_reference(turns: float) -> None:
    levels = np.r_[0:256:7, 1, 2, 254, 255]
    colours = np.array(list(itertools.product(levels, repeat=3)), np.uint8)
    side = math.ceil(len(colours) ** 0.5)
    colours = np.resize(colours, (side, side, 3))
    view = cut(colours, whole_spec(side, side, side, **colour("hue", turns)), side)[0]
    assert_close(view, reference.hue(colours.astype(float), turns), mean=0.5, percentile_99=0.6, largest=0.7)


def test_greyscale_is_the_reference_and_torchvisions() -> None:
    for picture in photograph_parts(SIDE):
        view = cut(picture, whole_spec(SIDE, SIDE, SIDE, grey=1), SIDE)[0]
        assert_close(view, reference.greyscale(picture.astype(float)), mean=0.5, percentile_99=1, largest=1.1)
        assert_close(
            view,
            torchvision_float(lambda x: F.rgb_to_grayscale(x, 3), picture),
            mean=0.5,
            percentile_99=1,
            largest=1.1,
        )


@pytest.mark.parametrize("sigma", [0.1, 0.34, 0.7, 1.0, 1.37, 2.0, 5.0, 32 / 3])
def test_blur_of_photographs_is_the_reference_and_torchvisions(sigma: float) -> None:
    for picture in photograph_parts(SIDE):
        view = cut(picture, whole_spec(SIDE, SIDE, SIDE, blur_sigma=sigma), SIDE)[0]
        assert_close(view, reference.blur(picture.astype(float), sigma), mean=0.5, percentile_99=2, largest=3)
        assert_close(
            view,
            torchvision_float(lambda x: gaussian_blur(x, sigma), picture),
            mean=0.5,
            percentile_99=2,
            largest=3,
        )


def test_solarise_is_the_reference_and_pils_level_for_level() -> None:
    for picture in photograph_parts(SIDE):
        view = cut(picture, whole_spec(SIDE, SIDE, SIDE, solarise=1), SIDE)[0]
        assert np.array_equal(view, reference.solarize(picture.astype(float), 128))
        assert np.array_equal(view, np.asarray(ImageOps.solarize(Image.fromarray(picture), 128)))


def test_solarise_comes_between_blur_and_policy() -> None:
    picture = photograph_parts(48)[0]
    blurred = cut(picture, whole_spec(48, 48, 48, blur_sigma=1.0), 48)[0]
    solarised = cut(blurred, whole_spec(48, 48, 48, solarise=1), 48)[0]
    wanted = cut(solarised, whole_spec(48, 48, 48, **policy("brightness", 1.5)), 48)[0]
    together = whole_spec(48, 48, 48, blur_sigma=1.0, solarise=1, **policy("brightness", 1.5))
    assert np.array_equal(cut(picture, together, 48)[0], wanted)


@pytest.mark.parametrize("order", list(itertools.permutations(range(1, 5)))[::3])
def test_the_whole_chain_in_any_order_is_torchvisions(order: tuple[int, ...]) -> None:
    values = {"brightness": 0.7, "contrast": 1.3, "saturation": 1.5, "hue": -0.12}
    apart = []
    for picture in photograph_parts(SIDE):
        view = cut(picture, whole_spec(SIDE, SIDE, SIDE, colour_order=order, blur_sigma=1.2, **values), SIDE)[
            0
        ]

        def chain(levels: Tensor) -> Tensor:
            for index in order:
                levels = TORCHVISION[COLOUR_OPS[index]](levels, values[COLOUR_OPS[index]])
            return gaussian_blur(levels, 1.2)

        apart.append(np.abs(view - torchvision_float(chain, picture)))
    assert np.mean(apart) <= 0.5 and np.percentile(apart, 99) <= 3


def test_operations_apply_in_the_specs_order() -> None:
    picture = photograph_parts(48)[0]
    steps = [picture]
    for name, value in (("contrast", 1.6), ("brightness", 1.5), ("hue", 0.2), ("saturation", 0.3)):
        steps.append(cut(steps[-1], whole_spec(48, 48, 48, **colour(name, value)), 48)[0])
    grey = cut(steps[-1], whole_spec(48, 48, 48, grey=1), 48)[0]
    wanted = cut(grey, whole_spec(48, 48, 48, blur_sigma=1.0), 48)[0]
    together = whole_spec(
        48,
        48,
        48,
        colour_order=(2, 1, 4, 3),
        brightness=1.5,
        contrast=1.6,
        saturation=0.3,
        hue=0.2,
        grey=1,
        blur_sigma=1.0,
    )
    assert np.array_equal(cut(picture, together, 48)[0], wanted)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(0, 999), st.sampled_from(OPERATIONS), st.floats(0.05, 10))
def test_any_side_is_the_reference(side: int, seed: int, operation: tuple[str, float], sigma: float) -> None:
    picture = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    name, value = operation
    view = cut(picture, whole_spec(side, side, side, **colour(name, value)), side)[0]
    assert np.abs(view - getattr(reference, name)(picture.astype(float), value)).max() <= 2
    radius = math.ceil(3 * np.float32(sigma))
    if radius < side:  # NumPy mirrors a narrower picture as the kernel does, torchvision refuses
        blurred = cut(picture, whole_spec(side, side, side, blur_sigma=sigma), side)[0]
        assert np.abs(blurred - reference.blur(picture.astype(float), sigma)).max() <= 8
