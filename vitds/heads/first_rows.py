"""`head.init: features`: the instance head starts as a classifier by nearest feature.

One pass over the images makes its rows. They are a function of the images and the backbone's first weights
alone; a resumed run takes its rows from the checkpoint.

Source: the raw-feature initialisation of "Train a one-million-way instance classifier" (arXiv:2102.04848).
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vitds import dist
from vitds.errors import DataError
from vitds.heads.dense import INIT_STD, DenseHead
from vitds.heads.sharded import ShardedHead

SAME = 1e-6  # of the features' size: what rounding alone makes of equal images


@torch.no_grad()
def set_rows_from_features(
    head: DenseHead | ShardedHead,
    x_nD: Float[Tensor, "n D"],
    index_n: Int[Tensor, "n"],
    device: torch.device,
) -> None:
    """Each row becomes its image's feature, less the mean of all.

    All are then scaled to the deviation that noise would have. The mean is taken out because the features of
    an untrained backbone hardly differ: what they share says nothing of which image it is. Called by every
    rank together.

    Raises: DataError if all features are the same.

    Args:
        x_nD: features of the images whose rows the head holds here, float32, on the host; changed in place,
            for a rank may hold a million of them.
        index_n: the images' numbers. A row whose image is not among them starts at zero.
        device: on which the ranks' collectives run.
    """
    squares = torch.linalg.vector_norm(x_nD, dtype=torch.float64).square()
    # One collective for all three: sum (D,), sum of squares, number of images. A dense head's images are
    # counted by each rank, which changes none of the ratios below.
    images = squares.new_full((), len(x_nD))
    sums = torch.cat([x_nD.sum(0, dtype=torch.float64), torch.stack([squares, images])])
    sums = dist.all_reduce_sum(sums.to(device)).cpu()
    total_D, squares, images = sums[:-2], sums[-2], sums[-1]
    mean_D = total_D / images
    # Of the features without their mean: the mean of all squares less that of the squared means.
    deviation = (squares / images / len(mean_D) - mean_D.square().mean()).sqrt()
    if not deviation > SAME * (squares / images / len(mean_D)).sqrt():
        raise DataError(
            "head.init features: all training images have the same features, so they are one image, or "
            "copies of one; add others, or set head.init=noise"
        )
    x_nD.sub_(mean_D.float()).mul_(INIT_STD / deviation)
    head.weight.zero_()
    # A dense head may still lie on the host here, while the images were seen on a GPU.
    head.weight[(index_n - head.first).to(head.weight.device)] = x_nD.to(head.weight)
