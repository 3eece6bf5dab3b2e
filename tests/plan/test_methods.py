"""Plans of methods without a classifier: what trains or follows beside the backbone, what losses keep."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import nn

from tests.plan.kept import kept_bytes
from vitds.config.deepspeed import load_ds_config
from vitds.config.load import load_settings
from vitds.config.tree import Settings
from vitds.engine.memory import module_sizes
from vitds.heads.bytes import contrast_bytes, projector_bytes
from vitds.heads.contrast import among_all_views, among_class, among_other_view
from vitds.heads.projector import Projector
from vitds.jobs.plan import plan
from vitds.methods import method_class
from vitds.methods.dino import entropy_and_distance
from vitds.methods.lejepa import sigreg
from vitds.methods.mae import Decoder, patches_of, reconstruction
from vitds.models.build import build_backbone
from vitds.plan.case import Case, ModuleSizes, make_case
from vitds.plan.memory import MOMENTS, memory_parts
from vitds.plan.totals import plan_memory
from vitds.plan.traffic import step_traffic

CHUNKS, IMAGES, WIDTH = 2, 64, 32
CROPS = CHUNKS * 2 * IMAGES


def settings_of(method: str, **changes: Any) -> Settings:
    own = {"engine.precision": "bf16", "batch.chunk_images": 64, "batch.micro_images": 256} | changes
    words = [f"{key}={value}" for key, value in own.items()]
    return load_settings(recipe=f"{method}_deit_tiny", command="pretrain", assignments=words, flags={})


def case_of(method: str, stage: int, *, ranks: int = 1, chunk_images: int = 64) -> Case:
    settings = settings_of(method, **{"batch.chunk_images": chunk_images})
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=112, seed=0)
    sizes = module_sizes(backbone, settings)
    return make_case(settings, load_ds_config(f"zero{stage}"), sizes, rows=0, ranks=ranks, on_gpu=True)


def bytes_by_name(case: Case) -> dict[str, int]:
    return {part.name: part.bytes for part in memory_parts(case)}


def numbers(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


# sizes


@pytest.mark.parametrize("method", ["simclr", "mocov3", "lejepa", "supcon", "dino", "mae"])
def test_sizes_are_those_of_the_module_that_the_method_builds(method: str) -> None:
    settings = settings_of(method)
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=112, seed=0)
        module = method_class(method)(settings, backbone, 0).module
    sizes = module_sizes(backbone, settings)
    for name, part in module.named_children():
        assert sum(sizes.trained.get(name, ())) + sizes.frozen.get(name, 0) == numbers(part), name
    trained = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    assert [size for part in sizes.trained.values() for size in part] == trained


def test_a_teacher_has_weights_and_nothing_else() -> None:
    case = case_of("mocov3", 1, ranks=2)
    held = bytes_by_name(case)
    student = sum(sum(case.sizes.trained[part]) for part in ("backbone", "projector"))
    teacher = student + case.sizes.frozen["backbone"]  # a copy of both, frozen patch projection included
    of_teacher = [part for part in memory_parts(case) if part.name.startswith("teacher")]
    assert [(part.bytes, part.moments) for part in of_teacher] == [(4 * teacher, MOMENTS)]
    # Autocast keeps copies of the weights that a backward pass goes through.
    predictor = sum(case.sizes.trained["predictor"])
    assert held["bf16 copies of weights"] == 2 * (teacher + predictor)
    assert step_traffic(case)["gradients reduced"] == 2 * (student + predictor)


def test_a_teacher_is_shared_and_gathered_at_stage_3() -> None:
    case = case_of("mocov3", 3, ranks=2)
    assert bytes_by_name(case)["teacher: frozen weights"] == 4 * case.sizes.frozen["teacher"] // 2
    assert step_traffic(case)["weights gathered"] == case.weights * 2 // 2 * case.accumulation


# losses


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("widths", "last"), [((48, 192, 192, WIDTH), "scale"), ((48, 192, WIDTH), "plain")])
def test_formula_counts_what_a_projector_keeps(
    widths: tuple[int, ...], last: str, autocast: torch.dtype | None
) -> None:
    projector = Projector(widths, last=last)
    features = torch.randn(CROPS, widths[0], requires_grad=True)
    is_real = torch.ones(CHUNKS, 2 * IMAGES, dtype=torch.bool)
    weights = {shape for weight in projector.parameters() for shape in (weight.shape, weight.shape[::-1])}
    kept = kept_bytes(lambda: projector(features, is_real), weights, autocast)
    product = 4 if autocast is None else 2
    counted = projector_bytes(widths, CROPS, product=product, last_scales=last == "scale").kept
    assert counted == pytest.approx(kept, rel=0.02)


def test_formula_counts_what_a_contrast_of_all_views_keeps() -> None:
    z = torch.randn(CROPS, WIDTH, requires_grad=True)
    is_real = torch.ones(CHUNKS, 2 * IMAGES, dtype=torch.bool)
    kept = kept_bytes(lambda: among_all_views(z, is_real, 0.2), (), None)
    counted = contrast_bytes(CHUNKS * (2 * IMAGES) ** 2, CROPS, WIDTH).kept
    assert counted == pytest.approx(kept, rel=0.04)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_formula_counts_what_a_contrast_by_class_and_its_projector_keep(autocast: torch.dtype | None) -> None:
    settings = settings_of("supcon", **{"batch.micro_images": CHUNKS * IMAGES, "supcon.width": WIDTH})
    projector = nn.Sequential(nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, WIDTH))
    x, label = torch.randn(CROPS, 48, requires_grad=True), torch.zeros(CHUNKS, 2 * IMAGES, dtype=torch.int64)
    z, is_real = torch.randn(CROPS, WIDTH, requires_grad=True), torch.ones(label.shape, dtype=torch.bool)
    weights = {shape for weight in projector.parameters() for shape in (weight.shape, weight.shape[::-1])}
    kept = {
        "activations of the projector": kept_bytes(lambda: projector(x), weights, autocast),
        "similarities": kept_bytes(lambda: among_class(z, label, is_real, 0.1), (), None),
    }
    counted = method_class("supcon").loss_bytes(settings, 48, 4 if autocast is None else 2)
    assert {name: part.kept for name, part in counted.items()} == pytest.approx(kept, rel=0.05)


def test_formula_counts_what_a_contrast_with_the_other_view_keeps() -> None:
    query, key = torch.randn(CROPS, WIDTH, requires_grad=True), torch.randn(CROPS, WIDTH)
    is_real = torch.ones(CHUNKS, 2, IMAGES, dtype=torch.bool)
    kept = kept_bytes(lambda: among_other_view(query, key, is_real, 0.2), (), None)
    counted = contrast_bytes(CHUNKS * 2 * IMAGES**2, CROPS, WIDTH).kept
    assert counted == pytest.approx(kept, rel=0.05)


def test_formula_counts_what_sigreg_keeps() -> None:
    """Along its directions, an angle a point, and what is tested."""
    z = torch.randn(CHUNKS, 2, IMAGES, WIDTH, requires_grad=True)
    is_real, along = torch.ones(CHUNKS, IMAGES, dtype=torch.bool), torch.randn(CHUNKS, WIDTH, 128)
    kept = kept_bytes(lambda: sigreg(z, is_real, along), (), None)
    own = {"lejepa.directions": 128, "batch.micro_images": 128, "views.groups": "[{name: a, views: 2}]"}
    settings = settings_of("lejepa", **own)
    counted = method_class("lejepa").loss_bytes(settings, WIDTH, 4)["activations of the directions"].kept
    assert counted == pytest.approx(kept, rel=0.1)


def test_formula_counts_what_dinos_projector_and_choices_keep() -> None:
    own = {"dino.prototypes": 512, "dino.hidden": 96, "dino.width": WIDTH, "batch.micro_images": IMAGES}
    groups = "[{name: a, views: 2}, {name: b, views: 2}]"
    settings = settings_of("dino", **own, **{"batch.chunk_images": IMAGES, "views.groups": groups})
    with torch.device("meta"):
        backbone = build_backbone(settings.backbone, crop_px=112, seed=0)
        module = method_class("dino")(settings, backbone, 0).module.to_empty(device="cpu")
    features = torch.randn(4 * IMAGES, 192, requires_grad=True)
    module.backbone, module.teacher.backbone = nn.Identity(), nn.Identity()
    student = module.projector(features)
    weights = {shape for weight in module.parameters() for shape in (weight.shape, weight.shape[::-1])}
    cosine, choice = (torch.randn(1, views, IMAGES, 512) for views in (4, 2))
    kept = {
        "activations of the projector": kept_bytes(lambda: module.projector(features), weights, None)
        + 2 * student.nbytes,
        "activations of the choices": kept_bytes(
            lambda: entropy_and_distance(cosine.requires_grad_(), choice, 0.1), (), None
        ),
    }
    counted = method_class("dino").loss_bytes(settings, 192, 4)
    assert {name: part.kept for name, part in counted.items()} == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("autocast", [None, torch.bfloat16], ids=str)
def test_formula_counts_what_maes_decoder_and_its_loss_keep(depth: int, autocast: torch.dtype | None) -> None:
    own = {"mae.width": 64, "mae.depth": depth, "batch.micro_images": IMAGES}
    settings = settings_of("mae", **own)
    decoder = Decoder(width_in=192, width=64, depth=depth, side=14, prefix=1, pixels=192)
    tokens, images = torch.randn(IMAGES, 50, 192, requires_grad=True), torch.randn(IMAGES, 3, 112, 112)
    kept_Mk = torch.arange(49).expand(IMAGES, -1)
    weights = {shape for weight in decoder.parameters() for shape in (weight.shape, weight.shape[::-1])}

    def loss() -> torch.Tensor:
        painted = decoder(tokens, kept_Mk).float()
        return reconstruction(painted, patches_of(images, 8), kept_Mk)

    kept = kept_bytes(loss, {*weights, kept_Mk.shape}, autocast)
    counted = method_class("mae").loss_bytes(settings, 192, 4 if autocast is None else 2)
    assert counted["activations of the decoder"].kept == pytest.approx(kept, rel=0.05)


@pytest.mark.parametrize("method", ["simclr", "mocov3"])
def test_similarities_grow_with_the_chunk_and_the_rest_with_the_crops(method: str) -> None:
    small, large = (bytes_by_name(case_of(method, 0, chunk_images=images)) for images in (64, 256))
    names = set(small) - {"similarities"}
    assert {name: small[name] for name in names} == {name: large[name] for name in names}
    crops, width = 512, 256
    compared = 2 * 4 * crops * width
    assert (large["similarities"] - compared) == 4 * (small["similarities"] - compared)


def test_remedy_for_similarities_is_a_smaller_chunk() -> None:
    case = case_of("simclr", 0, chunk_images=256)
    views = case.settings.views.model_copy(update={"crop_px": 1})
    small = case.settings.simclr.model_copy(update={"hidden": 1, "width": 1})
    settings = case.settings.model_copy(update={"views": views, "simclr": small})
    sizes = ModuleSizes({"backbone": (1,)}, 1, None)
    memory = plan_memory(dataclasses.replace(case, settings=settings, sizes=sizes))
    assert memory.remedy() == "lower batch.chunk_images"


# the command


@pytest.mark.parametrize(
    ("method", "beside", "activations"),
    [
        ("simclr", {"projector"}, {"activations of the projector", "similarities"}),
        (
            "mocov3",
            {"projector", "predictor", "teacher"},
            {"activations of the projector", "activations of the predictor", "similarities"},
        ),
        ("lejepa", {"projector"}, {"activations of the projector", "activations of the directions"}),
        ("supcon", {"projector"}, {"activations of the projector", "similarities"}),
        ("mae", {"decoder"}, {"activations of the decoder"}),
        (
            "dino",
            {"projector", "prototypes", "teacher"},
            {"activations of the projector", "activations of the choices"},
        ),
    ],
)
def test_plan_of_a_rivals_recipe_names_its_parts(
    method: str, beside: set[str], activations: set[str], capsys: pytest.CaptureFixture
) -> None:
    found: dict[str, Any] = plan(recipe=f"{method}_deit_tiny", rows=2040)
    assert set(found["head"].split(", ")) == beside
    parts = {part["name"]: part["bytes"] for part in found["parts"]}
    have_weights = {name.partition(":")[0] for name in parts if name.endswith(": weights")}
    assert have_weights | {"teacher"} == {"backbone", "teacher", *beside}
    assert activations < parts.keys()
    assert "head at work" not in parts
    # Of the backbone, as in other plans; MAE's recipe has smaller patches, and more of them.
    assert found["parameters"] == (5_413_824 if method == "mae" else 5_496_192)
    text = capsys.readouterr().out
    assert all(name in text for name in (*activations, *(f"{part}: " for part in beside)))
