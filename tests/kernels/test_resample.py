"""Resizing against PIL and the plain reference, for boxes of every shape, and no byte outside the buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tests.kernels import reference
from tests.kernels.pictures import FILTERS, assert_close, cut, photographs, whole_spec
from vitds.kernels.views import RAW, VIEW_SPEC, cut_stored

SIDE = 112
NAMES = sorted(FILTERS)


def random_boxes(picture: np.ndarray, count: int, *, flat: bool = False) -> np.ndarray:
    """(count,) of VIEW_SPEC: boxes as random-resized cropping draws them; flat: none higher than wide."""
    random = np.random.default_rng(picture.shape[1])
    specs = np.repeat(whole_spec(*picture.shape[:2], SIDE), count)
    for spec in specs:
        share, ratio = (
            random.uniform(0.05, 1.0),
            np.exp(random.uniform(np.log(1 if flat else 3 / 4), np.log(4 / 3))),
        )
        spec["width"] = min(np.sqrt(picture.size / 3 * share * ratio), picture.shape[1])
        spec["height"] = min(
            np.sqrt(picture.size / 3 * share / ratio), picture.shape[0], *([spec["width"]] if flat else [])
        )
        spec["top"] = random.integers(picture.shape[0] - spec["height"] + 1)
        spec["left"] = random.integers(picture.shape[1] - spec["width"] + 1)
    return specs


def box_of(picture: np.ndarray, spec: np.void) -> np.ndarray:
    return picture[spec["top"] : spec["top"] + spec["height"], spec["left"] : spec["left"] + spec["width"]]


@pytest.mark.parametrize("name", NAMES)
def test_crops_of_photographs_are_pils_within_two_levels(name: str) -> None:
    # Pillow 13 sums bicubic boxes that are higher than wide in the other order, which shows where it
    # overshoots: left out here, and covered by the comparison with the reference below.
    got, wanted = [], []
    for picture in photographs():
        specs = random_boxes(picture, 6, flat=name == "bicubic")
        specs["filter"] = FILTERS[name][0]
        got.append(cut(picture, specs, SIDE))
        wanted.append(
            [
                np.asarray(Image.fromarray(box_of(picture, spec)).resize((SIDE, SIDE), FILTERS[name][1]))
                for spec in specs
            ]
        )
    assert_close(
        np.concatenate(got), np.concatenate(wanted).astype(float), mean=0.2, percentile_99=1, largest=2
    )


@pytest.mark.parametrize("name", NAMES)
def test_crops_of_photographs_are_torchvisions_float_crops(name: str) -> None:
    for picture in photographs()[:8]:
        specs = random_boxes(picture, 4)
        specs["filter"] = FILTERS[name][0]
        for view, spec in zip(cut(picture, specs, SIDE), specs, strict=True):
            levels = torch.from_numpy(box_of(picture, spec).astype(np.float32)).permute(2, 0, 1)
            wanted = F.resize(levels, [SIDE, SIDE], F.InterpolationMode(name), antialias=True).clamp(0, 255)
            assert_close(
                view, wanted.permute(1, 2, 0).double().numpy(), mean=0.5, percentile_99=2, largest=20
            )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """A picture of noise, one spec, the side of its view: every shape, position, window, filter and flip."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    picture = np.random.default_rng(draw(st.integers(0, 999))).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    spec = np.zeros(1, VIEW_SPEC)
    spec["height"], spec["width"] = draw(st.integers(1, height)), draw(st.integers(1, width))
    spec["top"], spec["left"] = (
        draw(st.integers(0, height - spec["height"][0])),
        draw(st.integers(0, width - spec["width"][0])),
    )
    spec["resized_height"], spec["resized_width"] = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    side = draw(st.integers(1, int(min(spec["resized_height"][0], spec["resized_width"][0]))))
    spec["out_top"] = draw(st.integers(0, spec["resized_height"][0] - side))
    spec["out_left"] = draw(st.integers(0, spec["resized_width"][0] - side))
    spec["filter"], spec["flip"] = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    return picture, spec, side


def assert_is_reference(picture: np.ndarray, spec: np.ndarray, side: int) -> None:
    row = spec[0]
    box = box_of(picture, row).astype(float)
    wanted = reference.resize(
        box, row["resized_height"], row["resized_width"], ("bilinear", "bicubic")[row["filter"]]
    )
    wanted = wanted[row["out_top"] : row["out_top"] + side, row["out_left"] : row["out_left"] + side]
    view = cut(picture, spec, side)[0]
    view = view[:, ::-1] if row["flip"] else view
    apart = np.abs(view - np.clip(wanted, 0, 255))
    assert apart.max() <= (2 if row["filter"] else 3) and apart.mean() <= 1


@settings(max_examples=500, deadline=None)
@given(cases())
def test_any_box_window_filter_and_flip_is_the_reference(case: tuple[np.ndarray, np.ndarray, int]) -> None:
    assert_is_reference(*case)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("height", "width", "side"),
    [
        (1, 1, 9),
        (1, 50, 16),
        (50, 1, 16),
        (13, 650, 17),
        (650, 13, 17),
        (7, 11, 112),
        (97, 89, 31),
        (900, 40, 16),
        (3, 1200, 8),
    ],
)
def test_extreme_shapes_are_the_reference(height: int, width: int, side: int, name: str) -> None:
    picture = np.random.default_rng(height).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert_is_reference(picture, whole_spec(height, width, side, filter=FILTERS[name][0]), side)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_window_is_cut_from_the_whole_resized_picture(name: str) -> None:
    picture = photographs()[0]  # 427 x 640; short side to 64, centre 56
    spec = whole_spec(
        427, 640, 56, resized_height=64, resized_width=96, out_top=4, out_left=20, filter=FILTERS[name][0]
    )
    whole = Image.fromarray(picture).resize((96, 64), FILTERS[name][1]).crop((20, 4, 76, 60))
    assert_close(
        cut(picture, spec, 56)[0], np.asarray(whole).astype(float), mean=0.2, percentile_99=1, largest=2
    )


@pytest.mark.parametrize("side", [16, 33, 112])
@pytest.mark.parametrize("name", NAMES)
def test_flip_is_the_mirror_image_byte_for_byte(name: str, side: int) -> None:
    picture = photographs()[1]
    specs = np.repeat(whole_spec(*picture.shape[:2], side, filter=FILTERS[name][0]), 2)
    specs["flip"] = 0, 1
    plain, flipped = cut(picture, specs, side)
    assert np.array_equal(flipped, plain[:, ::-1])


def test_an_even_picture_stays_even_at_any_size() -> None:
    for level in (0, 1, 127, 254, 255):
        picture = np.full((37, 53, 3), level, np.uint8)
        for side in (5, 37, 111):
            assert (cut(picture, whole_spec(37, 53, side), side) == level).all()


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 255), st.sampled_from([0.0, 0.4, 1.7]), st.integers(0, 15))
@example((np.zeros((1, 1, 3), np.uint8), whole_spec(1, 1, 1), 1), 7, 1.7, 10)
def test_nothing_outside_the_buffers_is_written_or_matters(
    case: tuple, guard: int, sigma: float, policy_op: int
) -> None:
    picture, spec, side = case
    spec = spec.copy()
    spec["blur_sigma"], spec["policy_op"], spec["policy_value"] = sigma, (policy_op, 3), 1
    results = []
    for filling in (guard, 255 - guard):
        stored = np.full(picture.size + 2 * 512, filling, np.uint8)
        stored[512:-512] = picture.ravel()
        out = np.full(3 * side * side + 2 * 512, filling, np.uint8)
        place, status = np.array([stored.ctypes.data + 512]), np.ones(1, np.int32)
        views = out[512:-512].reshape(1, 1, 3, side, side)
        storage, height, width = np.array([[RAW], *([size] for size in picture.shape[:2])], np.int32)
        cut_stored(place, np.array([picture.size]), storage, height, width, spec[None], views, status)
        assert status.tolist() == [0]
        assert (out[:512] == filling).all() and (out[-512:] == filling).all()
        assert np.array_equal(stored[512:-512], picture.ravel())
        results.append(out[512:-512].copy())
    assert np.array_equal(*results)
