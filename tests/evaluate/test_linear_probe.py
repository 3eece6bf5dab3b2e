"""The linear probe: what it fits, what chooses its regularisation, and small or lopsided sets."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from vitds.errors import NumericsError, ShapeError
from vitds.evaluate.linear import STRENGTHS, draw_held_out, linear_probe
from vitds.rng import Purpose


@pytest.fixture(scope="module")
def digits():
    pixels, label = load_digits(return_X_y=True)
    pixels, label = torch.from_numpy(pixels).float(), torch.from_numpy(label)
    return pixels[::2], label[::2], pixels[1::2], label[1::2]


@pytest.fixture(scope="module")
def digits_score(digits):
    return linear_probe(*digits, seed=0)


def small_set(labels, width=6, seed=0, spread=0.3):
    label = torch.tensor(labels)
    centre = torch.randn(int(label.max()) + 1, width, generator=torch.Generator().manual_seed(5))
    return centre[label] + spread * torch.randn(
        len(label), width, generator=torch.Generator().manual_seed(seed)
    ), label


def test_pixels_of_digits_are_told_apart_by_a_plane(digits_score):
    assert 93 < digits_score.top1 < digits_score.top5 <= 100


def test_result_is_a_plain_fit_on_all_of_training_at_the_chosen_strength(digits, digits_score):
    """In float64, from zero, to the optimum of mean cross-entropy + strength / 2 · |weights|²."""
    bank, bank_label, query, query_label = (
        part.double().numpy() if part.is_floating_point() else part.numpy() for part in digits
    )
    scaler = StandardScaler().fit(bank)
    plain = LogisticRegression(C=1 / (digits_score.regularisation * len(bank)), tol=1e-7, max_iter=5000)
    plain.fit(scaler.transform(bank), bank_label)
    assert digits_score.top1 == pytest.approx(
        100 * plain.score(scaler.transform(query), query_label), abs=0.5
    )


def test_a_point_of_the_curve_is_a_plain_fit_on_the_part_that_was_not_held_out(digits, digits_score):
    bank, label = digits[0].double().numpy(), digits[1].numpy()
    held_out = draw_held_out(label, 0.2, Purpose.PROBE, 0)
    scaler = StandardScaler().fit(bank[~held_out])
    for strength, top1, _ in digits_score.curve[:6]:
        plain = LogisticRegression(C=1 / (strength * (~held_out).sum()), tol=1e-7, max_iter=5000)
        plain.fit(scaler.transform(bank[~held_out]), label[~held_out])
        assert top1 == pytest.approx(
            100 * plain.score(scaler.transform(bank[held_out]), label[held_out]), abs=1.2
        )


def test_the_strength_with_the_best_held_out_accuracy_is_taken(digits_score):
    best = max(point.top1 for point in digits_score.curve)
    assert [point.top1 for point in digits_score.curve if point.strength == digits_score.regularisation] == [
        best
    ]
    assert [point.strength for point in digits_score.curve] == list(STRENGTHS)
    assert len({point.top1 for point in digits_score.curve}) > 3, "the strength matters on this set"


def test_among_equal_accuracies_the_lowest_held_out_loss_is_taken():
    labels = [0, 1, 2] * 20
    score = linear_probe(*small_set(labels, spread=0.7), *small_set(labels, seed=1, spread=0.7), seed=0)
    best = max(point.top1 for point in score.curve)
    equals = [point for point in score.curve if point.top1 == best]
    assert len(equals) > 1 and score.regularisation == min(equals, key=lambda point: point.loss).strength


def test_queries_choose_nothing(digits, digits_score):
    bank, bank_label, query, query_label = digits
    other = linear_probe(bank, bank_label, query[:50] * 0 + 3, query_label[:50], seed=0)
    assert (other.curve, other.regularisation) == (digits_score.curve, digits_score.regularisation)


def test_the_same_seed_gives_the_same_score(digits, digits_score):
    assert linear_probe(*digits, seed=0) == digits_score


def test_features_are_standardised(digits, digits_score):
    """Columns of other scales and offsets give the same probe, to rounding."""
    bank, bank_label, query, query_label = digits
    scale = torch.logspace(-2, 2, 64)
    other = linear_probe(bank * scale + 1, bank_label, query * scale + 1, query_label, seed=0)
    assert other.top1 == pytest.approx(digits_score.top1, abs=1)


def test_noise_wants_more_regularisation_than_clean_classes():
    labels = [image % 3 for image in range(240)]
    noisy = linear_probe(
        *small_set(labels, width=40, spread=4.0), *small_set(labels, width=40, seed=1, spread=4.0), seed=1
    )
    assert noisy.regularisation > 0.01
    chosen = next(point for point in noisy.curve if point.strength == noisy.regularisation)
    assert chosen.top1 > noisy.curve[-1].top1 and chosen.loss < noisy.curve[-1].loss


def test_held_out_images_are_a_fifth_of_each_class_but_at_least_one():
    label = np.repeat([0, 1, 2, 3, 4], [1, 2, 7, 10, 53])
    held_out = draw_held_out(label, 0.2, Purpose.PROBE, 3)
    assert [int(held_out[label == group].sum()) for group in range(5)] == [0, 1, 1, 2, 10]


def test_the_seed_decides_which_images_are_held_out():
    label = np.repeat([0, 1], 50)
    first, again, other = (draw_held_out(label, 0.2, Purpose.PROBE, seed) for seed in (1, 1, 2))
    assert (first == again).all() and (first != other).any()


def test_a_class_with_one_image_is_learned_from_it():
    """The image is never held out, so that the class is known to the probe."""
    labels = [0] * 10 + [1] * 10 + [2]
    score = linear_probe(
        *small_set(labels, spread=0.05), *small_set([0, 1, 2, 2], seed=9, spread=0.05), seed=0
    )
    assert score.top1 == 100 and len(score.curve) == len(STRENGTHS)


def test_where_every_class_has_one_image_nothing_chooses_the_strength():
    score = linear_probe(
        *small_set([0, 1, 2, 3], spread=0.05), *small_set([0, 1, 2, 3], seed=9, spread=0.05), seed=0
    )
    assert score.top1 == 100 and score.curve == () and score.regularisation == 0.25


def test_two_classes_are_scored_like_many():
    labels = [0, 1] * 20
    score = linear_probe(*small_set(labels), *small_set(labels, seed=1), seed=0)
    assert score.top1 > 90 and score.top5 == 100


def test_class_numbers_may_have_gaps():
    labels = [2, 7] * 15
    score = linear_probe(*small_set(labels), *small_set(labels, seed=1), seed=0)
    assert score.top1 > 90


def test_a_query_of_a_class_that_training_lacks_is_a_miss():
    bank, query = small_set([0, 1] * 15, spread=0.05), small_set([0, 1, 2, 3], seed=1, spread=0.05)
    score = linear_probe(*bank, *query, seed=0)
    assert (score.top1, score.top5) == (50.0, 50.0)


def test_a_constant_feature_is_ignored():
    labels = [0, 1, 2] * 10
    bank, query = small_set(labels), small_set(labels, seed=1)
    padded = [torch.cat([rows, torch.full((30, 1), 5.0)], 1) for rows in (bank[0], query[0])]
    assert linear_probe(padded[0], bank[1], padded[1], query[1], seed=0) == linear_probe(
        *bank, *query, seed=0
    )


@pytest.mark.filterwarnings("error")
def test_fits_that_are_cut_short_give_no_warning():
    labels = [0, 1, 2, 3] * 10
    score = linear_probe(*small_set(labels, spread=1e-4), *small_set(labels, seed=1, spread=1e-4), seed=0)
    assert 0 <= score.top1 <= 100  # a warning would have been an error


@pytest.mark.parametrize(
    ("place", "value", "error", "text"),
    [
        (0, torch.ones(0, 3), ValueError, "bank: there are no images"),
        (2, torch.ones(0, 3), ValueError, "query: there are no images"),
        (1, torch.zeros(3).long(), ShapeError, "bank: 4 images but 3 labels"),
        (1, torch.zeros(0).long(), ShapeError, "bank: 4 images but 0 labels"),
        (3, torch.zeros(3).long(), ShapeError, "query: 2 images but 3 labels"),
        (1, torch.tensor([0, 1, -1, 0]), ValueError, "bank: image 2 has label -1"),
        (3, torch.tensor([-1, 1]), ValueError, "query: image 0 has label -1"),
        (2, torch.ones(2, 5), ShapeError, "bank features are 3 wide, query features 5"),
        (
            1,
            torch.full((4,), 6),
            ValueError,
            "bank: all 4 images are of class 6; a linear probe needs two classes or more",
        ),
        (
            0,
            torch.tensor([[1.0] * 3, [math.nan] * 3, [1.0] * 3, [math.inf] * 3]),
            NumericsError,
            "bank: image 1 gives values that are not finite",
        ),
        (
            2,
            torch.full((2, 3), -math.inf),
            NumericsError,
            "query: image 0 gives values that are not finite (2 of 2",
        ),
    ],
)
def test_wrong_input_is_refused_with_its_place(place, value, error, text):
    inputs = [torch.randn(4, 3), torch.tensor([0, 1, 0, 1]), torch.randn(2, 3), torch.tensor([0, 1])]
    inputs[place] = value
    with pytest.raises(error) as caught:
        linear_probe(*inputs, seed=0)
    assert text in str(caught.value)
