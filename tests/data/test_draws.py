"""The draws of a view: torchvision's distributions, no state, one key a number."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import ks_2samp, kstest
from torchvision.transforms import CenterCrop, ColorJitter, RandomResizedCrop
from torchvision.transforms import functional as F

from vitds.config.tree import ViewGroup, Views
from vitds.data.draws import centre_views, draw_views
from vitds.kernels.views import BICUBIC, BILINEAR, POLICY_OPS

COUNT = 20_000
# Two samples of 20,000 from one distribution are further from each other with probability 1 %.
CRITICAL = 1.63 * (2 / COUNT) ** 0.5
JITTER = {"colour": 0.8, "brightness": 0.8, "contrast": 0.6, "saturation": 0.4, "hue": 0.2}
IDMM = Views(
    groups=(
        ViewGroup(name="large", views=2, scale=(0.14, 1.0)),
        ViewGroup(name="small", views=4, scale=(0.05, 0.4)),
    ),
    grey=0.2,
    blur=0.5,
    **JITTER,
)


def draw_many(views, height=300, width=400, count=COUNT, seed=0, epoch=0):
    """(count,) rows of VIEW_SPEC: one view of each of `count` images of one size."""
    return draw_views(
        views, np.full(count, height), np.full(count, width), seed=seed, epoch=epoch, images=np.arange(count)
    )[:, 0]


def one_group(low, high, **changes):
    return Views(groups=(ViewGroup(name="only", scale=(low, high)),), **changes)


@pytest.mark.parametrize("scale", [(0.14, 1.0), (0.05, 0.4), (0.08, 1.0)])
@pytest.mark.parametrize(("height", "width"), [(300, 400), (500, 120)])
def test_boxes_are_distributed_as_torchvisions(scale, height, width):
    torch.manual_seed(0)
    picture = torch.empty(3, height, width)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), [3 / 4, 4 / 3]) for _ in range(COUNT)]
    )
    ours = draw_many(one_group(*scale), height, width)
    ours = np.stack([ours[name] for name in ("top", "left", "height", "width")], axis=1)
    quantities = {
        "area": lambda box: box[:, 2] * box[:, 3],
        "aspect": lambda box: box[:, 3] / box[:, 2],
        "top": lambda box: box[:, 0],
        "left": lambda box: box[:, 1],
        "relative top": lambda box: box[:, 0] / np.maximum(height - box[:, 2], 1),
        "relative left": lambda box: box[:, 1] / np.maximum(width - box[:, 3], 1),
    }
    for name, quantity in quantities.items():
        assert ks_2samp(quantity(ours), quantity(theirs)).statistic < CRITICAL, name


def test_jitter_factors_are_distributed_as_torchvisions():
    torch.manual_seed(0)
    jitter = ColorJitter(0.8, 0.6, 0.4, 0.2)
    drawn = [
        ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
        for _ in range(COUNT)
    ]
    ours = draw_many(IDMM)
    for place, name in enumerate(("brightness", "contrast", "saturation", "hue"), start=1):
        assert ks_2samp(ours[name], [row[place] for row in drawn]).statistic < CRITICAL, name


def test_jitter_is_applied_with_its_probability_in_each_of_24_orders_alike():
    orders = Counter(tuple(row) for row in draw_many(IDMM)["colour_order"].tolist())
    skipped = orders.pop((0, 0, 0, 0))
    assert skipped / COUNT == pytest.approx(0.2, abs=0.01)
    assert len(orders) == 24 and all(sorted(order) == [1, 2, 3, 4] for order in orders)
    expected = (COUNT - skipped) / 24
    assert (
        sum((count - expected) ** 2 / expected for count in orders.values()) < 49.7
    )  # chi-squared, 23 degrees of freedom, 0.1 %


def test_an_operation_without_strength_is_left_out_of_the_order():
    rows = draw_many(Views(colour=1.0, contrast=0.5, hue=0.1), count=200)
    assert {tuple(sorted(order)) for order in rows["colour_order"].tolist()} == {(0, 0, 2, 4)}
    rows = draw_many(Views(colour=0.0, contrast=0.5), count=200)
    assert (
        not rows["colour_order"].any() and (rows["contrast"] == 1).all() and (rows["brightness"] == 1).all()
    )


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flip_grey_blur_and_solarise_come_with_their_probabilities(probability):
    rows = draw_many(Views(flip=probability, grey=probability, blur=probability, solarise=probability))
    for name in ("flip", "grey", "blur_sigma", "solarise"):
        assert (rows[name] > 0).mean() == pytest.approx(
            probability, abs=0.01 if 0 < probability < 1 else 0
        ), name


# For each of them, where it shows in a row.
APPLIED = {
    "flip": lambda rows: rows["flip"] == 1,
    "colour": lambda rows: rows["colour_order"].any(axis=-1),
    "grey": lambda rows: rows["grey"] == 1,
    "blur": lambda rows: rows["blur_sigma"] > 0,
    "solarise": lambda rows: rows["solarise"] == 1,
}


def two_groups(**own):
    """Three views, the last one of a group with probabilities of its own."""
    groups = (ViewGroup(name="first", views=2), ViewGroup(name="second", **own))
    return Views(groups=groups, flip=0.5, grey=0.2, blur=0.5, solarise=0.3, **JITTER)


def draw_three(views, count=COUNT):
    return draw_views(views, [300] * count, [400] * count, seed=0, epoch=0, images=np.arange(count))


@pytest.mark.parametrize("name", APPLIED)
def test_a_group_has_its_own_probability_and_the_others_that_of_all(name):
    views = two_groups(**{name: 0.7})
    applied = APPLIED[name](draw_three(views))
    chances = [getattr(views, name)] * 2 + [0.7]
    assert applied.mean(axis=0) == pytest.approx(chances, abs=0.015)


@pytest.mark.parametrize("name", APPLIED)
def test_a_groups_own_probability_changes_nothing_but_its_own_views(name):
    shared, own = draw_three(two_groups(), 500), draw_three(two_groups(**{name: 0.0}), 500)
    np.testing.assert_array_equal(own[:, :2], shared[:, :2])
    assert not APPLIED[name](own[:, 2]).any()
    for other in set(APPLIED) - {name}:
        np.testing.assert_array_equal(APPLIED[other](own), APPLIED[other](shared))


def test_a_group_that_states_the_probabilities_of_all_draws_the_same_numbers():
    stated = two_groups(flip=0.5, colour=0.8, grey=0.2, blur=0.5, solarise=0.3)
    np.testing.assert_array_equal(draw_three(stated, 500), draw_three(two_groups(), 500))


def test_a_probability_that_only_a_group_has_is_drawn_for_that_group():
    views = Views(groups=(ViewGroup(name="first"), ViewGroup(name="second", blur=0.1, solarise=0.2)))
    rows = draw_three(views)
    for name, chance in (("blur", 0.1), ("solarise", 0.2)):
        assert not APPLIED[name](rows[:, 0]).any()
        assert APPLIED[name](rows[:, 1]).mean() == pytest.approx(chance, abs=0.01)


def test_blur_sigma_is_uniform_in_its_range():
    sigma = draw_many(Views(blur=1.0, blur_sigma=(0.1, 2.0)))["blur_sigma"]
    assert kstest(sigma, "uniform", args=(0.1, 1.9)).statistic < 1.63 / COUNT**0.5


def test_views_of_an_image_are_independent_and_follow_their_group():
    spec = draw_views(IDMM, np.full(5000, 256), np.full(5000, 256), seed=0, epoch=0, images=np.arange(5000))
    assert spec.shape == (5000, 6)
    area = spec["height"] * spec["width"] / 256**2
    assert 0.12 < area[:, :2].min() and area[:, :2].max() > 0.95 and area[:, 2:].max() < 0.42
    for first in range(6):
        for second in range(first):
            for name in ("top", "brightness", "hue", "flip"):
                assert abs(np.corrcoef(spec[name][:, first], spec[name][:, second])[0, 1]) < 0.06, (
                    name,
                    first,
                    second,
                )


def test_a_draw_depends_on_seed_epoch_image_and_view_only_not_on_its_batch():
    heights, widths = np.arange(200, 300), np.arange(300, 200, -1)
    whole = draw_views(IDMM, heights, widths, seed=7, epoch=3, images=np.arange(100))
    some = np.array([93, 4, 4, 50])
    np.testing.assert_array_equal(
        draw_views(IDMM, heights[some], widths[some], seed=7, epoch=3, images=some), whole[some]
    )
    many_epochs = draw_views(
        IDMM, heights[some], widths[some], seed=7, epoch=np.array([3, 3, 2, 3]), images=some
    )
    assert [np.array_equal(many_epochs[row], whole[image]) for row, image in enumerate(some)] == [
        True,
        True,
        False,
        True,
    ]
    for seed, epoch in ((7, 4), (8, 3), (3, 7)):
        other = draw_views(IDMM, heights, widths, seed=seed, epoch=epoch, images=np.arange(100))
        assert (other["brightness"] == whole["brightness"]).sum() == 0


def test_stored_draws_have_not_changed():
    """A run repeats itself on any machine and in any later version: these numbers stay."""
    row = draw_views(IDMM, [375], [500], seed=1, epoch=2, images=np.array([5]))[0, 3]
    assert [int(row[name]) for name in ("top", "left", "height", "width", "flip", "grey")] == [
        78,
        17,
        238,
        221,
        0,
        1,
    ]
    assert row["colour_order"].tolist() == [3, 2, 1, 4]
    factors = [row[name] for name in ("brightness", "contrast", "saturation", "hue", "blur_sigma")]
    np.testing.assert_array_equal(
        factors, np.float32([0.43279874, 1.1445453, 1.3062375, -0.043546144, 0.528352])
    )


@given(st.integers(1, 600), st.integers(1, 600), st.integers(0, 10**6))
def test_boxes_lie_in_pictures_of_any_shape(height, width, image):
    spec = draw_views(IDMM, [height], [width], seed=0, epoch=0, images=np.array([image]))[0]
    assert (
        (spec["top"] >= 0).all()
        and (spec["left"] >= 0).all()
        and (spec["height"] > 0).all()
        and (spec["width"] > 0).all()
    )
    assert (spec["top"] + spec["height"] <= height).all() and (spec["left"] + spec["width"] <= width).all()


@pytest.mark.parametrize(
    ("height", "width", "box"), [(1, 50, (0, 24, 1, 1)), (50, 1, (24, 0, 1, 1)), (10, 500, (0, 243, 10, 13))]
)
def test_a_picture_too_long_for_any_box_gives_the_central_one_as_torchvision(height, width, box):
    row = draw_many(one_group(0.9, 1.0), height, width, count=1)[0]
    assert tuple(int(row[name]) for name in ("top", "left", "height", "width")) == box
    assert RandomResizedCrop.get_params(torch.empty(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3]) == box


def test_the_filter_and_size_of_the_recipe_are_in_the_spec():
    for name, code in (("bilinear", BILINEAR), ("bicubic", BICUBIC)):
        rows = draw_many(Views(crop_px=96, filter=name), count=3)
        assert (
            (rows["filter"] == code).all()
            and (rows["resized_height"] == 96).all()
            and (rows["resized_width"] == 96).all()
        )
        assert not rows["out_top"].any() and not rows["out_left"].any()


@given(st.integers(1, 700), st.integers(1, 700), st.sampled_from([32, 64, 112, 224, 448]))
def test_the_evaluation_view_is_torchvisions_resize_and_centre_crop(height, width, crop_px):
    if max(height, width) > 50 * min(height, width):
        return
    row = centre_views(crop_px, [height], [width])[0, 0]
    size = F._compute_resized_output_size((height, width), [round(crop_px * 256 / 224)])
    assert [int(row["resized_height"]), int(row["resized_width"])] == size
    corner = torch.arange(size[0])[:, None] * 100_000 + torch.arange(size[1])
    first = int(CenterCrop(crop_px)(corner[None])[0, 0, 0])
    assert (first // 100_000, first % 100_000) == (row["out_top"], row["out_left"])
    assert (int(row["height"]), int(row["width"]), int(row["filter"])) == (height, width, BICUBIC)


@pytest.mark.parametrize(("height", "width"), [(1, 60_000), (60_000, 1), (2, 1000)])
def test_the_evaluation_of_a_very_long_picture_sees_its_central_part(height, width):
    row = centre_views(448, [height], [width])[0, 0]
    assert max(row["resized_height"], row["resized_width"]) <= 65_535
    assert (
        abs(2 * row["top"] + row["height"] - height) <= 1 and abs(2 * row["left"] + row["width"] - width) <= 1
    )


POLICY = draw_many(Views(policy="randaugment"), count=40_000)


def policy_values(name):
    return POLICY["policy_value"][POLICY["policy_op"] == POLICY_OPS.index(name)]


def test_policy_takes_two_of_fifteen_operations_alike_each_with_probability_one_half():
    counts = np.bincount(POLICY["policy_op"].ravel(), minlength=16)
    assert counts[0] / 80_000 == pytest.approx(0.5, abs=0.01)
    expected = counts[1:].sum() / 15
    assert ((counts[1:] - expected) ** 2 / expected).sum() < 36.1  # chi-squared, 14 degrees of freedom, 0.1 %
    both = (POLICY["policy_op"] > 0).all(axis=1).mean()
    assert both == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("posterize", {8, 7, 6, 5, 4}),
        ("cutout", {2, 4, 7, 9, 11, 13, 16, 18, 20}),
        ("rotate", set(np.float32([30 / 9 * m for m in range(1, 10)]))),
        ("solarize", set(np.float32([256 - 256 / 9 * m for m in range(1, 10)]))),
        ("shear_x", set(np.float32([sign * 0.3 / 9 * m for m in range(1, 10) for sign in (-1, 1)]))),
        (
            "translate_y",
            set(np.float32([sign * 150 / 331 / 9 * m for m in range(1, 10) for sign in (-1, 1)])),
        ),
        ("contrast", set(np.float32([1 + sign * m / 10 for m in range(1, 10) for sign in (-1, 1)]))),
    ],
)
def test_policy_magnitudes_are_the_methods(name, values):
    np.testing.assert_allclose(sorted(set(policy_values(name))), sorted(values), atol=1e-6)


def test_policy_signs_are_even_and_the_cutout_centre_uniform():
    assert (policy_values("shear_x") > 0).mean() == pytest.approx(0.5, abs=0.05)
    for axis in range(2):
        assert kstest(POLICY["cutout_centre"][:, axis], "uniform").statistic < 1.63 / 40_000**0.5
