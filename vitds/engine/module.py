"""The module that DeepSpeed owns."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor, nn

from vitds.batch import Targets
from vitds.heads.dense import DenseHead


class TrainModule(nn.Module):
    """What the engine owns: the backbone, and a dense head where there is one (CONTRACT: model, head, loss).

    forward(images, targets) returns a loss a row (M,) with a dense head, features (M, D) without.
    """

    def __init__(self, backbone: nn.Module, head: DenseHead | None) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "M ..."]:
        """See the class."""
        features = self.backbone(images)
        return features if self.head is None else self.head(features, targets)
