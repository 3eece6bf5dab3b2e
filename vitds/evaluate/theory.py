"""Whether a head's rows became their images' features: docs/theory.md has the argument behind each figure.

Row i of W and of f belongs to image i: the head's row, and the mean feature over the image's crops. All is in
float64, a block of images at a time: memory is `BLOCK_ROWS` · M numbers, and of pairs those of `PAIR_IMAGES`
images.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from vitds import rng
from vitds.errors import ShapeError
from vitds.evaluate.features import check_finite, check_labelled
from vitds.rng import Purpose

BLOCK_ROWS = 256
PAIR_IMAGES = 2048  # of more images so many are drawn, and all their pairs taken: 2.1 million
NEIGHBOURS = 20
VOTE_TEMPERATURE = 0.07
SMALLEST_DEVIATION = 1e-9  # of cosines: below it they are equal, and the rest is rounding


@dataclass(frozen=True)
class Fidelity:
    """How near each row is to its image's feature.

    Attributes:
        cosine: of row and feature, the mean over images.
        first: percent of the images to which no other row is nearer than their own, by cosine.
    """

    cosine: float
    first: float


@dataclass(frozen=True)
class Transfer:
    """Correlation of two tables of similarities, -1 to 1; None where one of them does not vary."""

    pearson: float | None
    spearman: float | None


@dataclass(frozen=True)
class Mass:
    """Where the softmax over images puts what it does not give to the image itself.

    Attributes:
        ratio: the share that images of the same class get, over the share of such images among the others;
            the mean over images. 1 is blind to classes. None where no image has another of its class.
        largest: the ratio if all of it went to the same class.
        off_target: probability that is not the image's own, the mean over images.
    """

    ratio: float | None
    largest: float | None
    off_target: float


@dataclass(frozen=True)
class Embedding:
    """Vectors alone, without images: what their nearest others say of their class.

    Attributes:
        knn: percent of the images that the NEIGHBOURS nearest others classify.
        map: mean average precision of all others, in percent; 0 counts where there is none of the class.
        auc: probability that a pair of one class is more similar than a pair of two; None without both.
    """

    knn: float
    map: float
    auc: float | None


def prototype_fidelity(w_MD: Float[Tensor, "M D"], f_MD: Float[Tensor, "M2 D2"]) -> Fidelity:
    """See `Fidelity`.

    Raises: ShapeError if the shapes differ. NumericsError if a number is not finite.
    """
    w_MD, f_MD = _both_on_sphere(w_MD, f_MD)
    own_M = (w_MD * f_MD).sum(1)
    first = 0.0
    for start in range(0, len(f_MD), BLOCK_ROWS):
        cosine_BM = f_MD[start : start + BLOCK_ROWS] @ w_MD.T
        # Its own from the same product: another order of summation would let it lose to itself.
        nearest_BM = cosine_BM >= cosine_BM.amax(1, keepdim=True)
        # Rows that are equally near share an image: of equal rows each has 1/N of it.
        first += float((nearest_BM.diagonal(start) / nearest_BM.sum(1)).sum())
    return Fidelity(float(own_M.mean()), 100 * first / len(f_MD))


def pair_images(images: int, seed: int) -> NDArray[np.int64]:
    """Which images' pairs are compared: all of them, or PAIR_IMAGES by a keyed draw, in order."""
    if images <= PAIR_IMAGES:
        return np.arange(images)
    return np.sort(rng.permutation(images, Purpose.PAIRS, seed)[:PAIR_IMAGES])


def similarity_transfer(
    w_MD: Float[Tensor, "M D"], f_MD: Float[Tensor, "M2 D2"], *, seed: int = 0
) -> Transfer:
    """Correlation over pairs i < j of cos(w_i, w_j) with cos(f_i, f_j).

    Args:
        w_MD: rows, or features of another time; they may have another width.
        seed: of the draw of images, see `pair_images`.
    Raises: ShapeError if the lengths differ. NumericsError if a number is not finite.
    """
    from scipy.stats import rankdata  # at the top it costs every start half a second

    if len(w_MD) != len(f_MD):
        raise ShapeError(f"{len(w_MD)} rows but features of {len(f_MD)} images; row i belongs to image i")
    taken = pair_images(len(f_MD), seed)
    cosines = [_pair_cosines(rows_MD[taken]) for rows_MD in (w_MD, f_MD)]
    return Transfer(_correlation(*cosines), _correlation(*map(rankdata, cosines)))


def semantic_mass(
    x_MD: Float[Tensor, "M D"],
    w_MD: Float[Tensor, "M D"],
    bias_M: Float[Tensor, "M"] | None,
    label_M: Int[Tensor, "M"],
) -> Mass:
    """See `Mass`.

    Args:
        x_MD: features as the rows are multiplied with, so that the logits are x · w + bias.
        label_M: class of each image; -1 where there is none: such images count in `off_target` alone.
    Raises: NumericsError if a number is not finite.
    """
    check_finite("features", x_MD)
    check_finite("rows", w_MD)
    x_MD, w_MD, is_labelled_M = x_MD.double(), w_MD.double(), label_M >= 0
    ratios, largest, off_target = [], [], 0.0
    for start in range(0, len(x_MD), BLOCK_ROWS):
        logit_BM = x_MD[start : start + BLOCK_ROWS] @ w_MD.T
        logit_BM = logit_BM if bias_M is None else logit_BM + bias_M.double()
        off_target += float((1 - logit_BM.softmax(1).diagonal(start)).sum())
        label_B = label_M[start : start + BLOCK_ROWS]
        same_BM = (label_B[:, None] == label_M) & is_labelled_M
        # What is left to the others of known class. Out before the softmax, for it may be 1e-30.
        for table_BM, nothing in ((logit_BM, -torch.inf), (same_BM, False)):
            table_BM.diagonal(start).fill_(nothing)
        share_B = (logit_BM.masked_fill(~is_labelled_M, -torch.inf).softmax(1) * same_BM).sum(1)
        chance_B = same_BM.sum(1).double() / max(1, int(is_labelled_M.sum()) - 1)
        counted_B = (label_B >= 0) & (chance_B > 0)
        ratios.append(share_B[counted_B] / chance_B[counted_B])
        largest.append(1 / chance_B[counted_B])
    ratio_K, largest_K = torch.cat(ratios), torch.cat(largest)
    return Mass(
        float(ratio_K.mean()) if len(ratio_K) else None,
        float(largest_K.mean()) if len(ratio_K) else None,
        off_target / len(x_MD),
    )


def embedding_score(
    rows_MD: Float[Tensor, "M D"], label_M: Int[Tensor, "M"], *, classes: int, seed: int = 0
) -> Embedding:
    """Each vector among all others, by cosine. See `Embedding`.

    A neighbour of similarity s votes exp(s / 0.07), as in the kNN of test images.

    Args:
        seed: of the draw of images whose pairs count in `auc`, see `pair_images`.
    Raises: ValueError if there are fewer than two vectors, or a label is outside 0..classes-1. NumericsError
        if a number is not finite.
    """
    from sklearn.metrics import roc_auc_score  # at the top it costs every start a second

    check_labelled("embedding", rows_MD, label_M, classes)
    if len(rows_MD) < 2:
        raise ValueError("an embedding of one image has no neighbours")
    unit_MD = F.normalize(rows_MD.double(), dim=1)
    place_M = torch.arange(1, len(unit_MD), dtype=torch.float64)
    hits, precision = 0, 0.0
    for start in range(0, len(unit_MD), BLOCK_ROWS):
        cosine_BM = unit_MD[start : start + BLOCK_ROWS] @ unit_MD.T
        cosine_BM.diagonal(start).fill_(-torch.inf)  # comes last, and is cut off
        ordered = cosine_BM.sort(dim=1, descending=True, stable=True)
        class_BM, label_B = label_M[ordered.indices[:, :-1]].long(), label_M[start : start + BLOCK_ROWS]
        is_own_BM = class_BM == label_B[:, None]
        share_BM = is_own_BM.cumsum(1) / place_M
        precision += float(((share_BM * is_own_BM).sum(1) / is_own_BM.sum(1).clamp_min(1)).sum())
        nearest_Bk = ordered.values[:, : min(NEIGHBOURS, len(unit_MD) - 1)]
        vote_Bk = ((nearest_Bk - nearest_Bk[:, :1]) / VOTE_TEMPERATURE).exp()
        votes_BC = torch.zeros(len(label_B), classes, dtype=torch.float64)
        votes_BC.scatter_add_(1, class_BM[:, : nearest_Bk.shape[1]], vote_Bk)
        hits += int((votes_BC.argmax(1) == label_B).sum())
    taken = pair_images(len(unit_MD), seed)
    first_P, second_P = np.triu_indices(len(taken), 1)
    label_m = label_M.numpy()[taken]
    is_same_P = label_m[first_P] == label_m[second_P]
    has_both = is_same_P.any() and not is_same_P.all()
    auc = float(roc_auc_score(is_same_P, _pair_cosines(unit_MD[taken]))) if has_both else None
    return Embedding(100 * hits / len(unit_MD), 100 * precision / len(unit_MD), auc)


def linear_r2(factor_MK: Float[Tensor, "M K"], f_MD: Float[Tensor, "M D"]) -> float | None:
    """Share of the features' variance that a linear map of the factors gives, 0 to 1.

    Least squares with an intercept, on the same images; factors may depend on one another, as one-hot classes
    do. None where the features do not vary.

    Raises: NumericsError if a number is not finite.
    """
    check_finite("factors", factor_MK)
    check_finite("features", f_MD)
    factor_MK, f_MD = (rows - rows.mean(0) for rows in (factor_MK.double(), f_MD.double()))
    total = float(f_MD.square().sum())
    if total / f_MD.numel() < SMALLEST_DEVIATION**2:
        return None
    # gelsd: the other drivers take factors to be independent.
    found_KD = torch.linalg.lstsq(factor_MK, f_MD, driver="gelsd").solution
    return 1 - float((f_MD - factor_MK @ found_KD).square().sum()) / total


def _both_on_sphere(w_MD: Tensor, f_MD: Tensor) -> tuple[Tensor, Tensor]:
    if w_MD.shape != f_MD.shape:
        raise ShapeError(
            f"the rows are {tuple(w_MD.shape)}, the features {tuple(f_MD.shape)}; row i belongs to image i"
        )
    check_finite("rows", w_MD)
    check_finite("features", f_MD)
    return F.normalize(w_MD.double(), dim=1), F.normalize(f_MD.double(), dim=1)


def _pair_cosines(rows_MD: Float[Tensor, "M D"]) -> NDArray[np.float64]:
    """Of all pairs i < j."""
    check_finite("rows", rows_MD)
    unit_MD = F.normalize(rows_MD.double(), dim=1)
    return (unit_MD @ unit_MD.T).numpy()[np.triu_indices(len(unit_MD), 1)]


def _correlation(a_P: NDArray[np.float64], b_P: NDArray[np.float64]) -> float | None:
    if not len(a_P) or min(a_P.std(), b_P.std()) < SMALLEST_DEVIATION:
        return None
    return float(np.corrcoef(a_P, b_P)[0, 1])
