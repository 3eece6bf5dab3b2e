"""The contract between a method and the training loop. The loop knows this page and no method by name.

    CropBatch --prepare--> TrainBatch --losses--> this rank's part of each term (T,)
                                                      |
                           after_update <-- update <-- backward

Rules that keep a step the same on any number of ranks and micro steps, and a resume exact:
- Images see each other within a chunk only: its K images lie whole in one micro batch of one rank.
- Crops of padded images (weight 0) enter no loss and no statistic, and are nobody's negative or partner.
- Random numbers are keyed draws (vitds/rng.py); what changes along the run is a function of the step
  (vitds/schedule.py).
- Losses are float32 outside autocast; a term is summed in float64.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor, nn

from vitds import rng
from vitds.augment.mix import NO_MIX, plain_batch
from vitds.batch import CropBatch, TrainBatch
from vitds.config.tree import Mix, Settings
from vitds.heads import ShardedHead
from vitds.heads.bytes import Activations
from vitds.rng import Purpose

Forward = Callable[..., Tensor]  # the engine around `module`: called like the module's own forward


# Positions in the training file -> features (n, D) of their central crops, float32 on the host, and the
# positions of those images (n,): one that cannot be decoded and may be left out is missing.
FeaturesOf = Callable[[NDArray[np.int64]], tuple[Tensor, Tensor]]


class SetSize(NamedTuple):
    """What a method may ask of a training set before it is built."""

    images: int
    classes: int


def added_parts(settings: Settings) -> AbstractContextManager[None]:
    """Inside, torch draws first weights for what a method adds to the backbone, as a function of the seed."""
    # With 0 it is the backbone, with 1 a head's rows.
    return rng.seeded_torch(Purpose.INIT, settings.seed, 2)


class Method(ABC):
    """One method, built for one run on one rank.

    Attributes:
        needs_labels: whether the target of a crop is its image's class, so that the training file must have
            class labels; else it is the image's number.
        leaves_class_head: whether `module.head` classifies into the file's classes and is saved with the run.
        has_teacher: whether a frozen copy in `module` follows the weights that train.
        weights_prefix: of the weights in `module` that are evaluated and leave the run.
        terms: names of the loss's terms, in the order of `losses`.
        module: what the engine owns, built whole from the seed. Its `backbone` gets drop path and patch drop.
        outside: heads that train beside the engine, their rows spread over the ranks.
        lr_scales: for parameters whose names begin so, what their learning rate is multiplied by.
        held_epochs: for parameters whose names begin so, the epochs from the start of the run in which they
            stay as they are.
        about: what trains beside the backbone, in a few words for the line at a run's start.
    """

    needs_labels: ClassVar[bool] = False
    leaves_class_head: ClassVar[bool] = False
    has_teacher: ClassVar[bool] = False
    weights_prefix: ClassVar[str] = "backbone."

    terms: tuple[str, ...]
    module: nn.Module
    outside: tuple[ShardedHead, ...] = ()
    lr_scales: dict[str, float] = {}
    held_epochs: dict[str, int] = {}
    about: str

    @abstractmethod
    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        """Build `module` and say what it is in `about`.

        Args:
            settings: resolved; no `auto` is left.
            backbone: whole, with its first weights; the method owns it from here.
            rows: what `rows` says for the training set.
        """

    @staticmethod
    def rows(size: SetSize) -> int:
        """Rows of the classifier that trains: N instances, C classes, or 0 where there is none."""
        return 0

    @staticmethod
    def resolve(settings: Settings, rows: int, width: int) -> Settings:
        """The settings with each `auto` of the method's own filled in.

        Args:
            rows: see `rows`.
            width: D of the backbone.
        Raises: SettingsError if the method cannot do what is asked for.
        """
        return settings

    @staticmethod
    def mix(settings: Settings) -> Mix:
        """How `prepare` mixes crops, so that the draws are made ahead of a step; most methods mix nothing."""
        return NO_MIX

    @staticmethod
    def prepare(
        batch: CropBatch, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> TrainBatch:
        """Crops on the host -> normalised images and their targets on the device that trains.

        Here: the crops as they are, each with the number of its image.

        Args:
            dtype: of the images.
        """
        return plain_batch(
            batch, settings.views, chunk_images=settings.batch.chunk_images, device=device, dtype=dtype
        )

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """What the loss of a micro batch takes on one rank, for `vitds plan`.

        Neither the backbone's part nor a classifier's, which follows from `rows`.

        Args:
            settings: resolved.
            width: D of the backbone.
            product: bytes of a number in matrix products.
        Returns: by names that the plan prints.
        """
        return {}

    def start_from(self, features_of: FeaturesOf, device: torch.device) -> None:  # noqa: B027 (most do nothing)
        """Called once by every rank, before the first step of a new run: first values that depend on the
        images.

        Args:
            features_of: features of images of the training file, as the backbone makes them now.
            device: that trains.
        """

    def learn_labels(self, label_N: NDArray[np.int64]) -> None:  # noqa: B027 (most do nothing)
        """Called once by every rank, before the first step after each start.

        Args:
            label_N: class of each training image, -1 where it has none.
        """

    @property
    def backbones(self) -> tuple[nn.Module, ...]:
        """The backbones in `module` that run in a step, which torch.compile may take."""
        return (self.module.backbone,)

    def losses(self, forward: Forward, batch: TrainBatch, step: int) -> Float[Tensor, "T"]:
        """This rank's part of each term of the step's loss, already weighted.

        The parts of all ranks and micro steps add up to the loss of the step. The loop multiplies them by
        what DeepSpeed will divide by, and calls backward. Here: what the module's forward returns.

        Args:
            forward: calls the engine with the arguments of `module`'s forward; once.
            step: number of the optimizer step, from 0.
        """
        return forward(batch.images, batch.targets)

    def after_update(self, done: int, total: int) -> None:  # noqa: B027 (most do nothing)
        """Called when the weights were updated, on every rank: a teacher follows, a centre moves.

        Args:
            done: steps done, 1..total.
        """

    def probes(
        self, features_MD: Float[Tensor, "M D"], index_M: Int[Tensor, "M"], weights: dict[str, Tensor]
    ) -> dict[str, float]:
        """Numbers of its own beside the probes that all methods share; called by every rank.

        Args:
            features_MD: of un-mixed views of the probe images, on the host, float32.
            index_M: the images' positions in the training file.
            weights: all weights of `module` by name.
        Returns: by names that begin with probe/.
        """
        return {}

    def exported(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """The weights that are evaluated and leave the run, by their names in the backbone."""
        prefix = self.weights_prefix
        return {
            name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)
        }
