"""`head.init: features`: the instance head starts as a classifier by nearest feature, from one pass over the images.

Source: the raw-feature initialisation of "Train a one-million-way instance classifier" (arXiv:2102.04848). It is a function of the
images and the backbone's first weights alone; a resumed run takes its rows from the checkpoint.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from vitds import dist
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import eval_batches
from vitds.evaluate.features import extract_features
from vitds.heads import DenseHead, ShardedHead
from vitds.heads.dense import INIT_STD
from vitds.models.precision import AUTOCAST


@torch.no_grad()
def set_rows_from_features(
    backbone: nn.Module,
    head: DenseHead | ShardedHead,
    file: BetonFile,
    settings: Settings,
    device: torch.device,
) -> None:
    """Each row becomes the feature of its image's central crop, less the mean of all, scaled to the deviation that noise would have.

    A rank reads the images of the rows that it holds, so all of them where the head is dense. The mean is taken out because the
    features of an untrained backbone hardly differ: what they share says nothing of which image it is.
    Raises: DataError if an image cannot be decoded and data.damaged is fatal; where it is skipped, its row starts at zero.
    """
    batches = eval_batches(
        file, settings.views, batch_images=settings.eval.batch_images, indices=np.arange(head.first, head.last),
        damaged=settings.data.damaged,
    )  # fmt: skip
    found = extract_features(
        backbone.to(device), batches,
        mean=settings.views.mean, std=settings.views.std, device=device, autocast=AUTOCAST.get(settings.engine.precision),
    )  # fmt: skip
    x_nD = found.rows_MD  # changed in place: a rank may hold a million of them
    squares = torch.linalg.vector_norm(x_nD, dtype=torch.float64).square()
    sums = torch.cat([x_nD.sum(0, dtype=torch.float64), torch.tensor([squares, len(x_nD)])])
    *total, squares, images = dist.all_reduce_sum(sums.to(device)).tolist()
    mean_D = torch.tensor(total, dtype=torch.float64) / images
    deviation = (squares / images / len(mean_D) - mean_D.square().mean()).sqrt()
    x_nD.sub_(mean_D.float()).mul_(INIT_STD / deviation)
    head.weight.zero_()
    head.weight[(found.index_M - head.first).to(device)] = x_nD.to(head.weight)
