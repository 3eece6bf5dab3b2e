"""DINO: a student tells which of K prototypes a slowly moving teacher chooses for other views of the image.

Source: Caron et al. 2021, arXiv:2104.14294, and the authors' code.

Student and teacher are a backbone, a projector and K prototypes. The teacher sees the global views alone,
which are the first group's, the student all of them. What keeps the teacher from choosing the same for all
images is that its outputs lose their running mean (the centre) and are sharpened by a low temperature. No
image sees another but through the centre, which moves once a step.

The loss is the teacher's entropy plus the distance of the student from it, and both are logged: an entropy
that goes to ln K or to 0 is a collapse.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from vitds import dist
from vitds.augment.mix import plain_batch
from vitds.batch import CropBatch, Targets, TrainBatch
from vitds.config.tree import Settings
from vitds.heads.bytes import FLOAT, Activations
from vitds.methods import base
from vitds.methods.teacher import follow, teacher_of
from vitds.schedule import teacher_momentum, teacher_temperature


@dataclass(frozen=True)
class TemperedBatch(TrainBatch):
    """A batch with the temperature of the teacher in its epoch."""

    temperature: float


class Chooser(nn.Module):
    """What student and teacher both have; forward returns the cosines with all prototypes, (M, K)."""

    def __init__(self, backbone: nn.Module, projector: nn.Module, prototypes: nn.Linear) -> None:
        super().__init__()
        self.backbone = backbone
        self.projector = projector
        self.prototypes = prototypes

    def forward(self, images: Float[Tensor, "M 3 S S"]) -> Float[Tensor, "M K"]:
        """See the class."""
        x_MD = self.projector(self.backbone(images))
        # float32 outside autocast: divided by a temperature of 0.04, they magnify rounding.
        with torch.autocast(images.device.type, enabled=False):
            x_MD = F.normalize(x_MD.to(torch.promote_types(x_MD.dtype, torch.float32)), dim=1)
            # Prototypes of length one: the authors' weight norm with its gain held at 1.
            return F.linear(x_MD, F.normalize(self.prototypes.weight, dim=1))


def entropy_and_distance(
    student_cVKo: Float[Tensor, "c V K o"], teacher_cGKo: Float[Tensor, "c G K o"], temperature: float
) -> tuple[Float[Tensor, "c G K"], Float[Tensor, "c G K"]]:
    """Of each global view the entropy of the teacher's choice, and how far the student's is from it: the mean
    Kullback-Leibler divergence over the V - 1 other views of the image.

    Args:
        student_cVKo: cosines of all views, the G global ones first.
        teacher_cGKo: logits of the teacher, centred and divided by its temperature.
        temperature: what the student's cosines are divided by.
    """
    views, global_views = student_cVKo.shape[1], teacher_cGKo.shape[1]
    choice_cGKo = teacher_cGKo.softmax(3)
    log_p_cVKo = (student_cVKo / temperature).log_softmax(3)
    crossed_cGVK = -torch.einsum("cgko,cvko->cgvk", choice_cGKo, log_p_cVKo)
    is_other_GV1 = ~torch.eye(global_views, views, dtype=torch.bool, device=student_cVKo.device)[..., None]
    cross_entropy_cGK = (crossed_cGVK * is_other_GV1).sum(2) / (views - 1)
    entropy_cGK = torch.special.entr(choice_cGKo).sum(3)
    return entropy_cGK, cross_entropy_cGK - entropy_cGK


class StudentAndTeacher(Chooser):
    """What the engine owns, the student under its own names; forward returns this rank's part of both terms,
    (2,).

    Args:
        student: whole.
        views: V, of an image.
        global_views: how many of them the teacher sees, the first ones.
        temperature: of the student.
        chunk_images: K images, not prototypes.
    """

    def __init__(
        self, student: Chooser, *, views: int, global_views: int, temperature: float, chunk_images: int
    ) -> None:
        super().__init__(student.backbone, student.projector, student.prototypes)
        self.teacher = teacher_of(student)
        self.views = views
        self.global_views = global_views
        self.temperature = temperature
        self.chunk_images = chunk_images
        outputs = student.prototypes.out_features
        # In checkpoints, and on every rank the same.
        self.register_buffer("centre", torch.zeros(outputs))
        # This rank's part of the mean of the teacher's outputs in a step, which adds up over micro steps.
        self.register_buffer("step_mean", torch.zeros(outputs, dtype=torch.float64), persistent=False)

    def forward(
        self, images: Float[Tensor, "M 3 S S"], targets: Targets, temperature: float
    ) -> Float[Tensor, "2"]:
        """See the class; `temperature` is the teacher's."""
        # Rows stand in the order (chunk, view, image).
        form = (-1, self.views, self.chunk_images)
        student_cVKo = super().forward(images).unflatten(0, form)
        # Of n real images and G global views each weighs 1 / (G n) here, a padded one 0.
        weight_cGK = targets.weight.view(form)[:, : self.global_views]
        with torch.no_grad():
            seen = images.unflatten(0, form)[:, : self.global_views]
            teacher_cGKo = self.teacher(seen.flatten(0, 2)).unflatten(0, weight_cGK.shape)
        with torch.autocast(images.device.type, enabled=False):
            self.step_mean += torch.einsum("cgko,cgk->o", teacher_cGKo, weight_cGK).double()
            sharpened_cGKo = (teacher_cGKo - self.centre) / temperature
            entropy_cGK, distance_cGK = entropy_and_distance(student_cVKo, sharpened_cGKo, self.temperature)
        return torch.stack([(part * weight_cGK).double().sum() for part in (entropy_cGK, distance_cGK)])

    @torch.no_grad()
    def move_centre(self, momentum: float) -> None:
        """centre <- momentum · centre + (1 - momentum) · mean of the step, over all ranks."""
        mean = dist.all_reduce_sum(self.step_mean)
        self.centre.lerp_(mean.to(self.centre.dtype), 1 - momentum)


def _new_student(settings: Settings, backbone: nn.Module) -> Chooser:
    """The backbone with a projector of three layers and its prototypes."""
    own, width = settings.dino, backbone.facts.width
    with base.added_parts(settings):
        projector = nn.Sequential(
            nn.Linear(width, own.hidden),
            nn.GELU(),
            nn.Linear(own.hidden, own.hidden),
            nn.GELU(),
            nn.Linear(own.hidden, own.width),
        )
        prototypes = nn.Linear(own.width, own.prototypes, bias=False)
        for layer in (*projector, prototypes):
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
            if getattr(layer, "bias", None) is not None:
                nn.init.zeros_(layer.bias)
    return Chooser(backbone, projector, prototypes)


class Method(base.Method):
    """See the module. The teacher is evaluated, as by the authors."""

    has_teacher: ClassVar[bool] = True
    weights_prefix: ClassVar[str] = "teacher.backbone."
    terms = ("entropy", "distance")

    def __init__(self, settings: Settings, backbone: nn.Module, rows: int) -> None:
        self.own = settings.dino
        self.module = StudentAndTeacher(
            _new_student(settings, backbone),
            views=settings.views.count,
            global_views=settings.views.groups[0].views,
            temperature=self.own.temperature,
            chunk_images=settings.batch.chunk_images,
        )
        # As the warm-up: a tenth of a short run at most, and never all of it.
        shortest = min(max(1, settings.epochs // 10), settings.epochs - 1)
        self.held_epochs = {"prototypes.": min(self.own.frozen_epochs, shortest)}
        self.counted_step = -1
        self.about = f"{self.own.prototypes:,} prototypes of width {self.own.width}, chosen by a teacher"

    @staticmethod
    def prepare(
        batch: CropBatch, settings: Settings, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> TemperedBatch:
        """The crops as they are, and the teacher's temperature."""
        own = settings.dino
        plain = plain_batch(
            batch, settings.views, chunk_images=settings.batch.chunk_images, device=device, dtype=dtype
        )
        first, last = own.teacher_temperature
        temperature = teacher_temperature(batch.epoch, first, last, warmup_epochs=own.temperature_epochs)
        return TemperedBatch(plain.images, plain.targets, temperature)

    @property
    def backbones(self) -> tuple[nn.Module, ...]:
        """The student's and the teacher's."""
        return self.module.backbone, self.module.teacher.backbone

    def losses(self, forward: base.Forward, batch: TrainBatch, step: int) -> Float[Tensor, "T"]:
        """The teacher's entropy, and the student's distance from it."""
        # At a step's first micro step. Not after the update: a step that is skipped has none.
        if step != self.counted_step:
            self.module.step_mean.zero_()
            self.counted_step = step
        return forward(batch.images, batch.targets, batch.temperature)

    def after_update(self, done: int, total: int) -> None:
        """The centre moves to what the teacher said in this step, and the teacher follows."""
        self.module.move_centre(self.own.centre_momentum)
        follow(self.module.teacher, self.module, teacher_momentum(done, start=self.own.momentum, total=total))

    @staticmethod
    def loss_bytes(settings: Settings, width: int, product: int) -> dict[str, Activations]:
        """Of the student's projector, and of the choices of both."""
        own, images = settings.dino, settings.batch.micro_images
        crops, seen = settings.views.count * images, settings.views.groups[0].views * images
        # The input, each hidden layer before and after GELU, and the output, as it is and of length one.
        kept = crops * ((width + 4 * own.hidden) * product + 2 * own.width * FLOAT)
        choices = FLOAT * own.prototypes
        return {
            "activations of the projector": Activations(kept, 2 * crops * own.hidden * FLOAT),
            # Log-probabilities of the student, and probabilities of the teacher.
            "activations of the choices": Activations((crops + seen) * choices, 2 * crops * choices),
        }
