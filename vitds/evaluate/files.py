"""Features of a whole .beton file, the ranks sharing the work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import chain

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from vitds import dist
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import EvalBatch, TrainLoader, eval_batches
from vitds.errors import DataError
from vitds.evaluate.features import Features, ImageBatch, extract_features
from vitds.models.precision import AUTOCAST


def file_features(
    settings: Settings,
    model: nn.Module,
    file: BetonFile,
    device: torch.device,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> Features:
    """What a model says of every image of a file, in the file's order, on every rank; each rank has made its
    share. Where data.damaged is skip, images that cannot be decoded are missing, with a warning.

    Args:
        settings: of the run: views, precision, images of a forward pass.
        model: moved to `device`.
        on_batch: called with each batch of this rank.
    Raises: DataError if an image cannot be decoded and data.damaged is fatal, or none can be used; what
        `extract_features` raises.
    """
    batches = eval_batches(
        file,
        settings.views,
        batch_images=settings.eval.batch_images,
        rank=dist.rank(),
        ranks=dist.world_size(),
        damaged=settings.data.damaged,
    )
    own = None
    if (first := next(batches, None)) is not None:  # with more ranks than images some have none
        found = _extracted(settings, model, _each_with(on_batch, chain([first], batches)), device)
        own = found.rows_MD.numpy(), found.label_M.numpy(), found.index_M.numpy()
    parts = [part for part in dist.gather_objects(own) if part is not None]
    if not any(len(index) for *_, index in parts):
        raise DataError(f"{file.path}: none of its {file.images} images can be used")
    rows, labels, index = (
        torch.cat([torch.from_numpy(part[column]) for part in parts]) for column in range(3)
    )
    order = index.argsort()
    return Features(rows[order], labels[order], index[order])


def _each_with(on_batch: Callable[[], None], batches: Iterable[EvalBatch]) -> Iterator[EvalBatch]:
    """The same batches, with a call before each."""
    for batch in batches:
        on_batch()
        yield batch


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
