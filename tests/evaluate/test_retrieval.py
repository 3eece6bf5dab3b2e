"""Retrieval and few-shot: equal to scikit-learn and to a plain loop over queries."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score

from vitds.errors import ShapeError
from vitds.evaluate import retrieval
from vitds.evaluate.few_shot import REPEATS, draw_shots, few_shot
from vitds.evaluate.retrieval import retrieve


def classes_of_points(images: int, seed: int, classes: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of classes that overlap."""
    label = torch.arange(images) % classes
    centre = torch.randn(classes, 12, generator=torch.Generator().manual_seed(7))
    return centre[label] + torch.randn(images, 12, generator=torch.Generator().manual_seed(seed)), label


BANK, QUERY = classes_of_points(90, 0), classes_of_points(41, 1)


@pytest.mark.parametrize("held", [1, 400, 10_000])
def test_average_precision_and_recall_are_those_of_a_plain_loop(monkeypatch, held: int) -> None:
    monkeypatch.setattr(retrieval, "SIMILARITIES_HELD", held)
    found = retrieve(*BANK, *QUERY, classes=6)
    similarity = (F.normalize(QUERY[0], dim=1) @ F.normalize(BANK[0], dim=1).T).numpy()
    is_own = (QUERY[1][:, None] == BANK[1][None]).numpy()
    expected = [average_precision_score(own, row) for own, row in zip(is_own, similarity, strict=True)]
    assert found.precision_Q == pytest.approx(np.array(expected))
    assert found.mean_precision == pytest.approx(100 * np.mean(expected))
    for k, recall in found.recall().items():
        hits = [own[np.argsort(-row)[:k]].any() for own, row in zip(is_own, similarity, strict=True)]
        assert recall == pytest.approx(100 * np.mean(hits))
    assert 20 < found.recall()[1] < found.recall()[10] <= 100


def test_a_class_that_the_bank_lacks_is_never_found() -> None:
    found = retrieve(torch.eye(3), torch.tensor([0, 0, 1]), torch.eye(3), torch.tensor([0, 2, 1]), classes=3)
    assert found.precision_Q.tolist() == [pytest.approx(1), 0, 1]
    assert found.recall((1, 3)) == {1: pytest.approx(200 / 3), 3: pytest.approx(200 / 3)}


def test_features_of_two_backbones_are_refused() -> None:
    for measure in (
        lambda: retrieve(torch.eye(3), torch.arange(3), torch.eye(4), torch.arange(4), classes=4),
        lambda: few_shot(torch.eye(3), torch.arange(3), torch.eye(4), torch.arange(4), shots=1, classes=4),
    ):
        with pytest.raises(ShapeError, match="bank features are 3 wide, query features 4"):
            measure()


@pytest.mark.parametrize("shots", [1, 5])
def test_few_shots_are_classified_by_the_nearest_class_mean(shots: int) -> None:
    bank, query = (F.normalize(rows.double(), dim=1).numpy() for rows in (BANK[0], QUERY[0]))
    answers = few_shot(*BANK, *QUERY, shots=shots, classes=6)
    assert len(answers) == REPEATS
    for repeat, found in enumerate(answers):
        taken = draw_shots(BANK[1].numpy(), shots, repeat)
        means = np.stack([bank[taken][BANK[1].numpy()[taken] == number].mean(0) for number in range(6)])
        means /= np.linalg.norm(means, axis=1, keepdims=True)
        nearest = [int(np.argmin([np.linalg.norm(row - mean) for mean in means])) for row in query]
        assert found.predicted_M.tolist() == nearest


def test_each_repeat_draws_so_many_images_of_each_class() -> None:
    label = np.array([0, 2, 0, 0, 2, 0, 3])
    first, again, other = (draw_shots(label, 2, repeat) for repeat in (0, 0, 1))
    assert sorted(label[first]) == [0, 0, 2, 2, 3] and first.tolist() == again.tolist()
    assert any(draw_shots(label, 2, repeat).tolist() != first.tolist() for repeat in range(1, 5))
    assert sorted(label[other]) == [0, 0, 2, 2, 3]
    assert set(draw_shots(label, 1, 0)) < set(first)


def test_a_class_without_bank_images_is_never_answered() -> None:
    bank, label = classes_of_points(30, 0, classes=3)
    answers = few_shot(bank, label, bank, label, shots=5, classes=5)
    assert max(found.predicted_M.max() for found in answers) == 2
