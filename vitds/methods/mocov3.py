"""MoCo v3: a query finds its image among the keys that a slowly moving teacher makes of the other view.

Source: Chen, Xie, He 2021, arXiv:2104.02057, and the authors' code.

Student: backbone, projector, predictor. Teacher: frozen copies of backbone and projector, which follow the
student after each update. The authors move the teacher at the start of a step instead, which is the same
sequence. Their queries and keys meet over all ranks; here within a chunk, so `batch.chunk_images` is what
they call the batch.

The authors' frozen patch projection is the setting `backbone.frozen: [patch_embed]`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from vitds.batch import Targets
from vitds.config.tree import Settings
from vitds.heads.bytes import Activations, contrast_bytes, projector_bytes
from vitds.heads.contrast import among_other_view
from vitds.heads.projector import Projector
from vitds.methods import base
from vitds.methods.teacher import follow, teacher_of
from vitds.schedule import teacher_momentum


class Encoder(nn.Module):
    """Backbone and projector: what student and teacher both have."""

    def __init__(self, backbone: nn.Module, projector: Projector) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector


class StudentAndTeacher(nn.Module):
    """What the engine owns; forward returns this rank's part of the loss of the step, (1,)."""

    def __init__(
        self, student: Encoder, predictor: Projector, *, temperature: float, chunk_images: int
    ) -> None:
        super().__init__()
        # Under these names, so that `backbone.` and `projector.` mean the student's in weights and settings.
        self.backbone = student.backbone
        self.projector = student.projector
        self.predictor = predictor
        # It drops no branch: keys come from the whole net.
        self.teacher = teacher_of(student)
        self.temperature = temperature
        self.chunk_images = chunk_images

    def forward(self, images: Float[Tensor, "M 3 S S"], targets: Targets) -> Float[Tensor, "1"]:
        """See the class.

        Statistics of every batch norm are those of one view of a chunk, as in the authors' code.
        """
        # Rows stand in the order (chunk, view, image); g = chunks · 2 are the groups of one view of a chunk.
        is_real_cVK = targets.is_real.view(-1, 2, self.chunk_images)
        is_real_gK = is_real_cVK.flatten(0, 1)
        # Queries: backbone, projector, predictor, of all crops of both views in one pass.
        query_MD = self.predictor(self.projector(self.backbone(images), is_real_gK), is_real_gK)
        # Keys: the teacher sees the same crops, and has no predictor.
        with torch.no_grad():
            key_MD = self.teacher.projector(self.teacher.backbone(images), is_real_gK)
        with torch.autocast(images.device.type, enabled=False):
            # Autocast is off: similarities and softmax are float32.
            losses_M = among_other_view(query_MD, key_MD, is_real_cVK, self.temperature)
        # The authors' loss: both directions added, each the mean over its queries times 2 T.
        return (4 * self.temperature * targets.part_of_mean(losses_M))[None]


def _widths(settings: Settings, width: int) -> tuple[list[int], list[int]]:
    """Of input, hidden layers and output: of the projector, and of the predictor."""
    own = settings.mocov3
    return [width, own.hidden, own.hidden, own.width], [own.width, own.hidden, own.width]


class Method(base.Method):
    """See the module."""

    has_teacher: ClassVar[bool] = True
    terms = ("contrast",)

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        own = settings.mocov3
        self.momentum = own.momentum
        widths, behind = _widths(settings, backbone.facts.width)
        with base.added_parts(settings):
            projector = Projector(widths, last="plain")
            predictor = Projector(behind, last="plain")
        self.module = StudentAndTeacher(
            Encoder(backbone, projector),
            predictor,
            temperature=own.temperature,
            chunk_images=settings.batch.chunk_images,
        )
        self.about = f"projector {'-'.join(map(str, widths))}, chunks of {settings.batch.chunk_images} images"

    @property
    def backbones(self) -> tuple[nn.Module, ...]:
        """The student's and the teacher's."""
        return self.module.backbone, self.module.teacher.backbone

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """Of the student's projector and predictor, and of the similarities within chunks.

        The teacher's forward pass keeps nothing for a backward pass.
        """
        # Two views of each image.
        crops = 2 * settings.batch.micro_images
        names = ("activations of the projector", "activations of the predictor")
        held = {
            name: projector_bytes(widths, crops, product=product, last_scales=False)
            for name, widths in zip(names, _widths(settings, width), strict=True)
        }
        # Queries meet the keys of the other view alone.
        pairs = crops * settings.batch.chunk_images
        return held | {"similarities": contrast_bytes(pairs, crops, settings.mocov3.width)}

    def after_update(self, done: int, total: int) -> None:
        """The teacher follows."""
        # With `done` from 1, the teacher of step t follows the weights that step t left behind.
        follow(self.module.teacher, self.module, teacher_momentum(done, start=self.momentum, total=total))
