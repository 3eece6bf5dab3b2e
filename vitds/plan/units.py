"""What a training costs in forward units, so that methods and arms can be given equal compute.

One unit is a forward pass of the backbone over one crop of 224 x 224 pixels. Smaller crops count by their
pixels, dropped patches not at all. Heads, projectors and the cutting of crops are not counted.
"""

from __future__ import annotations

import torch

from vitds.config.methods import METHODS
from vitds.config.tree import Settings
from vitds.data.order import steps_per_epoch
from vitds.models.build import build_backbone, patch_count
from vitds.models.stochastic import kept_patches

UNIT_PX = 224 * 224
STEP_FORWARDS = 3  # of training on a view: one forward pass, and two for the gradients


def units_of_epoch(settings: Settings, images: int) -> float:
    """Of one pass over the training images, with those that pad its last step.

    Args:
        settings: of the training.
        images: N, the images that it trains on.
    """
    batch, views = settings.batch, settings.views
    seen = steps_per_epoch(images, batch.global_images) * batch.global_images
    taught = {"nothing": 0, "first group": views.groups[0].views, "all": views.count}
    # A teacher sees all patches.
    trained = STEP_FORWARDS * views.count * kept_share(settings)
    an_image = trained + taught[METHODS[settings.method].teacher_sees]
    return seen * an_image * views.crop_px**2 / UNIT_PX


def kept_share(settings: Settings) -> float:
    """Of a crop's patches, those that training sees: whole patches, so not always 1 - backbone.patch_drop."""
    if not settings.backbone.patch_drop:
        return 1.0
    with torch.device("meta"):
        patches = patch_count(build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0))
    return kept_patches(patches, settings.backbone.patch_drop) / patches
