"""Alignment, uniformity and RankMe."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from vitds.errors import NumericsError, ShapeError
from vitds.evaluate import probes
from vitds.evaluate.probes import alignment, rankme, uniformity


def gaussian(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_alignment_is_the_mean_squared_distance_on_the_sphere():
    first, second = gaussian(40, 8), gaussian(40, 8, seed=1)
    pairs = [((a / a.norm() - b / b.norm()) ** 2).sum() for a, b in zip(first, second, strict=True)]
    assert alignment(first, second) == pytest.approx(float(sum(pairs)) / 40, rel=1e-5)


def test_alignment_runs_from_agreement_to_opposition():
    rows = gaussian(10, 4)
    assert alignment(rows, 3 * rows) == pytest.approx(0, abs=1e-12)
    assert alignment(rows, -rows) == pytest.approx(4)


@pytest.mark.parametrize("block_rows", [1, 7, 50, 256])
def test_uniformity_equals_the_papers_formula_over_all_pairs(monkeypatch, block_rows):
    monkeypatch.setattr(probes, "BLOCK_ROWS", block_rows)
    rows = gaussian(50, 8)
    paper = torch.pdist(F.normalize(rows.double(), dim=1)).pow(2).mul(-2).exp().mean().log()
    assert uniformity(rows) == pytest.approx(float(paper), rel=1e-9)


def test_uniformity_of_a_collapsed_and_of_a_spread_model():
    assert uniformity(torch.ones(20, 8)) == pytest.approx(0, abs=1e-9)
    assert uniformity(gaussian(500, 256)) == pytest.approx(-4, abs=0.1)
    assert uniformity(torch.tensor([[1.0, 0], [-1, 0]])) == pytest.approx(-8)


@pytest.mark.parametrize(("width", "floor"), [(16, -3.513), (64, -3.875), (256, -3.969), (768, -3.990)])
def test_of_random_features_uniformity_is_at_the_floor_of_their_width_and_alignment_is_2(
    width: int, floor: float
) -> None:
    rows = gaussian(500, width)
    assert uniformity(rows) == pytest.approx(floor, abs=0.006)
    assert alignment(rows, gaussian(500, width, seed=1)) == pytest.approx(2, abs=0.05)


@pytest.mark.parametrize(
    ("images", "width", "mean", "expected"),
    [(2040, 192, 0, 189.7), (2040, 192, 5, 82.8), (6149, 192, 0, 191.3), (2040, 384, 0, 374.4)],
)
def test_rankme_of_gaussian_features_is_nearly_their_width_and_falls_with_a_common_mean(
    images: int, width: int, mean: float, expected: float
) -> None:
    assert rankme(gaussian(images, width) + mean) == pytest.approx(expected, abs=0.15)


@pytest.mark.parametrize("mean", [0, 5, 50])
def test_centred_rankme_does_not_see_a_common_mean(mean: float) -> None:
    assert rankme(gaussian(2040, 192) + mean, is_centred=True) == pytest.approx(189.7, abs=0.15)


def test_rankme_counts_directions_of_equal_weight():
    directions = torch.linalg.qr(gaussian(60, 60))[0][:, :5]
    mixing = torch.linalg.qr(gaussian(12, 12, seed=1))[0][:5]
    assert rankme(directions @ mixing) == pytest.approx(5, rel=1e-4)


def test_rankme_equals_the_papers_formula():
    rows = gaussian(30, 9) * torch.logspace(0, -2, 9)
    singular = torch.linalg.eigvalsh(rows.double().T @ rows.double()).clamp_min(0).sqrt()
    share = [float(value / singular.sum()) + 1e-7 for value in singular]
    assert rankme(rows) == pytest.approx(math.exp(-sum(p * math.log(p) for p in share)), rel=1e-6)


def test_rankme_of_a_collapsed_model_is_one():
    assert rankme(torch.ones(20, 8)) == pytest.approx(1, rel=1e-3)
    assert rankme(torch.zeros(20, 8)) == pytest.approx(1, rel=1e-3)
    for constant in (torch.ones(20, 8), torch.zeros(20, 8), torch.ones(20, 8) + 1e-7 * gaussian(20, 8)):
        assert rankme(constant, is_centred=True) == pytest.approx(1, rel=1e-3)


BAD = torch.tensor([[1.0, 1], [math.nan, 1]])


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: alignment(torch.ones(2, 3), torch.ones(3, 3)),
            ShapeError,
            "the first views are (2, 3), the second (3, 3); row i pairs",
        ),
        (
            lambda: alignment(torch.ones(0, 3), torch.ones(0, 3)),
            ValueError,
            "alignment needs 1 image or more, got 0",
        ),
        (
            lambda: alignment(BAD, torch.ones(2, 2)),
            NumericsError,
            "alignment: image 1 gives values that are not finite",
        ),
        (
            lambda: alignment(torch.ones(2, 2), BAD),
            NumericsError,
            "alignment: image 1 gives values that are not finite",
        ),
        (lambda: uniformity(torch.ones(1, 3)), ValueError, "uniformity needs 2 images or more, got 1"),
        (lambda: uniformity(BAD), NumericsError, "uniformity: image 1 gives values that are not finite"),
        (lambda: rankme(torch.ones(0, 3)), ValueError, "rankme needs 1 image or more, got 0"),
        (lambda: rankme(BAD), NumericsError, "rankme: image 1 gives values that are not finite"),
    ],
)
def test_wrong_input_is_refused_with_its_place(call, error, text):
    with pytest.raises(error) as caught:
        call()
    assert text in str(caught.value)
