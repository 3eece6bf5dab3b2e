"""BatchNorm's statistics of trained weights, measured anew for evaluation (arXiv:2105.07576)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vitds import rng
from vitds.augment.images import normalise
from vitds.config.tree import Settings
from vitds.data.beton import BetonFile
from vitds.data.loader import eval_batches
from vitds.models.precision import AUTOCAST
from vitds.rng import Purpose

IMAGES = 8192  # of which the statistics are taken
BATCH_IMAGES = 256
BATCH_PX = BATCH_IMAGES * 224**2  # larger crops go in smaller batches


def measure_norms(
    settings: Settings,
    backbone: nn.Module,
    file: BetonFile,
    device: torch.device,
    *,
    on_batch: Callable[[], None] = lambda: None,
) -> None:
    """Set the running statistics of a backbone's BatchNorm layers to those of training images, in place.

    Those that training leaves are of its last few batches alone, and of crops that are coloured, mixed and
    cut small, which evaluation never sees. Here they are the means over batches of up to IMAGES images as
    evaluation cuts them. Every rank computes the same. A backbone without BatchNorm stays as it is, and so
    does one that was trained on one image, which alone has no variance.

    Args:
        settings: of the run: views, precision, seed.
        backbone: on `device`.
        file: the training images.
        on_batch: called before each.
    Raises: DataError if an image cannot be decoded and data.damaged is fatal.
    """
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms or file.images == 1:
        return
    backbone.eval()
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean over all batches, each counting alike
        norm.train()
    # At random: files lie class by class, and the variance within a class is too small. Whole batches, of a
    # size that nothing changes but the crops' side: the variance within a batch depends on it.
    batch_images = min(max(2, BATCH_PX // settings.views.crop_px**2), BATCH_IMAGES, file.images)
    taken = min(IMAGES, file.images) // batch_images * batch_images
    indices = rng.permutation(file.images, Purpose.NORMS, settings.seed)[:taken]
    autocast = AUTOCAST.get(settings.engine.precision)
    batches = eval_batches(
        file, settings.views, batch_images=batch_images, indices=indices, damaged=settings.data.damaged
    )
    for batch in batches:
        on_batch()
        if len(batch.index) == 1:  # the others of its batch cannot be decoded
            continue
        with torch.no_grad(), torch.autocast(device.type, autocast, enabled=autocast is not None):
            backbone(normalise(batch.crops.to(device), settings.views))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
