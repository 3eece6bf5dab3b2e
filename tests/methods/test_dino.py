"""DINO's terms against a plain reference, their values at the start and at collapse; its centre, teacher and
schedules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.methods.reference import dino_terms
from vitds.batch import CropBatch
from vitds.config.load import load_settings
from vitds.config.tree import Optimizer, Settings
from vitds.engine.optimizer import build_optimizer
from vitds.engine.update import set_groups
from vitds.methods.dino import Method, entropy_and_distance
from vitds.models.build import build_backbone
from vitds.schedule import teacher_momentum, teacher_temperature, weight_decay

CPU = torch.device("cpu")
CHUNKS, VIEWS, GLOBAL, K, OUTPUTS = 2, 4, 2, 3, 9


def cosines(seed: int, *shape: int) -> Tensor:
    return 2 * torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) - 1


def terms_of(student: Tensor, teacher: Tensor, temperature: float = 0.04) -> tuple[Tensor, Tensor]:
    return entropy_and_distance(student, teacher / temperature, 0.1)


def test_terms_equal_the_plain_reference() -> None:
    student, teacher = cosines(0, CHUNKS, VIEWS, K, OUTPUTS), cosines(1, CHUNKS, GLOBAL, K, OUTPUTS)
    entropy, distance = (part.mean(1) for part in terms_of(student, teacher))
    for chunk in range(CHUNKS):
        for image in range(K):
            expected = dino_terms(student[chunk, :, image], teacher[chunk, :, image], 0.1, 0.04)
            found = entropy[chunk, image].item(), distance[chunk, image].item()
            assert found == pytest.approx(expected, rel=1e-9)


def test_the_gradient_of_a_pair_is_the_difference_of_both_choices_by_the_temperature() -> None:
    student = cosines(2, 1, VIEWS, 1, OUTPUTS).requires_grad_()
    teacher = cosines(3, 1, GLOBAL, 1, OUTPUTS)
    assert torch.autograd.gradcheck(lambda s: sum(terms_of(s, teacher)).sum(), student)
    sum(terms_of(student, teacher)).mean().backward()
    q, p = (teacher / 0.04).softmax(3)[0, :, 0], (student / 0.1).softmax(3)[0, :, 0]
    pairs = [(g, v) for g in range(GLOBAL) for v in range(VIEWS) if g != v]
    for view in range(VIEWS):
        expected = sum((p[v] - q[g]) / 0.1 for g, v in pairs if v == view) / len(pairs)
        torch.testing.assert_close(student.grad[0, view, 0], expected)


def test_a_constant_added_to_the_teachers_logits_changes_nothing() -> None:
    student, teacher = cosines(4, CHUNKS, VIEWS, K, OUTPUTS), cosines(5, CHUNKS, GLOBAL, K, OUTPUTS)
    torch.testing.assert_close(terms_of(student, teacher + 0.7), terms_of(student, teacher))


# Prototypes, images, the teacher's temperature, and the loss of independent and of equal views.
STARTS = [
    (1024, 64, 0.04, 7.17, 6.16),
    (4096, 64, 0.04, 8.49, 7.56),
    (8192, 64, 0.04, 9.22, 8.26),
    (65536, 8, 0.04, 11.29, 10.32),
    (65536, 8, 0.07, 11.29, 10.73),
]


@pytest.mark.parametrize(("outputs", "images", "temperature", "independent", "same"), STARTS)
def test_the_loss_starts_near_log_of_the_prototypes(
    outputs: int, images: int, temperature: float, independent: float, same: float
) -> None:
    """Simulated: random features and prototypes of length one in 256 dimensions."""
    generator = torch.Generator().manual_seed(6)
    prototypes = F.normalize(torch.randn(outputs, 256, generator=generator), dim=1)
    other, one = (F.normalize(torch.randn(1, 2, images, 256, generator=generator), dim=3) for _ in range(2))
    one = one[:, :1].expand(-1, 2, -1, -1)  # both views of an image are alike
    for student, expected in ((other, independent), (one, same)):
        terms = terms_of(student @ prototypes.T, one @ prototypes.T, temperature)
        loss = sum(part.mean() for part in terms)
        assert loss.item() == pytest.approx(expected, abs=0.06)


# The method as it trains


def small_settings(*words: str) -> Settings:
    own = ["batch.global_images=8", "batch.chunk_images=4", "dino.prototypes=64", "dino.hidden=32"]
    return load_settings(recipe="dino_digits", command="pretrain", assignments=[*own, *words], flags={})


def method_of(settings: Settings) -> Method:
    return Method(settings, build_backbone(settings.backbone, crop_px=settings.views.crop_px, seed=0), 0)


def crop_batch(settings: Settings, real: int = 8) -> CropBatch:
    side, views = settings.views.crop_px, settings.views.count
    generator = torch.Generator().manual_seed(1)
    return CropBatch(
        crops=torch.randint(0, 256, (8, views, 3, side, side), dtype=torch.uint8, generator=generator),
        index=torch.arange(8),
        label=torch.zeros(8, dtype=torch.int64),
        is_real=torch.arange(8) < real,
        epoch=0,
        step=0,
        first_chunk=0,
        real_images=real,
    )


def part_of(batch: CropBatch, first: int, last: int) -> CropBatch:
    columns = {name: getattr(batch, name)[first:last] for name in ("crops", "index", "label", "is_real")}
    return replace(batch, first_chunk=first // 4, **columns)


def test_the_teacher_starts_as_the_student_and_gets_no_gradient() -> None:
    settings = small_settings()
    method = method_of(settings)
    student = dict(method.module.named_parameters())
    teacher = dict(method.module.teacher.named_parameters())
    assert teacher.keys() == {name for name in student if not name.startswith("teacher.")}
    assert all(torch.equal(student[name], value) for name, value in teacher.items())
    method.losses(method.module, method.prepare(crop_batch(settings), settings, CPU), 0).sum().backward()
    assert not any(value.grad is not None for value in teacher.values())
    assert all(student[name].grad is not None for name in teacher)


@pytest.mark.parametrize(
    ("epochs", "frozen", "held"), [(800, 12, 12), (64, 1, 1), (64, 12, 6), (10, 12, 1), (1, 1, 0), (64, 0, 0)]
)
def test_prototypes_stay_for_a_tenth_of_a_run_at_most(epochs: int, frozen: int, held: int) -> None:
    own = small_settings().model_copy(update={"epochs": epochs})
    settings = own.model_copy(update={"dino": own.dino.model_copy(update={"frozen_epochs": frozen})})
    assert method_of(settings).held_epochs == {"prototypes.": held}


def test_after_an_update_teacher_and_centre_are_what_the_rule_says() -> None:
    settings = small_settings("dino.momentum=0.8", "dino.centre_momentum=0.7")
    method = method_of(settings)
    batch = method.prepare(crop_batch(settings), settings, CPU)
    method.losses(method.module, batch, 0)
    views, seen = settings.views.count, settings.views.groups[0].views
    crops = batch.images.unflatten(0, (2, views, 4))[:, :seen].flatten(0, 2)
    mean = method.module.teacher(crops).mean(0)
    with torch.no_grad():
        for parameter in method.module.parameters():
            parameter.add_(0.01)
    before = {name: value.clone() for name, value in method.module.named_parameters()}
    method.after_update(3, 10)
    momentum = teacher_momentum(3, start=0.8, total=10)
    for name, value in method.module.teacher.named_parameters():
        expected = momentum * before[f"teacher.{name}"] + (1 - momentum) * before[name]
        torch.testing.assert_close(value, expected)
    torch.testing.assert_close(method.module.centre, 0.3 * mean)


def test_the_centre_is_of_real_crops_in_any_order_and_any_micro_batch() -> None:
    settings = small_settings()
    centres, losses = [], []
    whole = crop_batch(settings, real=6)
    order = torch.tensor([2, 0, 3, 1, 5, 4, 6, 7])
    columns = {name: getattr(whole, name)[order] for name in ("crops", "index", "label", "is_real")}
    blank = replace(whole, crops=torch.where(whole.is_real.view(-1, 1, 1, 1, 1), whole.crops, 255))
    cases = [[whole], [part_of(whole, 0, 4), part_of(whole, 4, 8)], [replace(whole, **columns)], [blank]]
    for parts in cases:
        method = method_of(settings)
        method.losses(method.module, method.prepare(whole, settings, CPU), 0)  # of a step that was skipped
        terms = [method.losses(method.module, method.prepare(part, settings, CPU), 1) for part in parts]
        method.after_update(2, 10)
        centres.append(method.module.centre)
        losses.append(torch.stack(terms).sum(0))
    for centre, loss in zip(centres[1:], losses[1:], strict=True):
        torch.testing.assert_close(centre, centres[0])
        torch.testing.assert_close(loss, losses[0], rtol=1e-5, atol=1e-6)
    assert centres[0].abs().max() > 1e-3


@pytest.mark.parametrize(("centre_momentum", "entropy"), [(0.5, math.log(64)), (1.0, 3.0)])
def test_equal_features_are_told_by_the_teachers_entropy(centre_momentum: float, entropy: float) -> None:
    """With a centre that follows it goes to the log of the prototypes, without one it stays below."""
    settings = small_settings(
        f"dino.centre_momentum={centre_momentum}", "dino.teacher_temperature=[0.02, 0.02]"
    )
    method = method_of(settings)
    nn.init.zeros_(method.module.projector[-1].weight)
    nn.init.zeros_(method.module.teacher.projector[-1].weight)
    for bias in (method.module.projector[-1].bias, method.module.teacher.projector[-1].bias):
        with torch.no_grad():
            bias.copy_(torch.linspace(-1, 1, len(bias)))
    for step in range(16):
        found = method.losses(method.module, method.prepare(crop_batch(settings), settings, CPU), step)
        method.after_update(step + 1, 1000)
    if centre_momentum < 1:
        assert found[0].item() == pytest.approx(entropy, abs=1e-3)
    else:
        assert found[0].item() < entropy


def test_one_prototype_for_all_images_is_told_by_an_entropy_near_zero() -> None:
    settings = small_settings()
    method = method_of(settings)
    for part in (method.module, method.module.teacher):
        nn.init.zeros_(part.projector[-1].weight)
        with torch.no_grad():
            part.projector[-1].bias.copy_(method.module.prototypes.weight[5])
    entropy, _ = method.losses(method.module, method.prepare(crop_batch(settings), settings, CPU), 0)
    assert entropy.item() == pytest.approx(0, abs=1e-3)


# Schedules


def test_the_teachers_temperature_rises_by_epochs_and_stays() -> None:
    rise = [teacher_temperature(epoch, 0.04, 0.07, warmup_epochs=30) for epoch in (0, 10, 20, 30, 99)]
    assert rise == pytest.approx([0.04, 0.05, 0.06, 0.07, 0.07])
    assert teacher_temperature(0, 0.04, 0.07, warmup_epochs=0) == 0.07
    settings = small_settings("dino.teacher_temperature=[0.04, 0.06]", "dino.temperature_epochs=2")
    batch = replace(crop_batch(settings), epoch=1)
    assert Method.prepare(batch, settings, CPU).temperature == pytest.approx(0.05)


def test_weight_decay_goes_to_its_end_by_a_cosine_and_without_one_stays_to_the_bit() -> None:
    rising = Optimizer(weight_decay=0.04, weight_decay_end=0.4)
    assert weight_decay(rising, 0, 10) == pytest.approx(0.04)
    assert weight_decay(rising, 5, 10) == pytest.approx(0.22)
    assert weight_decay(rising, 10, 10) == pytest.approx(0.4)
    assert {weight_decay(Optimizer(weight_decay=0.1), step, 10) for step in range(10)} == {0.1}


def test_rate_and_decay_of_a_step_reach_the_parameters_that_they_are_for() -> None:
    module = nn.ModuleDict({"body": nn.Linear(3, 3), "prototypes": nn.Linear(3, 5, bias=False)})
    settings = Optimizer(lr_peak=1.0, weight_decay=0.04, decay="matrices")
    optimizer = build_optimizer(module, settings, lr_scales={"body.": 0.5}, held_epochs={"prototypes.": 1})
    for epoch, rate_of_held in ((0, 0.0), (1, 0.2)):
        set_groups(optimizer, rate=0.2, weight_decay=0.3, epoch=epoch)
        found = {
            name: (group["lr"], group["weight_decay"])
            for group in optimizer.param_groups
            for parameter in group["params"]
            for name, own in module.named_parameters()
            if own is parameter
        }
        assert found == {
            "body.weight": (0.1, 0.3),
            "body.bias": (0.1, 0.0),
            "prototypes.weight": (rate_of_held, 0.3),
        }
