"""Resizing: against PIL on photographs, against the plain reference on boxes of every shape, and without a byte outside the buffers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from torchvision.transforms.v2 import functional as F

from tests.kernels import reference
from tests.kernels.pictures import FILTERS, assert_close, cut, photographs, whole_plan
from vitds.kernels.views import RAW, VIEW_PLAN, library, scratch

SIDE = 112
NAMES = sorted(FILTERS)


def random_boxes(picture: np.ndarray, count: int, *, flat: bool = False) -> np.ndarray:
    """(count,) of VIEW_PLAN: boxes as random-resized cropping draws them; flat: none higher than wide."""
    random = np.random.default_rng(picture.shape[1])
    plans = np.repeat(whole_plan(*picture.shape[:2], SIDE), count)
    for plan in plans:
        share, ratio = (
            random.uniform(0.05, 1.0),
            np.exp(random.uniform(np.log(1 if flat else 3 / 4), np.log(4 / 3))),
        )
        plan["width"] = min(np.sqrt(picture.size / 3 * share * ratio), picture.shape[1])
        plan["height"] = min(
            np.sqrt(picture.size / 3 * share / ratio), picture.shape[0], *([plan["width"]] if flat else [])
        )
        plan["top"] = random.integers(picture.shape[0] - plan["height"] + 1)
        plan["left"] = random.integers(picture.shape[1] - plan["width"] + 1)
    return plans


def box_of(picture: np.ndarray, plan: np.void) -> np.ndarray:
    return picture[plan["top"] : plan["top"] + plan["height"], plan["left"] : plan["left"] + plan["width"]]


@pytest.mark.parametrize("name", NAMES)
def test_crops_of_photographs_are_pils_within_two_levels(name: str) -> None:
    # Pillow 13 sums bicubic boxes that are higher than wide in the other order, which shows where it overshoots: left out here,
    # and covered by the comparison with the reference below.
    got, wanted = [], []
    for picture in photographs():
        plans = random_boxes(picture, 6, flat=name == "bicubic")
        plans["filter"] = FILTERS[name][0]
        got.append(cut(picture, plans, SIDE))
        wanted.append(
            [
                np.asarray(Image.fromarray(box_of(picture, plan)).resize((SIDE, SIDE), FILTERS[name][1]))
                for plan in plans
            ]
        )
    assert_close(
        np.concatenate(got), np.concatenate(wanted).astype(float), mean=0.2, percentile_99=1, largest=2
    )


@pytest.mark.parametrize("name", NAMES)
def test_crops_of_photographs_are_torchvisions_float_crops(name: str) -> None:
    for picture in photographs()[:8]:
        plans = random_boxes(picture, 4)
        plans["filter"] = FILTERS[name][0]
        for view, plan in zip(cut(picture, plans, SIDE), plans, strict=True):
            levels = torch.from_numpy(box_of(picture, plan).astype(np.float32)).permute(2, 0, 1)
            wanted = F.resize(levels, [SIDE, SIDE], F.InterpolationMode(name), antialias=True).clamp(0, 255)
            assert_close(
                view, wanted.permute(1, 2, 0).double().numpy(), mean=0.5, percentile_99=2, largest=20
            )


@st.composite
def cases(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, int]:
    """A picture of noise, one plan, and the side of its view: every shape, position, window, filter and flip."""
    height, width = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    picture = np.random.default_rng(draw(st.integers(0, 999))).integers(
        0, 256, (height, width, 3), dtype=np.uint8
    )
    plan = np.zeros(1, VIEW_PLAN)
    plan["height"], plan["width"] = draw(st.integers(1, height)), draw(st.integers(1, width))
    plan["top"], plan["left"] = (
        draw(st.integers(0, height - plan["height"][0])),
        draw(st.integers(0, width - plan["width"][0])),
    )
    plan["resized_height"], plan["resized_width"] = draw(st.integers(1, 60)), draw(st.integers(1, 60))
    side = draw(st.integers(1, int(min(plan["resized_height"][0], plan["resized_width"][0]))))
    plan["out_top"] = draw(st.integers(0, plan["resized_height"][0] - side))
    plan["out_left"] = draw(st.integers(0, plan["resized_width"][0] - side))
    plan["filter"], plan["flip"] = draw(st.integers(0, 1)), draw(st.integers(0, 1))
    return picture, plan, side


def assert_is_reference(picture: np.ndarray, plan: np.ndarray, side: int) -> None:
    row = plan[0]
    box = box_of(picture, row).astype(float)
    wanted = reference.resize(
        box, row["resized_height"], row["resized_width"], ("bilinear", "bicubic")[row["filter"]]
    )
    wanted = wanted[row["out_top"] : row["out_top"] + side, row["out_left"] : row["out_left"] + side]
    view = cut(picture, plan, side)[0]
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
    assert_is_reference(picture, whole_plan(height, width, side, filter=FILTERS[name][0]), side)


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_window_is_cut_from_the_whole_resized_picture(name: str) -> None:
    picture = photographs()[0]  # 427 x 640; short side to 64, centre 56
    plan = whole_plan(
        427, 640, 56, resized_height=64, resized_width=96, out_top=4, out_left=20, filter=FILTERS[name][0]
    )
    whole = Image.fromarray(picture).resize((96, 64), FILTERS[name][1]).crop((20, 4, 76, 60))
    assert_close(
        cut(picture, plan, 56)[0], np.asarray(whole).astype(float), mean=0.2, percentile_99=1, largest=2
    )


@pytest.mark.parametrize("side", [16, 33, 112])
@pytest.mark.parametrize("name", NAMES)
def test_flip_is_the_mirror_image_byte_for_byte(name: str, side: int) -> None:
    picture = photographs()[1]
    plans = np.repeat(whole_plan(*picture.shape[:2], side, filter=FILTERS[name][0]), 2)
    plans["flip"] = 0, 1
    plain, flipped = cut(picture, plans, side)
    assert np.array_equal(flipped, plain[:, ::-1])


def test_an_even_picture_stays_even_at_any_size() -> None:
    for level in (0, 1, 127, 254, 255):
        picture = np.full((37, 53, 3), level, np.uint8)
        for side in (5, 37, 111):
            assert (cut(picture, whole_plan(37, 53, side), side) == level).all()


@settings(max_examples=200, deadline=None)
@given(cases(), st.integers(0, 255), st.sampled_from([0.0, 0.4, 1.7]), st.integers(0, 15))
@example((np.zeros((1, 1, 3), np.uint8), whole_plan(1, 1, 1), 1), 7, 1.7, 10)
def test_nothing_outside_the_buffers_is_written_or_matters(
    case: tuple, guard: int, sigma: float, policy_op: int
) -> None:
    picture, plan, side = case
    plan = plan.copy()
    plan["blur_sigma"], plan["policy_op"], plan["policy_value"] = sigma, (policy_op, 3), 1
    results = []
    for filling in (guard, 255 - guard):
        stored = np.full(picture.size + 2 * 512, filling, np.uint8)
        stored[512:-512] = picture.ravel()
        out = np.full(3 * side * side + 2 * 512, filling, np.uint8)
        with scratch() as memory:
            source, views = stored.ctypes.data + 512, out.ctypes.data + 512
            size = picture.shape[:2]
            code = library().vitds_views(
                source, picture.size, RAW, *size, plan.ctypes.data, 1, side, views, 3 * side * side, memory
            )
        assert code == 0
        assert (out[:512] == filling).all() and (out[-512:] == filling).all()
        assert np.array_equal(stored[512:-512], picture.ravel())
        results.append(out[512:-512].copy())
    assert np.array_equal(*results)
