"""Few-shot: how well a handful of labelled images a class do, with nothing trained."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitds import rng
from vitds.evaluate.answers import Answers, answers_of
from vitds.evaluate.features import check_labelled, check_same_width
from vitds.rng import Purpose

SHOTS = (1, 2, 5, 10)
REPEATS = 5


def few_shot(
    bank_MD: Float[Tensor, "M D"],
    bank_label_M: Int[Tensor, "Ml"],
    query_QD: Float[Tensor, "Q Dq"],
    query_label_Q: Int[Tensor, "Ql"],
    *,
    shots: int,
    classes: int,
) -> list[Answers]:
    """Classify each query by the nearest class mean of `shots` images a class, REPEATS times.

    Features are L2-normalised, and so are the means; the nearest has the highest cosine similarity. A class
    with fewer images gives all it has, one without images is never answered.

    Args:
        shots: images of a class. Their draw is keyed by the repeat and the image's position in the bank, so
            it is the same for every model; the images of fewer shots are among those of more.
    Returns: the answers of each repeat.
    Raises: ValueError if bank or query is empty, or a label is outside 0..classes-1. ShapeError if lengths or
        widths differ. NumericsError if a feature is not finite (names the image).
    Source: nearest class means after SimpleShot (Wang et al. 2019, arXiv:1911.04623).
    """
    check_labelled("bank", bank_MD, bank_label_M, classes)
    check_labelled("query", query_QD, query_label_Q, classes)
    check_same_width(bank_MD, query_QD)
    unit_MD, unit_QD = (F.normalize(rows.double().cpu(), dim=1) for rows in (bank_MD, query_QD))
    label_M, found = bank_label_M.cpu().long().numpy(), []
    for repeat in range(REPEATS):
        taken = torch.from_numpy(draw_shots(label_M, shots, repeat))
        sums_CD = torch.zeros(classes, unit_MD.shape[1], dtype=torch.float64)
        sums_CD.index_add_(0, bank_label_M.cpu().long()[taken], unit_MD[taken])
        score_QC = unit_QD @ F.normalize(sums_CD, dim=1).T
        is_empty = np.bincount(label_M, minlength=classes) == 0
        score_QC[:, torch.from_numpy(is_empty)] = -torch.inf
        found.append(answers_of(score_QC, query_label_Q))
    return found


def draw_shots(label_M: NDArray[np.int64], shots: int, repeat: int) -> NDArray[np.int64]:
    """Positions of `shots` images of each class, or of all it has."""
    word_M = rng.words(Purpose.FEW_SHOT, repeat, np.arange(len(label_M)))
    order = np.lexsort((word_M, label_M))  # by class, and within it as drawn
    first_of_class = np.searchsorted(label_M[order], label_M[order])
    return order[np.arange(len(order)) - first_of_class < shots]
