"""Scores a class -> how often the right class comes first, or among the first five."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitds.evaluate.features import check_labelled

NOWHERE = torch.iinfo(torch.int64).max  # the place of a class without a score


@dataclass(frozen=True)
class TopScore:
    """In percent of the images."""

    top1: float
    top5: float


def top_accuracy(logit_MC: Float[Tensor, "M C"], label_L: Int[Tensor, "L"]) -> TopScore:
    """Share of images whose class has the highest logit, and of those whose class is among the five highest.

    Ties go to the lower class. With five classes or fewer, top-5 is 100 by definition.

    Raises: ValueError if there are no images, or a label is outside 0..C-1. ShapeError if the lengths differ.
        NumericsError if a logit is not finite. Each names the image.
    """
    check_labelled("logits", logit_MC, label_L, logit_MC.shape[1])
    return TopScore(*as_percent(count_hits(logit_MC, label_L), len(logit_MC)))


def count_hits(score_MC: Float[Tensor, "M C"], label_M: Int[Tensor, "M"]) -> Int[Tensor, "2"]:
    """Number of rows whose label has the highest score, and of those whose label is among the five highest.

    Returns: int64, on the host.
    """
    place_M = place_of_label(score_MC, label_M)
    return torch.stack([(place_M < places).sum() for places in (1, 5)])


def place_of_label(score_MC: Float[Tensor, "M C"], label_M: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
    """How many classes come before the right one; 0: it has the highest score.

    Ties go to the lower class, so that the place does not depend on a sorting routine. A score of -inf has
    the place NOWHERE: it is never a hit.

    Returns: int64, on the host.
    """
    label_M1 = label_M.to(score_MC.device)[:, None].long()
    own_M1 = score_MC.gather(1, label_M1)
    is_lower_class = torch.arange(score_MC.shape[1], device=score_MC.device) < label_M1
    ahead_M = ((score_MC > own_M1) | ((score_MC == own_M1) & is_lower_class)).sum(1)
    return ahead_M.masked_fill(own_M1[:, 0] == -torch.inf, NOWHERE).cpu()


def as_percent(hits: Int[Tensor, "2"], images: int) -> tuple[float, float]:
    """Counts of hits -> percent of the images."""
    top1, top5 = (100 * hits.double() / images).tolist()
    return top1, top5
