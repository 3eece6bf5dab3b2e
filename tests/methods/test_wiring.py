"""What each method makes of a batch, from its settings to its terms, against plain arithmetic on the same
features: which weights, temperatures, groups and teachers enter, and that half precision stays out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.reference import (
    dino_terms,
    lejepa_terms,
    mae_losses,
    mocov3_losses,
    plain_projector,
    simclr_losses,
    supcon_losses,
)
from vitds.batch import CropBatch, TrainBatch
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.methods import method_class
from vitds.methods.base import Method
from vitds.models.build import build_backbone, patch_count
from vitds.models.stochastic import StochasticDraws

CHUNKS, K, REAL = 2, 8, 12  # four images only pad the second chunk
IS_REAL = (torch.arange(CHUNKS * K) < REAL).view(CHUNKS, K)
LABEL = torch.arange(CHUNKS * K).view(CHUNKS, K) % 3
SMALL = [
    "backbone.options={patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3, global_pool: avg}",
    f"batch.global_images={CHUNKS * K}",
    f"batch.chunk_images={K}",
]
TWO_VIEWS = "views.groups=[{name: view, views: 2}]"


class Built(NamedTuple):
    """A method, each of its parameters moved by noise of its own, and a batch with padding."""

    method: Method
    batch: TrainBatch

    def terms(self) -> Tensor:
        return self.method.losses(self.method.module, self.batch, 0)


def built(name: str, *words: str, real: int = REAL) -> Built:
    settings = load_settings(
        recipe=f"{name}_digits", command="pretrain", assignments=[*SMALL, *words], flags={}
    )
    backbone = build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0)
    rows = settings.views.count * K
    draws = StochasticDraws(backbone, seed=0, rows_per_chunk=rows, patches=patch_count(backbone))
    method = method_class(name)(settings, backbone, 0)
    draws.fill(0, 0, CHUNKS)
    move_by_noise(method.module)
    return Built(method, method.prepare(crop_batch(settings, real), settings, torch.device("cpu")))


@torch.no_grad()
def move_by_noise(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(2)
    for parameter in module.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def crop_batch(settings: Settings, real: int) -> CropBatch:
    side, generator = settings.views.crop_px, torch.Generator().manual_seed(3)
    shape = (CHUNKS * K, settings.views.count, 3, side, side)
    return CropBatch(
        crops=torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator),
        index=torch.arange(CHUNKS * K),
        label=LABEL.flatten(),
        is_real=torch.arange(CHUNKS * K) < real,
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=real,
    )


def by_view(rows: Tensor) -> Tensor:
    """(M, ...) -> (chunks, V, K, ...), float64."""
    return rows.detach().double().unflatten(0, (CHUNKS, -1, K))


def is_real_of(views: int) -> Tensor:
    """(chunks, views, K)."""
    return IS_REAL[:, None].expand(-1, views, -1)


# The terms of a step, from what the last layers made


def simclr_terms(z: Tensor, temperature: float) -> Tensor:
    return simclr_losses(by_view(z), IS_REAL, temperature).sum()[None] / (2 * REAL)


def supcon_terms(z: Tensor, temperature: float) -> Tensor:
    losses = supcon_losses(by_view(z), LABEL, IS_REAL, temperature)
    return temperature / 0.07 * losses.sum()[None] / (2 * REAL)


def mocov3_terms(query: Tensor, key: Tensor, temperature: float) -> Tensor:
    """Both directions added, each 2 T times the mean over its queries."""
    losses = mocov3_losses(by_view(query), by_view(key), IS_REAL, temperature)
    return 2 * temperature * (losses[:, 0].sum() + losses[:, 1].sum())[None] / REAL


def lejepa_both(z: Tensor, directions: Tensor, share: float, global_views: int) -> Tensor:
    distance, statistic = lejepa_terms(by_view(z), IS_REAL, directions, global_views)
    mean_statistic = (statistic * IS_REAL.sum(1)).sum() / REAL
    return torch.stack([(1 - share) * distance[IS_REAL].mean(), share * mean_statistic])


def dino_both(student: Tensor, teacher: Tensor, student_temperature: float, temperature: float) -> Tensor:
    student, teacher = by_view(student), by_view(teacher)
    each = [
        dino_terms(student[chunk, :, image], teacher[chunk, :, image], student_temperature, temperature)
        for chunk, image in IS_REAL.nonzero().tolist()
    ]
    return torch.tensor(each).mean(0)


def mae_terms(painted: Tensor, images: Tensor, kept: Tensor) -> Tensor:
    """Of two views, in patches of 4 px."""
    losses = mae_losses(painted.detach().double(), images.double(), kept, 4)
    return losses[is_real_of(2).flatten()].mean()[None]


def cosines(x: Tensor, prototypes: nn.Linear) -> Tensor:
    return F.normalize(x.double(), dim=1) @ F.normalize(prototypes.weight.double(), dim=1).T


def assert_equal(found: Tensor, expected: Tensor, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6, check_dtype=False)


# Each method, with settings that are not the default ones


@pytest.mark.parametrize("layers", [2, 3])
def test_simclr_contrasts_the_views_behind_its_projector_by_its_temperature(layers: int) -> None:
    made = built("simclr", "simclr.temperature=0.3", f"simclr.layers={layers}")
    features = made.method.module.backbone(made.batch.images)
    # One batch norm for both views of a chunk.
    norms = ["affine"] * (layers - 1) + ["scale"]
    z = plain_projector(features, made.method.module.projector, is_real_of(2).flatten(1), norms)
    assert_equal(made.terms(), simclr_terms(z, 0.3))


def test_supcon_contrasts_classes_behind_a_projector_without_norms_by_its_temperature() -> None:
    made = built("supcon", "supcon.temperature=0.3")
    first, middle, last = made.method.module.projector
    assert isinstance(middle, nn.ReLU)
    z = last(first(made.method.module.backbone(made.batch.images)).clamp_min(0))
    assert_equal(made.terms(), supcon_terms(z, 0.3))


def test_mocov3_finds_the_teachers_keys_behind_projector_and_predictor_by_its_temperature() -> None:
    groups = "views.groups=[{name: first, views: 1}, {name: second, views: 1}]"
    made = built("mocov3", "mocov3.temperature=0.3", groups)
    module, images = made.method.module, made.batch.images
    # Each view of a chunk has a batch norm of its own.
    is_real = is_real_of(2).flatten(0, 1)

    def projected(part: nn.Module) -> Tensor:
        return plain_projector(part.backbone(images), part.projector, is_real, ["affine", "affine", "plain"])

    query = plain_projector(projected(module), module.predictor, is_real, ["affine", "plain"])
    key = projected(module.teacher)
    assert_equal(made.terms(), mocov3_terms(query, key, 0.3))


@pytest.mark.parametrize("global_views", [1, 2, 3])
def test_lejepa_compares_features_as_they_are_with_the_mean_of_the_first_group(global_views: int) -> None:
    groups = f"[{{name: global, views: {global_views}}}, {{name: local, views: {4 - global_views}}}]"
    made = built("lejepa", "lejepa.sigreg=0.3", "lejepa.directions=8", f"views.groups={groups}")
    features = made.method.module.backbone(made.batch.images)
    norms = ["affine", "affine", "none"]
    z = plain_projector(features, made.method.module.projector, is_real_of(4).flatten(1), norms)
    assert_equal(made.terms(), lejepa_both(z, made.batch.directions, 0.3, global_views))


def test_dino_compares_all_views_of_the_student_with_the_centred_global_ones_of_the_teacher() -> None:
    temperatures = ["dino.temperature=0.2", "dino.teacher_temperature=[0.08, 0.08]"]
    made = built("dino", "dino.prototypes=16", "dino.hidden=32", *temperatures)
    module = made.method.module
    module.centre.copy_(torch.linspace(-0.3, 0.3, 16))

    def plain_cosines(part: nn.Module, images: Tensor) -> Tensor:
        first, _, second, _, third = part.projector
        return cosines(third(F.gelu(second(F.gelu(first(part.backbone(images)))))), part.prototypes)

    seen = made.batch.images.unflatten(0, (CHUNKS, 4, K))[:, :2].flatten(0, 2)
    teacher = plain_cosines(module.teacher, seen) - module.centre
    expected = dino_both(plain_cosines(module, made.batch.images), teacher, 0.2, 0.08)
    assert_equal(made.terms(), expected)


def test_mae_compares_what_it_paints_of_each_hidden_patch_with_the_image_at_its_place() -> None:
    made = built("mae", TWO_VIEWS)
    module, images = made.method.module, made.batch.images
    kept = module.backbone.patch_drop.order
    painted = module.decoder(module.backbone(images), kept)
    assert_equal(made.terms(), mae_terms(painted, images, kept))


# Gradients


@pytest.mark.parametrize(("name", "words"), [("mocov3", []), ("dino", ["dino.prototypes=16"])])
def test_no_gradient_reaches_the_teacher_even_if_its_weights_would_take_one(
    name: str, words: list[str]
) -> None:
    made = built(name, *words)
    teacher = made.method.module.teacher
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    teacher.requires_grad_(True)
    made.terms().sum().backward()
    missing = {name for name, value in made.method.module.named_parameters() if value.grad is None}
    assert missing == {f"teacher.{name}" for name, _ in teacher.named_parameters()}


# Under autocast


class HalfPrecision(NamedTuple):
    """A method and the parts whose outputs its loss is made of, from which `expected` computes its terms."""

    words: list[str]
    parts: list[str]
    expected: Callable[..., Tensor]


UNDER_AUTOCAST = {
    "simclr": HalfPrecision(
        ["simclr.temperature=0.07"], ["projector"], lambda made, z: simclr_terms(z, 0.07)
    ),
    "supcon": HalfPrecision(
        ["supcon.temperature=0.07"], ["projector"], lambda made, z: supcon_terms(z, 0.07)
    ),
    "mocov3": HalfPrecision(
        ["mocov3.temperature=0.07"],
        ["predictor", "teacher.projector"],
        lambda made, query, key: mocov3_terms(query, key, 0.07),
    ),
    "lejepa": HalfPrecision(
        ["lejepa.directions=8"],
        ["projector"],
        lambda made, z: lejepa_both(z, made.batch.directions, 0.05, 2),
    ),
    "dino": HalfPrecision(
        ["dino.prototypes=16"],
        ["projector", "teacher.projector"],
        lambda made, student, teacher: dino_both(
            cosines(student, made.method.module.prototypes),
            cosines(teacher, made.method.module.teacher.prototypes),
            0.1,
            0.04,
        ),
    ),
    "mae": HalfPrecision(
        [TWO_VIEWS],
        ["decoder"],
        lambda made, painted: mae_terms(
            painted, made.batch.images, made.method.module.backbone.patch_drop.order
        ),
    ),
}


@pytest.mark.parametrize("name", UNDER_AUTOCAST)
def test_under_autocast_a_loss_is_that_of_its_features_in_float32(name: str) -> None:
    words, parts, expected = UNDER_AUTOCAST[name]
    made, outputs = built(name, *words), {}
    for part in parts:
        module = made.method.module.get_submodule(part)
        module.register_forward_hook(lambda _, __, output, part=part: outputs.update({part: output}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = made.terms()
    assert_equal(terms, expected(made, *(outputs[part] for part in parts)), rtol=1e-5)


# Eight images


@pytest.mark.parametrize(
    ("name", "words", "floor"),
    [
        ("simclr", ["simclr.temperature=0.5", "simclr.hidden=32", "simclr.width=16"], 0.885),
        # Of a class of three images a crop has five others to find, of one of two images three.
        ("supcon", ["supcon.width=16"], 0.1 / 0.07 * (6 * math.log(5) + 2 * math.log(3)) / 8),
        # Each view has one target, so what is left of the loss is the teacher's entropy.
        ("dino", ["dino.prototypes=16", "dino.hidden=32", TWO_VIEWS], 0.0),
    ],
)
def test_eight_images_are_learned_by_heart(name: str, words: list[str], floor: float) -> None:
    made = built(name, *words, real=8)
    optimizer = torch.optim.AdamW(made.method.module.parameters(), lr=1e-2)
    for _ in range(40):
        terms = made.terms()
        optimizer.zero_grad()
        terms.sum().backward()
        optimizer.step()
    assert floor - 1e-3 < terms[-1].item() < floor + 0.03
