"""What a classifier's answers are worth: equal to scikit-learn and torchmetrics, and to a plain loop."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn import metrics
from torchmetrics.functional.classification import multiclass_calibration_error

from vitds import rng
from vitds.evaluate import bootstrap
from vitds.evaluate.answers import (
    Answers,
    answers_of,
    balanced_means,
    class_score,
    confusions,
    per_class,
    reliability,
)
from vitds.evaluate.bootstrap import DRAWS, interval_of_mean
from vitds.rng import Purpose

CLASSES = 7  # the last one has no images, and the one before it no answers


@pytest.fixture(scope="module")
def logits_and_labels() -> tuple[torch.Tensor, torch.Tensor]:
    """Of a classifier that is right more often than not, on unequal classes."""
    draw = torch.Generator().manual_seed(0)
    label = torch.multinomial(torch.tensor([20.0, 10, 5, 5, 2, 1, 0]), 240, replacement=True, generator=draw)
    logits = torch.randn(240, CLASSES, generator=draw)
    logits[torch.arange(240), label] += 1.5
    logits[:, 5] = -9
    return logits, label


@pytest.fixture(scope="module")
def answers(logits_and_labels) -> Answers:
    logits, label = logits_and_labels
    return answers_of(logits, label, logits.softmax(1))


def drawn_positions(images: int) -> list[np.ndarray]:
    """What the bootstrap draws, a draw at a time."""
    return [
        (rng.words(Purpose.BOOTSTRAP, draw, np.arange(images)) % np.uint64(images)).astype(int)
        for draw in range(DRAWS)
    ]


@pytest.fixture(scope="module")
def score(answers):
    return class_score(answers, CLASSES)


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_figures_agree_with_scikit_learn(answers, score) -> None:
    label, predicted = answers.label_M, answers.predicted_M
    assert score.top1 == pytest.approx(100 * metrics.accuracy_score(label, predicted))
    assert score.balanced_accuracy == pytest.approx(100 * metrics.balanced_accuracy_score(label, predicted))
    assert score.macro_f1 == pytest.approx(100 * metrics.f1_score(label, predicted, average="macro"))
    assert score.majority == pytest.approx(100 * np.mean(label == np.bincount(label).argmax()))
    assert score.balanced_accuracy < score.top1 - 3, "the classes are unequal enough to tell the two apart"


def test_calibration_error_agrees_with_torchmetrics(logits_and_labels, score) -> None:
    logits, label = logits_and_labels
    expected = multiclass_calibration_error(logits.softmax(1), label, CLASSES, n_bins=15, norm="l1")
    assert score.ece == pytest.approx(100 * float(expected), abs=1e-4)


def test_the_reliability_curve_is_the_share_of_right_answers_a_bin(answers) -> None:
    bins = reliability(answers)
    assert sum(each["images"] for each in bins) == 240 and len(bins) == 15
    for each in bins:
        inside = (answers.probability_M * 100 > each["from"]) & (answers.probability_M * 100 <= each["to"])
        assert each["images"] == inside.sum()
        if inside.any():
            assert each["accuracy"] == pytest.approx(100 * answers.is_right_M[inside].mean())
            assert each["confidence"] == pytest.approx(100 * answers.probability_M[inside].mean())
        else:
            assert each["accuracy"] is None and each["confidence"] is None


@pytest.mark.filterwarnings("ignore:y_pred contains classes not in y_true")
def test_intervals_are_percentiles_of_scikit_learns_figures_over_drawn_images(answers, score) -> None:
    label, predicted, found = answers.label_M, answers.predicted_M, []
    for drawn in drawn_positions(240):
        found.append(
            (
                metrics.accuracy_score(label[drawn], predicted[drawn]),
                metrics.balanced_accuracy_score(label[drawn], predicted[drawn]),
                metrics.f1_score(label[drawn], predicted[drawn], average="macro"),
            )
        )
    expected = 100 * np.percentile(found, (2.5, 97.5), axis=0)
    for column, name in enumerate(("top1", "balanced_accuracy", "macro_f1")):
        assert getattr(score, f"{name}_interval") == pytest.approx(expected[:, column]), name


def test_an_interval_has_the_width_that_theory_gives() -> None:
    hits = np.repeat([1.0, 0.0], [300, 700])
    low, high = interval_of_mean(hits)
    assert (low, high) == pytest.approx((0.3 - 1.96 * 0.0145, 0.3 + 1.96 * 0.0145), abs=0.004)


def test_the_draws_that_are_held_at_once_change_nothing(monkeypatch) -> None:
    hits = np.arange(50) % 3.0
    whole = interval_of_mean(hits)
    monkeypatch.setattr(bootstrap, "HELD", 170)
    assert interval_of_mean(hits) == whole


def test_an_interval_needs_images() -> None:
    with pytest.raises(ValueError, match="there are no images"):
        interval_of_mean(np.zeros(0))


def test_several_sets_of_answers_are_counted_apart(answers) -> None:
    label, predicted = answers.label_M, answers.predicted_M
    together = balanced_means(np.stack([label, label]), np.stack([predicted, label]), CLASSES)
    alone = balanced_means(label[None], predicted[None], CLASSES)
    assert together[0].tolist() == [alone[0][0], 1] and together[1].tolist() == [alone[1][0], 1]


def test_each_class_has_its_row(answers) -> None:
    rows = per_class(answers, [f"class {number}" for number in range(CLASSES)])
    for number, row in enumerate(rows):
        is_own, is_answered = answers.label_M == number, answers.predicted_M == number
        both = (is_own & is_answered).sum()
        assert (row["class"], row["images"], row["predicted"]) == (
            f"class {number}",
            is_own.sum(),
            is_answered.sum(),
        )
        assert row["recall"] == (pytest.approx(100 * both / is_own.sum()) if is_own.any() else None)
        assert row["precision"] == (
            pytest.approx(100 * both / is_answered.sum()) if is_answered.any() else None
        )
    assert rows[6]["images"] == 0 and rows[5]["predicted"] == 0 and rows[5]["f1"] == 0


def test_confusions_are_the_matrix_without_its_zeros(answers) -> None:
    found = {(row, column): count for row, column, count in confusions(answers)}
    pairs = list(zip(answers.label_M.tolist(), answers.predicted_M.tolist(), strict=True))
    assert found == {pair: pairs.count(pair) for pair in set(pairs)}


def test_answers_without_probabilities_have_no_calibration() -> None:
    answers = answers_of(torch.eye(3), torch.arange(3))
    assert class_score(answers, 3).ece is None and reliability(answers) is None


def test_equal_scores_are_answered_by_the_lower_class() -> None:
    answers = answers_of(torch.zeros(4, 4), torch.arange(4))
    assert answers.predicted_M.tolist() == [0] * 4 and answers.is_right_M.tolist() == [True] + [False] * 3
