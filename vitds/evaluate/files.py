"""Features of a whole .beton file, the ranks sharing the work."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from vitds import dist
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import EvalBatch, TrainLoader, eval_batches
from vitds.evaluate.features import Features, ImageBatch, extract_features
from vitds.models.precision import AUTOCAST


def file_features(settings: Settings, model: nn.Module, file: BetonFile, device: torch.device) -> Features:
    """What a model says of every image of a file, in the file's order, on every rank; each rank has made its
    share. Where data.damaged is skip, images that cannot be decoded are missing, with a warning.

    Args:
        settings: of the run: views, precision, images of a forward pass.
        model: moved to `device`.
    Raises: DataError if an image cannot be decoded and data.damaged is fatal; what `extract_features` raises.
    """
    batches = eval_batches(
        file,
        settings.views,
        batch_images=settings.eval.batch_images,
        rank=dist.rank(),
        ranks=dist.world_size(),
        damaged=settings.data.damaged,
    )
    own = _extracted(settings, model, batches, device)
    parts = dist.gather_objects((own.rows_MD.numpy(), own.label_M.numpy(), own.index_M.numpy()))
    rows, labels, index = (
        torch.cat([torch.from_numpy(part[column]) for part in parts]) for column in range(3)
    )
    order = index.argsort()
    return Features(rows[order], labels[order], index[order])


def own_features(
    settings: Settings, model: nn.Module, file: BetonFile, indices: NDArray[np.int64], device: torch.device
) -> tuple[Float[Tensor, "n D"], Int[Tensor, "n"]]:
    """What a model says of some images, and which they are; each rank for itself.

    Args:
        indices: positions in the file.
    Raises: DataError if an image cannot be decoded and data.damaged is fatal; where it is skipped, it is
        missing.
    """
    batches = eval_batches(
        file,
        settings.views,
        batch_images=settings.eval.batch_images,
        indices=indices,
        damaged=settings.data.damaged,
    )
    found = _extracted(settings, model, batches, device)
    return found.rows_MD, found.index_M


def crop_features(
    settings: Settings, model: nn.Module, file: BetonFile, epochs: int, device: torch.device
) -> tuple[Float[Tensor, "n E D"], Int[Tensor, "n"]]:
    """What a model says of the un-mixed training crops of the first epochs, and of which images.

    Args:
        settings: of the run: its views and its seed draw the crops, the same at every call.
        file: its training images.
        epochs: how many; each has V crops of an image, E in all, in the order of epochs and views.
    Raises: DataError if an image cannot be decoded and data.damaged is fatal; where it is skipped, it is
        missing.
    """
    loader = TrainLoader(file, settings, rank=0, ranks=1, micro_images=settings.batch.micro_images)
    found = _extracted(settings, model, _view_by_view(loader, epochs), device)
    # An image's crops come in their order, and stable sorting leaves them in it.
    order = found.index_M.argsort(stable=True)
    crops = epochs * settings.views.count
    return found.rows_MD[order].unflatten(0, (-1, crops)), found.index_M[order][::crops]


def _view_by_view(loader: TrainLoader, epochs: int) -> Iterator[EvalBatch]:
    for batch in loader.batches(0, epochs * loader.steps_per_epoch):
        for view in range(batch.crops.shape[1]):
            is_real = batch.is_real
            if is_real.any():  # a micro step of the last step may hold nothing but padding
                yield EvalBatch(batch.crops[is_real, view], batch.index[is_real], batch.label[is_real])


def _extracted(
    settings: Settings, model: nn.Module, batches: Iterable[ImageBatch], device: torch.device
) -> Features:
    return extract_features(
        model.to(device),
        batches,
        mean=settings.views.mean,
        std=settings.views.std,
        device=device,
        autocast=AUTOCAST.get(settings.engine.precision),
    )
