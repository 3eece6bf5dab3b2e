"""Weighted nearest neighbours on frozen features: the accuracy that needs no training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from vitds.evaluate.answers import Answers, answers_of, joined
from vitds.evaluate.features import check_labelled, check_same_width

# Similarities (float32) held at once, 128 MB: bounds memory whatever the sizes of bank and query.
SIMILARITIES_HELD = 2**25


@dataclass(frozen=True)
class KnnScore:
    """In percent of the queries.

    Attributes:
        neighbours: how many voted: the k asked for, or the whole bank where that is smaller.
    """

    top1: float
    top5: float
    neighbours: int


def knn_answers(
    bank_MD: Float[Tensor, "M D"],
    bank_label_M: Int[Tensor, "Ml"],
    query_QD: Float[Tensor, "Q Dq"],
    query_label_Q: Int[Tensor, "Ql"],
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    classes: int,
) -> dict[int, Answers]:
    """Classify each query by its k nearest bank images, for each k asked for.

    Features are L2-normalised; a neighbour of cosine similarity s votes exp(s / temperature) for its class;
    ties between classes go to the lower one. A class without a vote is no hit, so with fewer than five voted
    classes top-5 counts those alone (DINO's script fills the places with arbitrary classes). A query that is
    in the bank finds itself: give disjoint sets.

    The product runs on the device of the features, a block of queries at a time (`SIMILARITIES_HELD`); votes
    are summed on the host in float64, so that their order on a device does not matter.

    Returns: the answers for each k, under the k that was asked for; a k above the bank's size is clipped.
    Raises: ValueError if k is empty or below 1, temperature is not positive, bank or query is empty, or a
        label is outside 0..classes-1. ShapeError if lengths or widths differ. NumericsError if a feature is
        not finite (names the image).
    Source: Wu et al. 2018 (arXiv:1805.01978), as in DINO's eval_knn.py (Caron et al. 2021). Reference:
        tests/evaluate/test_knn.py.
    """
    if not k or min(k) < 1:
        raise ValueError(f"k must be one or more numbers of neighbours, each at least 1; got {list(k)}")
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    check_labelled("bank", bank_MD, bank_label_M, classes)
    check_labelled("query", query_QD, query_label_Q, classes)
    check_same_width(bank_MD, query_QD)
    bank_MD, bank_label_M = F.normalize(bank_MD.float(), dim=1), bank_label_M.cpu()
    neighbours = {asked: min(asked, len(bank_MD)) for asked in k}
    parts: dict[int, list[Answers]] = {asked: [] for asked in k}
    block = max(1, SIMILARITIES_HELD // max(len(bank_MD), classes))
    for query_BD, label_B in zip(query_QD.split(block), query_label_Q.cpu().split(block), strict=True):
        nearest = (F.normalize(query_BD.float(), dim=1) @ bank_MD.T).topk(max(neighbours.values()), dim=1)
        similarity_Bk, class_Bk = nearest.values.double().cpu(), bank_label_M[nearest.indices.cpu()].long()
        # Relative to the nearest, which changes no ranking and cannot overflow at a small temperature.
        vote_Bk = ((similarity_Bk - similarity_Bk[:, :1]) / temperature).exp()
        for asked, count in neighbours.items():
            votes_BC = torch.zeros(len(label_B), classes, dtype=torch.float64)
            votes_BC.scatter_add_(1, class_Bk[:, :count], vote_Bk[:, :count])
            # The logarithm makes no vote -inf, which is no hit.
            parts[asked].append(answers_of(votes_BC.log(), label_B))
    return {asked: joined(parts[asked]) for asked in k}


def knn_accuracy(
    bank_MD: Float[Tensor, "M D"],
    bank_label_M: Int[Tensor, "Ml"],
    query_QD: Float[Tensor, "Q Dq"],
    query_label_Q: Int[Tensor, "Ql"],
    *,
    k: Sequence[int],
    temperature: float = 0.07,
    classes: int,
) -> dict[int, KnnScore]:
    """Top-1 and top-5 of `knn_answers`, for each k asked for."""
    answers = knn_answers(
        bank_MD, bank_label_M, query_QD, query_label_Q, k=k, temperature=temperature, classes=classes
    )
    return {
        asked: KnnScore(found.top(1), found.top(5), min(asked, len(bank_MD)))
        for asked, found in answers.items()
    }
