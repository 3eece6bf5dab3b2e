"""Linear probe: how well a linear classifier on frozen features does."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitds import rng
from vitds.evaluate.answers import Answers, answers_of
from vitds.evaluate.features import check_labelled, check_same_width
from vitds.rng import Purpose

# From strong to weak, so that each fit starts near its solution; half a decade apart.
STRENGTHS = tuple(float(strength) for strength in np.logspace(1, -5, 13))
HELD_OUT = 5  # one image in so many chooses the strength


class HeldOut(NamedTuple):
    """One point of the curve.

    Attributes:
        strength: of the regularisation.
        top1: in percent, on the held-out part of training.
        loss: mean cross-entropy there.
    """

    strength: float
    top1: float
    loss: float


@dataclass(frozen=True)
class LinearScore:
    """top1 and top5 in percent of the queries.

    Attributes:
        regularisation: chosen strength s of: mean cross-entropy + s / 2 · |weights|², on standardised
            features.
        curve: one point a strength, strong to weak; empty if nothing could be held out.
        answers: to the queries, with probabilities.
    """

    top1: float
    top5: float
    regularisation: float
    curve: tuple[HeldOut, ...]
    answers: Answers = field(compare=False, repr=False)


def linear_probe(
    bank_MD: Float[Tensor, "M D"],
    bank_label_M: Int[Tensor, "Ml"],
    query_QD: Float[Tensor, "Q Dq"],
    query_label_Q: Int[Tensor, "Ql"],
    *,
    seed: int,
) -> LinearScore:
    """Fit logistic regression on the bank, score it on the queries; the queries choose nothing.

    The strength with the best top-1 on a held-out fifth of the bank is taken, among equals the one with the
    lowest cross-entropy there (the strongest of equals would drown classes of few images); then the same path
    of warm-started fits runs on the whole bank down to it. Of a class, a fifth but at least one image is held
    out, and none where it has one only; where no class has two, the strength is 1 / M (scikit-learn's C = 1).
    A query of a class that the bank lacks is a miss. Features of one value throughout are ignored.

    Args:
        seed: decides, with the row number, which images are held out.
    Raises: ValueError if bank or query is empty, a label is negative, or the bank has a single class.
        ShapeError if lengths or widths differ. NumericsError if a feature is not finite (names the image).
    """
    classes = 1 + max(
        (int(labels.max()) for labels in (bank_label_M, query_label_Q) if len(labels)), default=0
    )
    check_labelled("bank", bank_MD, bank_label_M, classes)
    check_labelled("query", query_QD, query_label_Q, classes)
    check_same_width(bank_MD, query_QD)
    rows_MD, label_M = bank_MD.float().cpu().numpy(), bank_label_M.cpu().numpy()
    if len(np.unique(label_M)) < 2:
        raise ValueError(
            f"bank: all {len(label_M)} images are of class {label_M[0]}; a linear probe needs two classes or "
            "more"
        )
    is_held_out = draw_held_out(label_M, 1 / HELD_OUT, Purpose.PROBE, seed)
    if is_held_out.any():
        curve = _held_out_curve(rows_MD, label_M, is_held_out)
        best = max(curve, key=lambda point: (point.top1, -point.loss))
        strengths = STRENGTHS[: curve.index(best) + 1]
    else:
        curve, strengths = (), (1 / len(label_M),)
    model = _new_classifier()
    for strength in strengths:
        _fit(model, strength, rows_MD, label_M)
    query_rows = query_QD.float().cpu().numpy()
    score_QC = torch.full((len(query_QD), classes), -torch.inf, dtype=torch.float64)
    score_QC[:, torch.from_numpy(model.classes_).long()] = _scores(model, query_rows)
    probability_QC = torch.zeros_like(score_QC)
    probability_QC[:, torch.from_numpy(model.classes_).long()] = torch.from_numpy(
        model.predict_proba(query_rows)
    ).double()
    answers = answers_of(score_QC, query_label_Q, probability_QC)
    return LinearScore(answers.top(1), answers.top(5), strengths[-1], curve, answers)


def draw_held_out(
    label_M: NDArray[np.integer], share: float, purpose: Purpose, seed: int
) -> NDArray[np.bool_]:
    """Which images are held out: that share of each class, rounded down, by keyed words.

    Of a class of two images or more at least one is held out, and at least one is left.

    Args:
        share: of each class, above 0 and below 1.
        purpose: of the draw.
        seed: with the row number the key of the draw.
    Returns: bool (M,).
    """
    word_M = rng.words(purpose, seed, np.arange(len(label_M)))
    is_held_out = np.zeros(len(label_M), bool)
    for label in np.unique(label_M):
        rows = np.flatnonzero(label_M == label)
        if len(rows) > 1:
            is_held_out[rows[np.argsort(word_M[rows])][: max(1, int(len(rows) * share))]] = True
    return is_held_out


def _held_out_curve(
    rows_MD: NDArray[np.float32], label_M: NDArray[np.integer], is_held_out: NDArray[np.bool_]
) -> tuple[HeldOut, ...]:
    from sklearn.metrics import log_loss  # at the top scikit-learn costs every start a second

    model, curve = _new_classifier(), []
    rows_HD, label_H = rows_MD[is_held_out], label_M[is_held_out]
    for strength in STRENGTHS:
        _fit(model, strength, rows_MD[~is_held_out], label_M[~is_held_out])
        loss = log_loss(label_H, model.predict_proba(rows_HD), labels=model.classes_)
        curve.append(HeldOut(strength, 100 * float(model.score(rows_HD, label_H)), float(loss)))
    return tuple(curve)


def _new_classifier() -> Any:
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    return make_pipeline(StandardScaler(), LogisticRegression(solver="lbfgs", warm_start=True, max_iter=200))


def _fit(model: Any, strength: float, rows_MD: NDArray[np.float32], label_M: NDArray[np.integer]) -> None:
    """Fit from where the model stands.

    scikit-learn's C weighs the sum of the losses, our strength goes with their mean.
    """
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        # Weak regularisation of separable classes has its optimum far out; a fit cut short there is judged
        # like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.set_params(logisticregression__C=1 / (strength * len(label_M))).fit(rows_MD, label_M)


def _scores(model: Any, rows_QD: NDArray[np.float32]) -> Float[Tensor, "Q seen"]:
    """One score a class that the bank has; of two classes scikit-learn gives one column, the second's."""
    score = torch.from_numpy(model.decision_function(rows_QD)).double()
    return torch.stack([-score, score], 1) if score.ndim == 1 else score
