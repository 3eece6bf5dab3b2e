"""A trained run, as Python gets it back: it names the classes of images and gives their features."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import numpy as np
from jaxtyping import Float

from vitds.runs.directory import Run
from vitds.use.images import AnyImage
from vitds.use.model import Guess, Model, open_model


class TrainedRun(Run):
    """A run directory whose weights can be used at once."""

    @cached_property
    def model(self) -> Model:
        """The trained network, opened at its first use."""
        return open_model(self.path)

    def predict(self, images: Sequence[AnyImage], top: int = 3) -> list[Guess]:
        """As Model.predict."""
        return self.model.predict(images, top)

    def embed(self, images: Sequence[AnyImage]) -> Float[np.ndarray, "M D"]:
        """As Model.embed."""
        return self.model.embed(images)
