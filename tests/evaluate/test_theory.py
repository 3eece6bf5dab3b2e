"""What the paper claims, as figures: equal to plain loops and libraries, and right where the answer is known.

The known answers: rows and features that have nothing in common, rows that are the features, labels that mean
nothing.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import pearsonr, spearmanr
from sklearn.linear_model import LinearRegression
from sklearn.metrics import average_precision_score, r2_score, roc_auc_score

from vitds.errors import NumericsError, ShapeError
from vitds.evaluate import theory
from vitds.evaluate.theory import (
    embedding_score,
    linear_r2,
    pair_images,
    prototype_fidelity,
    semantic_mass,
    similarity_transfer,
)

IMAGES, WIDTH, CLASSES = 61, 7, 4  # odd: blocks of 16 leave a rest
BAD = torch.tensor([[1.0, 1], [float("nan"), 1]])


def gaussian(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


LABEL = torch.arange(IMAGES) % CLASSES
FEATURES = gaussian(CLASSES, WIDTH, seed=1)[LABEL] + gaussian(IMAGES, WIDTH, seed=2)
ROWS = FEATURES + gaussian(IMAGES, WIDTH, seed=3)
BIAS = gaussian(IMAGES, seed=4)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "BLOCK_ROWS", 16)


def cosines(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
    return (F.normalize(a.double(), dim=1) @ F.normalize(b.double(), dim=1).T).numpy()


def pairs(table: np.ndarray) -> list[float]:
    return [table[i, j] for i in range(len(table)) for j in range(i + 1, len(table))]


def test_fidelity_is_that_of_a_plain_loop() -> None:
    table, found = cosines(FEATURES, ROWS), prototype_fidelity(ROWS, FEATURES)
    assert found.cosine == pytest.approx(np.mean([table[i, i] for i in range(IMAGES)]))
    firsts = [table[i, i] == max(table[i]) for i in range(IMAGES)]
    assert found.first == pytest.approx(100 * np.mean(firsts)) and 0 < found.first < 100


def test_transfer_is_scipys_correlation_of_a_list_of_pairs() -> None:
    ours, theirs = similarity_transfer(ROWS, FEATURES), [pairs(cosines(x, x)) for x in (ROWS, FEATURES)]
    assert ours.pearson == pytest.approx(pearsonr(*theirs).statistic)
    assert ours.spearman == pytest.approx(spearmanr(*theirs).statistic)


@pytest.mark.parametrize("bias", [None, BIAS])
def test_mass_is_that_of_a_plain_loop_and_images_without_a_class_count_off_target_alone(bias) -> None:
    label = LABEL.clone()
    label[[0, 17, 60]] = -1
    label[5] = 4  # alone in its class: what it gives to its class cannot be counted
    found = semantic_mass(FEATURES, ROWS, bias, label)
    ratios, off_target = [], []
    for i in range(IMAGES):
        logits = FEATURES[i].double() @ ROWS.double().T + (0 if bias is None else bias.double())
        p = logits.softmax(0)
        off_target.append(float(1 - p[i]))
        others = [j for j in range(IMAGES) if j != i and label[j] >= 0]
        same = [j for j in others if label[i] == label[j]]
        if same and label[i] >= 0:
            ratios.append(float(p[same].sum() / p[others].sum()) / (len(same) / len(others)))
    assert len(ratios) == IMAGES - 4
    assert found.ratio == pytest.approx(np.mean(ratios)) and found.ratio > 1.3
    assert found.off_target == pytest.approx(np.mean(off_target))


def test_mass_on_the_own_class_alone_is_the_largest_ratio() -> None:
    one_hot = 100 * F.one_hot(LABEL, CLASSES).float()
    found = semantic_mass(one_hot, one_hot, None, LABEL)
    assert found.ratio == pytest.approx(found.largest)
    members = LABEL.bincount()[LABEL]
    assert found.largest == pytest.approx(float(((IMAGES - 1) / (members - 1)).mean()))


def test_embedding_is_that_of_a_plain_loop() -> None:
    found, table = embedding_score(ROWS, LABEL, classes=CLASSES), cosines(ROWS, ROWS)
    hits, precisions = [], []
    for i in range(IMAGES):
        others = np.array([j for j in range(IMAGES) if j != i])
        precisions.append(average_precision_score(LABEL[others] == LABEL[i], table[i, others]))
        nearest = others[np.argsort(-table[i, others])[:20]]
        votes = [np.exp(table[i, nearest[LABEL[nearest] == c]] / 0.07).sum() for c in range(CLASSES)]
        hits.append(np.argmax(votes) == LABEL[i])
    assert found.knn == pytest.approx(100 * np.mean(hits)) and 25 < found.knn < 100
    assert found.map == pytest.approx(100 * np.mean(precisions))
    same = pairs((LABEL[:, None] == LABEL).numpy())
    assert found.auc == pytest.approx(roc_auc_score(same, pairs(table)))


def test_r2_is_scikit_learns_also_of_factors_that_depend_on_one_another() -> None:
    one_hot = F.one_hot(LABEL, CLASSES).float()
    expected = LinearRegression().fit(one_hot, FEATURES).predict(one_hot)
    assert linear_r2(one_hot, FEATURES) == pytest.approx(
        r2_score(FEATURES, expected, multioutput="variance_weighted"), abs=1e-6
    )
    factors = gaussian(IMAGES, 3, seed=5)
    assert linear_r2(factors, factors @ gaussian(3, WIDTH, seed=6) + 4) == pytest.approx(1)


def test_rows_and_features_that_have_nothing_in_common_score_as_blind_ones() -> None:
    images = 800
    rows, features = gaussian(images, 64, seed=7), gaussian(images, 64, seed=8)
    label = torch.arange(images) % 10
    fidelity, transfer = prototype_fidelity(rows, features), similarity_transfer(rows, features)
    assert abs(fidelity.cosine) < 0.02 and fidelity.first < 1
    assert abs(transfer.pearson) < 0.02 and abs(transfer.spearman) < 0.02
    assert semantic_mass(features / 8, rows, None, label).ratio == pytest.approx(1, abs=0.05)
    assert embedding_score(rows, label, classes=10).auc == pytest.approx(0.5, abs=0.01)
    expected = 9 / (images - 1)
    assert linear_r2(F.one_hot(label, 10).float(), features) == pytest.approx(expected, rel=0.3)


def test_rows_that_are_the_features_have_full_fidelity_and_transfer_whatever_their_lengths() -> None:
    rows = FEATURES * torch.linspace(0.1, 9, IMAGES)[:, None]
    fidelity, transfer = prototype_fidelity(rows, FEATURES), similarity_transfer(rows, FEATURES)
    assert (fidelity.cosine, fidelity.first) == (pytest.approx(1), 100)
    assert (transfer.pearson, transfer.spearman) == (pytest.approx(1), pytest.approx(1))


def test_equal_rows_share_every_image() -> None:
    same = torch.ones(IMAGES, WIDTH)
    assert prototype_fidelity(same, same).first == pytest.approx(100 / IMAGES, rel=0.1)


def test_labels_that_mean_nothing_give_a_ratio_of_one() -> None:
    generator = torch.Generator().manual_seed(9)
    ratios = [
        semantic_mass(FEATURES, ROWS, None, LABEL[torch.randperm(IMAGES, generator=generator)]).ratio
        for _ in range(200)
    ]
    assert np.mean(ratios) == pytest.approx(1, abs=0.08)
    assert semantic_mass(FEATURES, ROWS, None, LABEL).ratio > 1.5


def test_of_many_images_a_keyed_draw_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(theory, "PAIR_IMAGES", 30)
    taken = pair_images(IMAGES, 0)
    assert len(set(taken)) == 30 and (taken == pair_images(IMAGES, 0)).all()
    assert set(taken) != set(pair_images(IMAGES, 1)) and (pair_images(30, 1) == np.arange(30)).all()
    theirs = [pairs(cosines(x[taken], x[taken])) for x in (ROWS, FEATURES)]
    assert similarity_transfer(ROWS, FEATURES).pearson == pytest.approx(pearsonr(*theirs).statistic)
    same = pairs((LABEL[taken][:, None] == LABEL[taken]).numpy())
    assert embedding_score(ROWS, LABEL, classes=CLASSES).auc == pytest.approx(roc_auc_score(same, theirs[0]))


def test_what_cannot_be_measured_is_none() -> None:
    equal = torch.ones(4, 3)
    assert similarity_transfer(equal, gaussian(4, 3, seed=1)).pearson is None
    assert semantic_mass(equal, equal, None, torch.arange(4)).ratio is None
    assert semantic_mass(equal, equal, None, torch.full((4,), -1)).off_target == pytest.approx(0.75)
    assert embedding_score(equal, torch.zeros(4, dtype=torch.long), classes=1).auc is None
    assert linear_r2(torch.eye(4), equal) is None


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (
            lambda: prototype_fidelity(torch.ones(2, 3), torch.ones(2, 4)),
            ShapeError,
            "row i belongs to image",
        ),
        (lambda: prototype_fidelity(BAD, torch.ones(2, 2)), NumericsError, "rows: image 1 gives values"),
        (lambda: similarity_transfer(torch.ones(2, 3), torch.ones(3, 3)), ShapeError, "2 rows but features"),
        (lambda: similarity_transfer(torch.ones(2, 2), BAD), NumericsError, "not finite"),
        (lambda: semantic_mass(BAD, BAD, None, torch.zeros(2).long()), NumericsError, "features: image 1"),
        (
            lambda: embedding_score(torch.ones(1, 2), torch.zeros(1).long(), classes=1),
            ValueError,
            "of one image",
        ),
        (
            lambda: embedding_score(torch.ones(2, 2), torch.tensor([0, 3]), classes=2),
            ValueError,
            "has label 3",
        ),
        (lambda: linear_r2(torch.eye(2), BAD), NumericsError, "features: image 1 gives values"),
    ],
)
def test_wrong_input_is_refused(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
