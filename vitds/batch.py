"""The frozen records that travel from the loader to `backward()`, and the legend of shapes.

Legend: B images in a micro batch, V views of an image, M = B·V rows that enter the backbone, D feature width,
N instances, n rows of the instance head on this rank, C classes, R ranks, A accumulation steps, H W pixels, S
crop side. K images a chunk, G images a step; a step is G / K chunks, cut in order; rank r takes chunks
[r·A·m, (r+1)·A·m), m a micro batch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from numpy.typing import NDArray
from torch import Tensor

R = TypeVar("R")


def each_tensor(record: R, change: Callable[[Tensor], Tensor]) -> R:
    """A record like this one, each tensor in it, and in what it holds, changed."""
    if isinstance(record, Tensor):
        return change(record)
    if isinstance(record, tuple):
        return tuple(each_tensor(part, change) for part in record)
    if is_dataclass(record):
        parts = {field.name: getattr(record, field.name) for field in fields(record)}
        return replace(record, **{name: each_tensor(part, change) for name, part in parts.items()})
    return record  # a name, a number


@dataclass(frozen=True)
class CutMixBox:
    """Rows top:bottom and columns left:right come from the partner; `lam` is the share of pixels that stay.

    Scalars or arrays alike.
    """

    top: NDArray[np.int64]
    bottom: NDArray[np.int64]
    left: NDArray[np.int64]
    right: NDArray[np.int64]
    lam: NDArray[np.float64]


@dataclass(frozen=True)
class Mixing:
    """How the M crops of a micro batch are mixed; rows stand in the order (chunk, view, image).

    Attributes:
        kind: none, cutmix or mixup.
        partner: the row of each row's partner, in the same chunk.
        box: top, bottom, left and right of what comes from the partner, the same for all rows of a chunk and
            group; empty where nothing is cut.
        lam: the share of the own image; 1 where nothing is mixed.
    """

    kind: str
    partner: Int[Tensor, "M"]
    box: Int[Tensor, "4 M"]
    lam: Float[Tensor, "M"]


@dataclass(frozen=True)
class Masks:
    """What drop path and patch drop do to the M crops of a micro batch.

    Attributes:
        factors: of each layer with drop path: 0, or what a kept branch is scaled by.
        kept: of each layer with patch drop, the patches of each crop that stay, in the order of the image.
    """

    factors: tuple[Float[Tensor, "M"], ...]
    kept: tuple[Int[Tensor, "M kept"], ...]


@dataclass(frozen=True)
class Draws:
    """What a step needs to know of a micro batch beside its crops, all known before any pixel is."""

    mixing: Mixing
    targets: Targets
    masks: Masks


@dataclass(frozen=True)
class CropBatch:
    """What the loader delivers for one micro step of one rank.

    It lies on the host; a loader that copies ahead has brought crops and draws to the card that trains.

    Attributes:
        crops: uint8 RGB planes, views in group order.
        index: position of each image in its file, 0..N-1: the instance label.
        label: class of each image, -1 where the file has none.
        is_real: False for the repeats that pad the last step of an epoch.
        step: optimizer step since the start of the run.
        first_chunk: number of the batch's first chunk within that step.
        real_images: real images in the whole step, over all ranks.
        draws: made with the crops, ahead of the step; None: whoever needs them draws.
        sheet: the memory in which all draws lie, one after the other.
    """

    crops: UInt8[Tensor, "B V 3 S S"]
    index: Int[Tensor, "B"]
    label: Int[Tensor, "B"]
    is_real: Bool[Tensor, "B"]
    epoch: int
    step: int
    first_chunk: int
    real_images: int
    draws: Draws | None = None
    sheet: UInt8[Tensor, "bytes"] | None = None


# A batch without draws -> its draws, on the host; any thread may call it.
Drawing = Callable[[CropBatch], Draws]


@dataclass(frozen=True)
class Targets:
    """Two targets a row, mixed by `lam`, and the row's weight in the step's loss.

    The loss of a step is the sum over all rows of all ranks of weight · row loss; a padded row has weight 0,
    a real row of a group with v views 1 / (v · real images of the step). So each group's rows weigh 1
    together.

    Attributes:
        group: number of each row's view group, 0..groups-1.
        groups: how many there are.
    """

    a: Int[Tensor, "M"]
    b: Int[Tensor, "M"]
    lam: Float[Tensor, "M"]
    weight: Float[Tensor, "M"]
    group: Int[Tensor, "M"]
    groups: int = 1

    @property
    def is_real(self) -> Bool[Tensor, "M"]:
        """False for the crops of images that pad a step or could not be decoded."""
        # No field of its own: a real crop's weight is never 0.
        return self.weight > 0

    def part_of_mean(self, losses_M: Float[Tensor, "M"]) -> Float[Tensor, ""]:
        """What these crops add to the mean of all real crops' losses in the step, float64.

        It is for groups of equal size.
        """
        # Each group's weights sum to 1 over the step, so dividing by the groups makes one mean of all crops.
        return (losses_M * self.weight).double().sum() / self.groups

    def sums_by_group(self, losses_M: Float[Tensor, "M"]) -> Float[Tensor, "groups"]:
        """The weighted sum of the rows' losses in each group, float64."""
        # float64 from here: parts of many ranks and micro steps are added, in an order that ranks change.
        weighted_M = (losses_M * self.weight).double()
        # (M,) -> (G,), by each crop's group.
        return weighted_M.new_zeros(self.groups).index_add(0, self.group, weighted_M)


@dataclass(frozen=True)
class TrainBatch:
    """What enters the engine: images and their targets, on the device that trains.

    The images are normalised, and mixed where the method wants it. Rows stand in the order
    (chunk, view, image).
    """

    images: Float[Tensor, "M 3 S S"]
    targets: Targets

    @property
    def device(self) -> torch.device:
        return self.images.device
