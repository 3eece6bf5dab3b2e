"""A trained run, as Python gets it back: it names the classes of images and gives their features."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from jaxtyping import Float

from vitds.runs.directory import Run
from vitds.use.images import Images
from vitds.use.model import Model, Prediction, open_model


class TrainedRun(Run):
    """A run directory whose weights can be used at once."""

    @cached_property
    def model(self) -> Model:
        """The trained network, opened at its first use."""
        return open_model(self.path)

    def predict(self, images: Images, top: int = 3, workers: int = 1) -> list[Prediction]:
        """As Model.predict."""
        return self.model.predict(images, top, workers)

    def embed(self, images: Images, workers: int = 1) -> Float[np.ndarray, "M D"]:
        """As Model.embed."""
        return self.model.embed(images, workers)
