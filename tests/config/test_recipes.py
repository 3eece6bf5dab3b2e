"""A recipe that says what differs from its base, and the packaged ones."""

from importlib.resources import files
from operator import attrgetter
from typing import Any

import pytest

from tests.config.loading import load, refusal
from vitds.config.methods import METHODS
from vitds.config.recipes import DEFAULT_RECIPES, list_recipes, read_header, read_recipe


def write_derived(folder, text):
    (folder / "derived.yaml").write_text(text)
    return str(folder / "derived.yaml")


def test_recipe_with_a_base_says_what_differs(recipe, tmp_path):
    derived = load(write_derived(tmp_path, f"base: {recipe}\nviews: {{crop_px: 64}}\nepochs: 3\n"))
    assert (derived.epochs, derived.views.crop_px) == (3, 64)
    assert derived.views.groups == load(recipe).views.groups
    assert derived == load(recipe, "epochs=3", "views.crop_px=64")


def test_options_of_a_base_are_replaced_whole(recipe, tmp_path):
    derived = load(write_derived(tmp_path, f"base: {recipe}\nbackbone: {{options: {{depth: 2}}}}\n"))
    assert derived.backbone.options == {"depth": 2}


def test_base_that_is_unknown_or_has_a_base_itself_is_refused(recipe, tmp_path):
    assert refusal(write_derived(tmp_path, "base: idmm_digit\n")).startswith("recipe idmm_digit is unknown")
    path = write_derived(tmp_path, "base: idmm_t2t_vit_7\n")
    assert refusal(path) == (
        f"recipe {path}: its base idmm_t2t_vit_7 has a base itself, idmm_deit_tiny; one step is all there is"
    )


def test_wrong_setting_of_a_base_is_named_with_the_recipe_that_has_it(tmp_path):
    (tmp_path / "bad.yaml").write_text("epochs: 0\n")
    path = write_derived(tmp_path, "base: bad.yaml\nseed: -1\n")
    assert refusal(path).splitlines() == [
        "2 settings are wrong:",
        f"  seed: must be greater than or equal to 0, got -1 (from recipe {path})",
        f"  epochs: must be greater than or equal to 1, got 0 (from recipe {tmp_path / 'bad.yaml'})",
    ]


def test_base_is_looked_for_beside_the_recipe_and_then_from_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    for folder, epochs in ((tmp_path, 4), (tmp_path / "own", 5)):
        (folder / "mine.yaml").write_text(f"epochs: {epochs}\n")
    monkeypatch.chdir(tmp_path)
    write_derived(tmp_path / "own", "base: mine.yaml\n")
    assert load("own/derived.yaml").epochs == 5
    (tmp_path / "own/mine.yaml").unlink()
    assert load("own/derived.yaml").epochs == 4


def test_recipe_with_data_of_its_own_has_not_the_test_set_of_its_base(tmp_path):
    path = write_derived(tmp_path, "base: finetune_digits\ndata: {train: my.beton}\n")
    assert load("finetune_digits", command="finetune").data.test == "digits"
    assert load(path, command="finetune").data.test is None and "test" not in read_recipe(path)["data"]
    path = write_derived(tmp_path, "base: finetune_digits\ndata: {train: my.beton, test: t.beton}\n")
    assert load(path, command="finetune").data.test == "t.beton"


# packaged recipes


@pytest.mark.parametrize("name", [name for name, _ in list_recipes()])
def test_packaged_recipe_is_valid_and_starts_with_command_time_and_expectation(name):
    settings = load(name, command=None)
    header = read_header(files("vitds") / "recipes" / f"{name}.yaml")
    command = f"vitds {METHODS[settings.method].command}"
    assert list(header) == ["Command", "Time", "Expect", "About"]
    assert header["Command"].startswith(f"{command} --recipe {name}")


def test_chunks_of_the_digits_recipes_divide_over_the_usual_ranks():
    for command in DEFAULT_RECIPES:
        settings = load(command=command)
        chunks = settings.batch.global_images // settings.batch.chunk_images
        assert [ranks for ranks in (1, 2, 3, 4, 6, 8) if chunks % ranks] == []


def test_both_arms_of_the_digits_have_one_backbone():
    assert load(command="pretrain").backbone.options == load(command="finetune").backbone.options


def test_paper_recipe_has_the_papers_numbers():
    # DeiT-Tiny in the authors' code: 800 epochs, batch 256 over 4 processes, AdamW 5e-4 and 1e-3, 2 + 4 crops
    # of 112 px.
    recipe = read_recipe("idmm_deit_tiny")
    assert (recipe["epochs"], recipe["batch"]["global_images"], recipe["batch"]["chunk_images"]) == (
        800,
        256,
        64,
    )
    assert (recipe["optimizer"]["lr_peak"], recipe["optimizer"]["weight_decay"]) == (5e-4, 1e-3)
    assert [(group["views"], group["scale"]) for group in recipe["views"]["groups"]] == [
        (2, [0.14, 1.0]),
        (4, [0.05, 0.4]),
    ]


# The authors' scripts: peak rate and warm-up epochs of pretraining, rate at 224 px, images and rate at 448
# px, images of one process in pretraining. DeiT-Base, PVTv2-B3 and T2T-ViT-7 have none of their own; they
# take those of their family.
PAPERS = {
    "deit_tiny": ("deit_tiny_patch16_224", 5e-4, 2, 5e-4, 128, 5e-5, 64),
    "deit_base": ("deit_base_patch16_224", 5e-4, 2, 5e-4, 128, 5e-5, 64),
    "pvt_v2_b0": ("pvt_v2_b0", 1e-3, 10, 1e-3, 128, 5e-5, 64),
    "pvt_v2_b3": ("pvt_v2_b3", 1e-3, 10, 1e-3, 128, 5e-5, 64),
    "t2t_vit_7": ("t2t_vit_7", 1e-3, 10, 1e-3, 32, 1.25e-5, 16),
    "t2t_vit_14": ("t2t_vit_14", 1e-3, 10, 1e-3, 32, 1.25e-5, 16),
}


@pytest.mark.parametrize("key", PAPERS)
def test_recipes_of_the_papers_backbones_have_the_scripts_numbers(key):
    name, rate, warmup, rate_224, images_448, rate_448, chunk = PAPERS[key]
    first = load(f"idmm_{key}")
    second, third = (load(f"finetune_{key}_{side}", command="finetune") for side in (224, 448))
    stages = (first, second, third)
    assert {stage.backbone.name for stage in stages} == {name}
    assert {stage.backbone.drop_path for stage in stages} == {0.1}
    assert {stage.optimizer.weight_decay for stage in stages} == {1e-3}
    assert {stage.schedule.warmup_epochs for stage in stages} == {warmup}
    assert [stage.views.crop_px for stage in stages] == [112, 224, 448]
    assert [stage.epochs for stage in stages] == [800, 800, 100]
    assert [stage.optimizer.lr_peak for stage in stages] == [rate, rate_224, rate_448]
    assert [stage.batch.global_images for stage in stages] == [256, 256, images_448]
    assert first.batch.chunk_images == chunk and first.views.count == 6


# The authors' numbers, and where a small set asks for others: fewer prototypes, narrower projectors, a
# teacher that follows faster, MAE's small decoder.
RIVALS = {
    "simclr": {
        "simclr.temperature": 0.5,
        "simclr.layers": 3,
        "simclr.hidden": 2048,
        "simclr.width": 256,
        "optimizer.lr_peak": 5e-4,
        "optimizer.weight_decay": 1e-3,
        "optimizer.decay": "all",
        "batch.global_images": 512,
        "batch.chunk_images": 512,
        "schedule.warmup_epochs": 10,
    },
    "supcon": {
        "supcon.temperature": 0.1,
        "supcon.width": 128,
        "optimizer.lr_peak": 5e-4,
        "optimizer.weight_decay": 1e-3,
        "batch.global_images": 512,
        "batch.chunk_images": 512,
        "schedule.warmup_epochs": 10,
    },
    "mocov3": {
        "mocov3.temperature": 0.2,
        "mocov3.momentum": 0.99,
        "mocov3.hidden": 2048,
        "mocov3.width": 256,
        "backbone.frozen": ("patch_embed",),
        "optimizer.lr_peak": 6e-4,
        "optimizer.weight_decay": 0.1,
        "optimizer.decay": "all",
        "optimizer.clip_norm": 0,
        "batch.global_images": 512,
        "batch.chunk_images": 512,
        "schedule.warmup_epochs": 40,
    },
    "dino": {
        "dino.prototypes": 4096,
        "dino.hidden": 2048,
        "dino.width": 256,
        "dino.temperature": 0.1,
        "dino.teacher_temperature": (0.04, 0.04),
        "dino.momentum": 0.99,
        "dino.centre_momentum": 0.9,
        "dino.frozen_epochs": 12,
        "backbone.drop_path": 0.1,
        "optimizer.lr_peak": 5e-4,
        "optimizer.weight_decay": 0.04,
        "optimizer.weight_decay_end": 0.4,
        "optimizer.decay": "matrices",
        "optimizer.clip_norm": 3.0,
        "batch.global_images": 256,
        "schedule.warmup_epochs": 10,
    },
    "mae": {
        "mae.width": 128,
        "mae.depth": 1,
        "backbone.patch_drop": 0.75,
        "backbone.drop_path": 0,
        "backbone.options": {"patch_size": 8},
        "optimizer.lr_peak": 5e-4,
        "optimizer.betas": (0.9, 0.95),
        "optimizer.weight_decay": 0.05,
        "optimizer.decay": "matrices",
        "batch.global_images": 256,
        "schedule.warmup_epochs": 40,
    },
    "lejepa": {
        "lejepa.sigreg": 0.05,
        "lejepa.directions": 1024,
        "lejepa.hidden": 2048,
        "lejepa.width": 64,
        "optimizer.lr_peak": 5e-4,
        "optimizer.weight_decay": 0.05,
        "batch.global_images": 256,
        "batch.chunk_images": 256,
        "schedule.warmup_epochs": 10,
    },
}


@pytest.mark.parametrize("method", RIVALS)
def test_a_rivals_recipe_has_its_authors_numbers_on_the_papers_network(method: str) -> None:
    expected: dict[str, Any] = RIVALS[method] | {
        "method": method,
        "epochs": 800,
        "views.crop_px": 112,
        "backbone.name": "deit_tiny_patch16_224",
    }
    settings = load(f"{method}_deit_tiny")
    assert {key: attrgetter(key)(settings) for key in expected} == expected


# Of each view: the share of its area, colour, grey, blur and solarise; then the strengths of the colours.
SIMCLRS, BYOLS = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
RIVALS_VIEWS = {
    "simclr": ([((0.08, 1.0), 0.8, 0.2, 0.5, 0.0)] * 2, SIMCLRS),
    "supcon": ([((0.2, 1.0), 0.8, 0.2, 0.0, 0.0)] * 2, (0.4, 0.4, 0.4, 0.1)),
    "mocov3": ([((0.08, 1.0), 0.8, 0.2, 1.0, 0.0), ((0.08, 1.0), 0.8, 0.2, 0.1, 0.2)], BYOLS),
    # Blur and solarise of the global views are the means of the authors' two.
    "dino": (
        [((0.4, 1.0), 0.8, 0.2, 0.55, 0.1)] * 2 + [((0.05, 0.4), 0.8, 0.2, 0.5, 0.0)] * 4,
        BYOLS,
    ),
    "mae": ([((0.2, 1.0), 0.0, 0.0, 0.0, 0.0)], (0, 0, 0, 0)),
    "lejepa": (
        [((0.3, 1.0), 0.8, 0.2, 0.5, 0.2)] * 2 + [((0.05, 0.3), 0.8, 0.2, 0.5, 0.2)] * 4,
        BYOLS,
    ),
}


@pytest.mark.parametrize("method", RIVALS_VIEWS)
def test_a_rivals_recipe_has_its_authors_views(method: str) -> None:
    views = load(f"{method}_deit_tiny").views
    scales = [group.scale for group in views.groups for _ in range(group.views)]
    chances = [views.of_each_view(name) for name in ("colour", "grey", "blur", "solarise")]
    strengths = (views.brightness, views.contrast, views.saturation, views.hue)
    assert (list(zip(scales, *chances, strict=True)), strengths) == RIVALS_VIEWS[method]
    assert set(views.of_each_view("flip")) == {0.5} and views.blur_sigma == (0.1, 2.0)


@pytest.mark.parametrize("method", ["diet", "simclr", "mocov3", "dino", "lejepa", "supcon"])
def test_the_methods_recipes_for_a_cpu_differ_in_what_is_the_methods_own(method: str) -> None:
    idmm, other = load("photos_cpu"), load(f"{method}_photos_cpu")
    for key in (
        "backbone",
        "schedule",
        "engine",
        "checkpoint",
        "epochs",
        "optimizer.kind",
        "optimizer.lr_peak",
    ):
        assert attrgetter(key)(other) == attrgetter(key)(idmm), key
    views = other.views.model_copy(update={"groups": idmm.views.groups})
    assert views == idmm.views
