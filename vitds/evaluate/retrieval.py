"""Retrieval: are the bank's images that lie nearest to a query of its class?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitds.evaluate.classify import NOWHERE
from vitds.evaluate.features import check_labelled, check_same_width

SIMILARITIES_HELD = 2**22  # at once: sorting them takes their order and some sums beside them

RECALL_AT = (1, 5, 10)


@dataclass(frozen=True, eq=False)
class Found:
    """What each query found.

    Attributes:
        precision_Q: average precision, 0..1: of each image of the query's class in the bank the share of its
            class among those up to it, averaged. 0 where the bank has none.
        first_Q: how many images of the bank are nearer than the nearest one of the query's class; NOWHERE
            where the bank has none.
    """

    precision_Q: NDArray[np.float64]
    first_Q: NDArray[np.int64]

    @property
    def mean_precision(self) -> float:
        """mAP, in percent."""
        return 100 * float(self.precision_Q.mean())

    def recall(self, at: Sequence[int] = RECALL_AT) -> dict[int, float]:
        """Percent of the queries with an image of their class among so many nearest."""
        return {k: 100 * float((self.first_Q < k).mean()) for k in at}


def retrieve(
    bank_MD: Float[Tensor, "M D"],
    bank_label_M: Int[Tensor, "Ml"],
    query_QD: Float[Tensor, "Q Dq"],
    query_label_Q: Int[Tensor, "Ql"],
    *,
    classes: int,
) -> Found:
    """Rank the whole bank by cosine similarity to each query; equals stand in the bank's order.

    A query that is in the bank finds itself: give disjoint sets. Time grows with Q · M · log M.

    Raises: ValueError if bank or query is empty, or a label is outside 0..classes-1. ShapeError if lengths or
        widths differ. NumericsError if a feature is not finite (names the image).
    """
    check_labelled("bank", bank_MD, bank_label_M, classes)
    check_labelled("query", query_QD, query_label_Q, classes)
    check_same_width(bank_MD, query_QD)
    bank_MD, bank_label_M = F.normalize(bank_MD.float(), dim=1), bank_label_M.to(bank_MD.device)
    block = max(1, SIMILARITIES_HELD // len(bank_MD))
    precisions, firsts = [], []
    for query_BD, label_B in zip(query_QD.split(block), query_label_Q.split(block), strict=True):
        similarity_BM = F.normalize(query_BD.float(), dim=1) @ bank_MD.T
        order_BM = similarity_BM.sort(dim=1, descending=True, stable=True).indices
        is_own_BM = bank_label_M[order_BM] == label_B.to(bank_MD.device)[:, None]
        place_M = torch.arange(1, len(bank_MD) + 1, device=bank_MD.device, dtype=torch.float64)
        share_BM = is_own_BM.cumsum(1) / place_M  # of the query's class among the images up to here
        own_B = is_own_BM.sum(1)
        precisions.append(((share_BM * is_own_BM).sum(1) / own_B.clamp_min(1)).cpu())
        firsts.append(is_own_BM.int().argmax(1).masked_fill(own_B == 0, NOWHERE).cpu())
    return Found(torch.cat(precisions).double().numpy(), torch.cat(firsts).numpy())
