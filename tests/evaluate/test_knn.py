"""kNN on frozen features: the fast one equals a plain loop, and the edges are what a reader expects."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from vitds.errors import NumericsError, ShapeError
from vitds.evaluate import knn
from vitds.evaluate.knn import KnnScore, knn_accuracy


def plain_knn(bank, bank_label, query, query_label, k, temperature):
    """Percent top-1 and top-5: a query at a time, votes in a dictionary."""
    unit = [row / np.linalg.norm(row) for row in np.asarray(bank, np.float64)]
    top1 = top5 = 0
    for row, label in zip(np.asarray(query, np.float64), query_label.tolist(), strict=True):
        similarity = [float(row @ other / np.linalg.norm(row)) for other in unit]
        votes = defaultdict(float)
        for neighbour in sorted(range(len(unit)), key=lambda i: -similarity[i])[:k]:
            votes[int(bank_label[neighbour])] += math.exp(similarity[neighbour] / temperature)
        ranking = sorted(votes, key=lambda voted: (-votes[voted], voted))
        top1 += ranking[0] == label
        top5 += label in ranking[:5]
    return 100 * top1 / len(query), 100 * top5 / len(query)


def gaussian_classes(images, classes, seed, width=12):
    """Features that overlap between classes, so that neither 0 nor 100 % are right."""
    draw = torch.Generator().manual_seed(seed)
    label = torch.arange(images) % classes
    centre = torch.randn(classes, width, generator=torch.Generator().manual_seed(7))
    return centre[label] + 1.3 * torch.randn(images, width, generator=draw), label


@pytest.fixture(scope="module")
def digits():
    pixels, label = load_digits(return_X_y=True)
    pixels, label = torch.from_numpy(pixels).float(), torch.from_numpy(label)
    return pixels[::2], label[::2], pixels[1::2], label[1::2]


@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_equals_a_plain_loop_over_queries(seed, temperature):
    bank, query = gaussian_classes(150, 9, seed), gaussian_classes(61, 9, seed + 100)
    scores = knn_accuracy(*bank, *query, k=(1, 3, 10, 150), temperature=temperature, classes=9)
    for k, score in scores.items():
        assert (score.top1, score.top5) == pytest.approx(
            plain_knn(*bank, *query, k, temperature), abs=1e-9
        ), f"k = {k}"
    assert 20 < scores[10].top1 < scores[10].top5 < 100


def test_equals_the_plain_loop_on_scanned_digits(digits):
    bank, bank_label, query, query_label = digits
    query, query_label = query[:80], query_label[:80]
    score = knn_accuracy(bank, bank_label, query, query_label, k=[20], classes=10)[20]
    assert (score.top1, score.top5) == pytest.approx(
        plain_knn(bank, bank_label, query, query_label, 20, 0.07), abs=1e-9
    )


def test_pixels_of_digits_are_told_apart_by_their_neighbours(digits):
    scores = knn_accuracy(*digits, k=(10, 200), classes=10)
    assert scores[10].top1 > 95
    assert scores[200].top1 < scores[10].top1, "so many neighbours blur ten classes of 90 images"


@pytest.mark.parametrize("held", [1, 500, 10_000])
def test_the_block_of_queries_held_at_once_changes_nothing(monkeypatch, held):
    bank, query = gaussian_classes(100, 6, 3), gaussian_classes(53, 6, 4)
    whole = knn_accuracy(*bank, *query, k=(5, 20), classes=6)
    monkeypatch.setattr(knn, "SIMILARITIES_HELD", held)
    assert knn_accuracy(*bank, *query, k=(5, 20), classes=6) == whole


def test_no_more_similarities_are_held_than_the_limit(monkeypatch):
    """The widest tensor that enters topk is the block of similarities."""
    sizes, topk = [], torch.Tensor.topk
    monkeypatch.setattr(knn, "SIMILARITIES_HELD", 1000)
    monkeypatch.setattr(
        torch.Tensor,
        "topk",
        lambda self, *args, **options: sizes.append(self.numel()) or topk(self, *args, **options),
    )
    knn_accuracy(*gaussian_classes(100, 6, 3), *gaussian_classes(53, 6, 4), k=[5], classes=6)
    assert sum(sizes) == 5300 and max(sizes) <= 1000


def test_k_above_the_bank_counts_the_whole_bank_and_says_so():
    bank, query = gaussian_classes(30, 4, 5), gaussian_classes(20, 4, 6)
    scores = knn_accuracy(*bank, *query, k=(30, 200), classes=4)
    assert scores[200] == scores[30] and scores[200].neighbours == 30


def test_length_of_a_feature_does_not_matter():
    bank, query = gaussian_classes(60, 5, 8), gaussian_classes(40, 5, 9)
    longer = bank[0] * torch.logspace(-3, 3, 60)[:, None]
    assert knn_accuracy(longer, bank[1], *query, k=[10], classes=5) == knn_accuracy(
        *bank, *query, k=[10], classes=5
    )


def test_one_near_neighbour_outvotes_two_far_ones_at_a_low_temperature():
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    query, label = torch.tensor([[1.0, 0.1]]), torch.tensor([0])
    for temperature, top1 in ((0.07, 100.0), (10.0, 0.0)):
        assert (
            knn_accuracy(
                bank, torch.tensor([0, 1, 1]), query, label, k=[3], temperature=temperature, classes=2
            )[3].top1
            == top1
        )


def test_a_tiny_temperature_does_not_overflow():
    bank, query = gaussian_classes(40, 4, 1), gaussian_classes(20, 4, 2)
    assert (
        knn_accuracy(*bank, *query, k=[10], temperature=1e-4, classes=4)[10].top1
        == knn_accuracy(*bank, *query, k=[1], classes=4)[1].top1
    )


def test_a_class_without_a_vote_is_no_hit():
    bank, label = torch.eye(3), torch.tensor([1, 1, 1])
    assert knn_accuracy(bank, label, torch.eye(3), torch.tensor([0, 1, 2]), k=[3], classes=4)[3] == KnnScore(
        100 / 3, 100 / 3, 3
    )


def test_classes_with_equal_votes_go_to_the_lower_class():
    bank, label = torch.ones(2, 2), torch.tensor([3, 2])
    assert knn_accuracy(bank, label, torch.ones(2, 2), torch.tensor([2, 3]), k=[2], classes=4)[2] == KnnScore(
        50.0, 100.0, 2
    )


def test_half_precision_features_are_compared_in_float32():
    bank, query = gaussian_classes(80, 5, 1), gaussian_classes(40, 5, 2)
    low = [rows.bfloat16() for rows in (bank[0], query[0])]
    expected = knn_accuracy(low[0].float(), bank[1], low[1].float(), query[1], k=[7], classes=5)
    assert knn_accuracy(low[0], bank[1], low[1], query[1], k=[7], classes=5) == expected


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"k": []}, ValueError, "k must be one or more numbers of neighbours, each at least 1; got []"),
        ({"k": [10, 0]}, ValueError, "got [10, 0]"),
        ({"temperature": 0.0}, ValueError, "temperature must be above 0, got 0.0"),
        (
            {"bank_MD": torch.ones(0, 3), "bank_label_M": torch.ones(0).long()},
            ValueError,
            "bank: there are no images",
        ),
        (
            {"query_QD": torch.ones(0, 3), "query_label_Q": torch.ones(0).long()},
            ValueError,
            "query: there are no images",
        ),
        ({"bank_label_M": torch.zeros(3).long()}, ShapeError, "bank: 4 images but 3 labels"),
        ({"query_label_Q": torch.zeros(3).long()}, ShapeError, "query: 2 images but 3 labels"),
        (
            {"bank_label_M": torch.tensor([0, 1, 2, 0])},
            ValueError,
            "bank: image 2 has label 2, labels here are 0 to 1",
        ),
        (
            {"query_label_Q": torch.tensor([0, -1])},
            ValueError,
            "query: image 1 has label -1, labels here are 0 to 1 (-1 means no label)",
        ),
        (
            {"query_QD": torch.ones(2, 5)},
            ShapeError,
            "bank features are 3 wide, query features 5; extract both with the same backbone",
        ),
        (
            {"bank_MD": torch.tensor([[1.0] * 3, [1.0] * 3, [1, math.nan, 1], [1.0] * 3])},
            NumericsError,
            "bank: image 2 gives values that are",
        ),
        (
            {"query_QD": torch.tensor([[math.inf] * 3] * 2)},
            NumericsError,
            "query: image 0 gives values that are not finite (2 of 2 images",
        ),
    ],
)
def test_wrong_input_is_refused_with_its_place(change, error, text):
    good = {
        "bank_MD": torch.ones(4, 3),
        "bank_label_M": torch.tensor([0, 1, 0, 1]),
        "query_QD": torch.ones(2, 3),
        "query_label_Q": torch.tensor([0, 1]),
        "k": [1],
        "classes": 2,
    }
    knn_accuracy(**good)
    with pytest.raises(error) as caught:
        knn_accuracy(**(good | change))
    assert text in str(caught.value)
