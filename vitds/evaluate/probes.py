"""Cheap figures that tell, during pretraining, what the features are becoming; none needs class labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from vitds.errors import ShapeError
from vitds.evaluate.features import check_finite

# Rows whose distances to all others are held at once.
BLOCK_ROWS = 256
ROUNDING = 1e-6  # of features in float32, beside their size


def alignment(first_MD: Float[Tensor, "M D"], second_MD: Float[Tensor, "M2 D2"]) -> float:
    """Mean squared distance of two views of each image, on the unit sphere: 0 (views agree) to 4.

    Args:
        first_MD: row i is a view of image i.
        second_MD: row i is another.
    Raises: ValueError if there are no rows. ShapeError if the shapes differ. NumericsError if a feature is
        not finite.
    Source: Wang and Isola 2020 (arXiv:2005.10242), alpha = 2.
    """
    if first_MD.shape != second_MD.shape:
        raise ShapeError(
            f"alignment: the first views are {tuple(first_MD.shape)}, the second {tuple(second_MD.shape)}; "
            "row i pairs with row i"
        )
    for rows_MD in (first_MD, second_MD):
        _check_rows("alignment", rows_MD, at_least=1)
    distance_MD = _on_sphere(first_MD) - _on_sphere(second_MD)
    return float(distance_MD.square().sum(1).mean())


def uniformity(rows_MD: Float[Tensor, "M D"]) -> float:
    """Log of the mean of exp(-2 · squared distance) over pairs of different images: 0 (all equal) to near -4.

    Distances are on the unit sphere.

    Time grows with M²; memory is `BLOCK_ROWS` · M numbers.

    Raises: ValueError if there are fewer than two rows. NumericsError if a feature is not finite.
    Source: Wang and Isola 2020 (arXiv:2005.10242), t = 2.
    """
    _check_rows("uniformity", rows_MD, at_least=2)
    unit_MD, blocks = _on_sphere(rows_MD), []
    for start in range(0, len(unit_MD), BLOCK_ROWS):
        exponent_BM = -2 * (2 - 2 * unit_MD[start : start + BLOCK_ROWS] @ unit_MD.T)
        exponent_BM.diagonal(start).fill_(-torch.inf)  # an image is no pair with itself
        blocks.append(exponent_BM.flatten().logsumexp(0))
    pairs = len(unit_MD) * (len(unit_MD) - 1)
    return float(torch.stack(blocks).logsumexp(0) - torch.tensor(pairs, dtype=torch.float64).log())


def rankme(rows_MD: Float[Tensor, "M D"], *, is_centred: bool = False) -> float:
    """Smooth rank of the features: exp of the entropy of their normalised singular values, 1 to min(M, D).

    Args:
        rows_MD: not normalised.
        is_centred: without their mean, which is most of what features behind a ReLU have in common. The paper
            leaves it in.
    Raises: ValueError if there are no rows. NumericsError if a feature is not finite.
    Source: RankMe, Garrido et al. 2023 (arXiv:2210.02885), with their eps = 1e-7.
    """
    _check_rows("rankme", rows_MD, at_least=1)
    rows_MD = rows_MD.double()
    if is_centred:
        away_MD = rows_MD - rows_MD.mean(0)
        # Features that are all equal differ by rounding, which has all directions.
        rows_MD = away_MD * (away_MD.norm() > ROUNDING * rows_MD.norm())
    singular = torch.linalg.svdvals(rows_MD)
    share = singular / singular.sum().clamp_min(torch.finfo(torch.float64).tiny) + 1e-7
    return float((-share * share.log()).sum().exp())


def _on_sphere(rows_MD: Float[Tensor, "M D"]) -> Float[Tensor, "M D"]:
    return F.normalize(rows_MD.double(), dim=1)


def _check_rows(what: str, rows_MD: Float[Tensor, "M D"], at_least: int) -> None:
    if len(rows_MD) < at_least:
        raise ValueError(f"{what} needs {at_least} image{'s' * (at_least > 1)} or more, got {len(rows_MD)}")
    check_finite(what, rows_MD)
