"""Top-1 and top-5 from logits."""

from __future__ import annotations

import math

import pytest
import torch
from torchmetrics.functional.classification import multiclass_accuracy

from vitds.errors import NumericsError, ShapeError
from vitds.evaluate.classify import TopScore, top_accuracy


def test_agrees_with_torchmetrics():
    draw = torch.Generator().manual_seed(0)
    logits, label = torch.randn(300, 20, generator=draw), torch.randint(20, (300,), generator=draw)
    logits[torch.arange(300), label] += 1
    score = top_accuracy(logits, label)
    for places, percent in ((1, score.top1), (5, score.top5)):
        expected = 100 * multiclass_accuracy(logits, label, num_classes=20, top_k=places, average="micro")
        assert percent == pytest.approx(float(expected), abs=1e-4)


def test_figures_are_percent():
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4]] * 3)
    assert top_accuracy(logits, torch.tensor([0, 4, 5])) == TopScore(100 / 3, 200 / 3)


def test_top5_of_five_classes_is_all():
    assert top_accuracy(torch.eye(5), torch.tensor([1, 2, 3, 4, 0])) == TopScore(0.0, 100.0)


def test_equal_logits_go_to_the_lower_class():
    """A network that says nothing is right on the first class alone, not on all of them."""
    assert top_accuracy(torch.zeros(8, 8), torch.arange(8)) == TopScore(12.5, 62.5)


def test_logits_of_half_precision_are_ranked_as_they_are():
    assert top_accuracy(torch.eye(7).bfloat16(), torch.arange(7, dtype=torch.int32)) == TopScore(100.0, 100.0)


@pytest.mark.parametrize(
    ("logits", "label", "error", "text"),
    [
        (torch.ones(0, 3), torch.ones(0).long(), ValueError, "logits: there are no images"),
        (torch.ones(2, 3), torch.ones(3).long(), ShapeError, "logits: 2 images but 3 labels"),
        (
            torch.ones(2, 3),
            torch.tensor([0, 3]),
            ValueError,
            "logits: image 1 has label 3, labels here are 0 to 2",
        ),
        (
            torch.ones(2, 3),
            torch.tensor([0, -1]),
            ValueError,
            "image 1 has label -1, labels here are 0 to 2 (-1 means no label)",
        ),
        (
            torch.tensor([[0.0, 1], [math.nan, 1]]),
            torch.tensor([0, 1]),
            NumericsError,
            "logits: image 1 gives values that are not finite",
        ),
    ],
)
def test_wrong_input_is_refused_with_its_place(logits, label, error, text):
    with pytest.raises(error) as caught:
        top_accuracy(logits, label)
    assert text in str(caught.value)
