"""The rivals in real runs on real ranks: equal steps, exact resume, the teacher, what is
refused, what probes tell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.engine.training import METHODS, SMALL, outcome, rewound, small_losses, small_run, small_run_path
from vitds.config.tree import Backbone, Optimizer
from vitds.config.yaml_text import parse_yaml
from vitds.errors import SettingsError
from vitds.models.build import build_backbone
from vitds.runs.checkpoint import CheckpointReader, list_checkpoints, verify_checkpoint
from vitds.runs.metrics import read_metrics
from vitds.schedule import teacher_momentum, weight_decay

STEPS = 6  # three epochs of two steps
SAVES = {"checkpoint__every_steps": 1, "checkpoint__keep": 9}

# (method, ranks, ZeRO stage, micro batch, more); each is compared with one rank, stage 0, the whole step in
# one pass.
GRID = [
    ("simclr", 1, 2, 4, {"engine__activation_checkpointing": "true"}),
    ("simclr", 2, 3, 12, {}),
    ("simclr", 3, 1, 8, {}),
    ("mocov3", 1, 1, 16, {}),
    ("mocov3", 2, 0, 8, {"engine__activation_checkpointing": "true"}),
    ("mocov3", 3, 2, 8, {}),
    ("lejepa", 2, 3, 8, {"engine__activation_checkpointing": "true"}),
    ("lejepa", 3, 1, 16, {}),
    ("supcon", 2, 3, 4, {"engine__activation_checkpointing": "true"}),
    ("supcon", 3, 1, 8, {}),
    ("dino", 2, 1, 4, {"engine__activation_checkpointing": "true"}),
    ("dino", 3, 2, 8, {}),
    ("mae", 2, 3, 4, {"engine__activation_checkpointing": "true"}),
    ("mae", 3, 1, 8, {}),
    ("supervised", 2, 3, 4, {}),
    ("supervised", 3, 1, 8, {}),
]


@pytest.fixture(scope="module")
def reference_losses(rank_pool, digit_files, tmp_path_factory) -> dict[str, list[float]]:
    root = tmp_path_factory.mktemp("reference")
    names = sorted({method for method, *_ in GRID})
    return {
        name: rank_pool(1).run(small_losses, str(root / name), digit_files, method=name)[0] for name in names
    }


@pytest.mark.parametrize(("method", "ranks", "stage", "micro_images", "more"), GRID)
def test_losses_do_not_depend_on_ranks_stage_or_accumulation(
    rank_pool,
    digit_files,
    tmp_path: Path,
    reference_losses,
    method: str,
    ranks: int,
    stage: int,
    micro_images: int,
    more: dict[str, Any],
) -> None:
    losses = rank_pool(ranks).run(
        small_losses,
        str(tmp_path / "run"),
        digit_files,
        method=method,
        stage=stage,
        batch__micro_images=micro_images,
        **more,
    )[0]
    np.testing.assert_allclose(losses, reference_losses[method], rtol=2e-5)


@pytest.mark.parametrize(
    ("method", "ranks", "options"),
    [
        ("simclr", 2, {"stage": 3, "batch__micro_images": 4}),
        ("simclr", 1, {"stage": "2_offload", "precision": "bf16", "optimizer__average_decay": 0.9}),
        ("mocov3", 2, {"stage": 2, "batch__micro_images": 8, "optimizer__average_decay": 0.9}),
        ("mocov3", 1, {"stage": 0, "precision": "bf16", "backbone": "resnet"}),
        ("lejepa", 2, {"stage": 2, "precision": "bf16", "batch__micro_images": 8}),
        ("supcon", 2, {"stage": 1, "precision": "bf16", "batch__micro_images": 4}),
        ("dino", 2, {"stage": 2, "precision": "bf16", "batch__micro_images": 4}),
        ("mae", 2, {"stage": 2, "precision": "bf16", "batch__micro_images": 4}),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    rank_pool, digit_files, tmp_path: Path, method: str, ranks: int, options: dict[str, Any]
) -> None:
    options = options | SAVES | {"method": method}
    rank_pool(ranks).run(small_run_path, str(tmp_path / "whole"), digit_files, **options)
    cut = rewound(tmp_path / "whole", tmp_path / "cut", 2)
    rank_pool(ranks).run(small_run_path, str(cut), digit_files, **options)
    assert outcome(cut) == outcome(tmp_path / "whole")


def test_mocov3_goes_on_with_other_ranks_and_stage(rank_pool, digit_files, tmp_path: Path) -> None:
    options = {"method": "mocov3", "batch__micro_images": 8} | SAVES
    expected = rank_pool(2).run(small_losses, str(tmp_path / "whole"), digit_files, stage=2, **options)[0]
    cut = rewound(tmp_path / "whole", tmp_path / "cut", 3)
    losses = rank_pool(1).run(small_losses, str(cut), digit_files, stage=0, **options)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


# The teacher


def saved_weights(run: Path) -> list[dict[str, Tensor]]:
    """All tensors of each step's checkpoint by name."""
    readers = [CheckpointReader(verify_checkpoint(path)) for path in list_checkpoints(run / "checkpoints")]
    return [{name: reader.get(name) for name in reader.names()} for reader in readers]


@pytest.fixture(scope="module")
def taught(rank_pool, digit_files, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("taught") / "run"
    options = {"method": "mocov3", "mocov3__momentum": 0.6, "backbone__frozen": "[patch_embed]"} | SAVES
    rank_pool(1).run(small_run_path, str(run), digit_files, epochs=3, **options)
    return run


def test_the_teacher_follows_the_student_after_each_update(taught: Path) -> None:
    steps = saved_weights(taught)
    names = [name for name in steps[0] if name.startswith("teacher.")]
    assert len(names) == sum(1 for name in steps[0] if name in {n.removeprefix("teacher.") for n in names})
    for done in range(2, STEPS + 1):
        momentum = teacher_momentum(done, start=0.6, total=STEPS)
        before, now = steps[done - 2], steps[done - 1]
        for name in names:
            expected = momentum * before[name] + (1 - momentum) * now[name.removeprefix("teacher.")]
            torch.testing.assert_close(now[name], expected, rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(steps[0][name], steps[1][name]) for name in names)


def test_the_teacher_starts_as_the_student_and_has_no_gradient(taught: Path) -> None:
    first, last = saved_weights(taught)[0], saved_weights(taught)[-1]
    assert not [
        name for name in last if name.startswith("teacher.") and name.endswith(("exp_avg", "exp_avg_sq"))
    ]
    settings = Backbone(name=SMALL["backbone.name"], options=parse_yaml(SMALL["backbone.options"], "options"))
    for name, value in build_backbone(settings, crop_px=16, seed=0).state_dict().items():
        assert torch.equal(first[f"teacher.backbone.{name}"], value), name  # the first step's rate is 0


def test_a_frozen_patch_layer_stays_to_the_bit_in_student_and_teacher(taught: Path) -> None:
    first, last = saved_weights(taught)[0], saved_weights(taught)[-1]
    for prefix in ("backbone.", "teacher.backbone."):
        assert torch.equal(
            first[f"{prefix}patch_embed.proj.weight"], last[f"{prefix}patch_embed.proj.weight"]
        )
        assert not torch.equal(
            first[f"{prefix}blocks.0.mlp.fc1.weight"], last[f"{prefix}blocks.0.mlp.fc1.weight"]
        )


def test_the_students_backbone_leaves_the_run(taught: Path) -> None:
    result, last = load_file(taught / "backbone.safetensors"), saved_weights(taught)[-1]
    assert set(result) == {
        n.removeprefix("backbone.") for n in last if n.startswith("backbone.") and "exp_avg" not in n
    }
    assert all(torch.equal(value, last[f"backbone.{name}"]) for name, value in result.items())


def test_a_momentum_of_one_leaves_the_teacher_as_it_was(rank_pool, digit_files, tmp_path: Path) -> None:
    options = {"method": "mocov3", "mocov3__momentum": 1.0} | SAVES
    rank_pool(1).run(small_run_path, str(tmp_path / "run"), digit_files, **options)
    first, *_, last = saved_weights(tmp_path / "run")
    assert all(torch.equal(first[name], last[name]) for name in first if name.startswith("teacher."))


@pytest.fixture(scope="module")
def dino_run(rank_pool, digit_files, tmp_path_factory) -> Path:
    """Three epochs of two ranks, the prototypes held in the first; weight decay rises."""
    run = tmp_path_factory.mktemp("dino") / "run"
    options = {"method": "dino", "stage": 2, "batch__micro_images": 4, "optimizer__clip_norm": 3.0} | SAVES
    rank_pool(2).run(small_run_path, str(run), digit_files, epochs=3, **options)
    return run


def test_prototypes_stay_to_the_bit_in_their_first_epoch_and_move_after_it(dino_run: Path) -> None:
    steps = saved_weights(dino_run)
    prototypes = [step["prototypes.weight"] for step in steps]
    assert all(torch.equal(prototypes[0], value) for value in prototypes[:3])  # three steps an epoch
    assert not torch.equal(prototypes[2], prototypes[3])
    assert not torch.equal(steps[1]["projector.0.weight"], steps[2]["projector.0.weight"])


def test_dinos_teacher_and_centre_follow_after_each_update_on_two_ranks(dino_run: Path) -> None:
    steps = saved_weights(dino_run)
    names = [name for name in steps[0] if name.startswith("teacher.")]
    for done in range(2, len(steps) + 1):
        momentum = teacher_momentum(done, start=0.6, total=len(steps))
        before, now = steps[done - 2], steps[done - 1]
        for name in names:
            expected = momentum * before[name] + (1 - momentum) * now[name.removeprefix("teacher.")]
            torch.testing.assert_close(now[name], expected, rtol=1e-6, atol=1e-7)
        assert 0 < (now["centre"] - before["centre"]).abs().max() < 0.2  # a tenth of a mean of cosines
    lines = read_metrics(dino_run / "metrics.jsonl")
    assert all(0 < line["loss/entropy"] <= np.log(32) and line["loss/distance"] >= 0 for line in lines)


def weight_decay_found(before: dict[str, Tensor], now: dict[str, Tensor], name: str, line: dict) -> float:
    """What an update took from a weight beside AdamW's own step, as a share of rate times weight."""
    updates = line["step"] + 1
    first, second = (now[f"{name}.{moment}"].double() for moment in ("exp_avg", "exp_avg_sq"))
    direction = first / (1 - 0.9**updates) / ((second / (1 - 0.999**updates)).sqrt() + 1e-8)
    weight = before[name].double()
    taken = weight - line["lr"] * direction - now[name].double()
    return float((taken * weight).sum() / weight.square().sum()) / line["lr"]


def test_dinos_matrices_lose_the_scheduled_weight_decay_in_each_step_and_norms_none(dino_run: Path) -> None:
    steps, lines = saved_weights(dino_run), read_metrics(dino_run / "metrics.jsonl")
    rising = Optimizer(weight_decay=0.04, weight_decay_end=0.4)
    assert len(steps) == 9 and lines[0]["lr"] == 0  # a step at a rate of 0 takes nothing
    for step in range(1, 9):
        around = steps[step - 1], steps[step]
        matrix = weight_decay_found(*around, "backbone.blocks.0.mlp.fc1.weight", lines[step])
        assert matrix == pytest.approx(weight_decay(rising, step, 9), rel=0.01)
        assert weight_decay_found(*around, "backbone.norm.weight", lines[step]) == pytest.approx(0, abs=2e-3)


def test_dinos_teacher_leaves_the_run(dino_run: Path) -> None:
    result, last = load_file(dino_run / "backbone.safetensors"), saved_weights(dino_run)[-1]
    assert all(torch.equal(value, last[f"teacher.backbone.{name}"]) for name, value in result.items())
    assert any(not torch.equal(value, last[f"backbone.{name}"]) for name, value in result.items())


def refusal(run: str, data: tuple[str, str], **options: Any) -> str:
    with pytest.raises(SettingsError) as caught:
        small_run(run, data, **options)
    return str(caught.value)


@pytest.mark.parametrize("method", ["mocov3", "dino"])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"stage": 3},
            "ZeRO stage 3 leaves no rank with whole weights to follow; take a DeepSpeed JSON of stage 0 to 2",
        ),
        (
            {"stage": 1, "precision": "bf16_parameters"},
            "16-bit weights would round away; set engine.precision=bf16",
        ),
        ({"stage": 1, "precision": "fp16"}, "16-bit weights would round away; set engine.precision=bf16"),
    ],
    ids=str,
)
def test_weights_that_a_teacher_cannot_follow_are_refused(
    rank_pool, digit_files, tmp_path: Path, method: str, options: dict[str, Any], text: str
) -> None:
    said = rank_pool(1).run(refusal, str(tmp_path / "run"), digit_files, method=method, **options)[0]
    assert said.startswith(f"method {method} has a teacher that ") and text in said


THREE_VIEWS = ({"views__groups": "[{name: a, views: 3}]"}, "takes 2 views of an image in all, got 3")
ONE_VIEW = (
    {"views__groups": "[{name: a, views: 1}]"},
    "compares the views of an image, so it needs 2 or more, got 1",
)
ONE_IMAGE = ({"batch__chunk_images": 1}, "compares the images of a chunk, so it needs 2 or more, got 1")


@pytest.mark.parametrize(
    ("method", "wrong"),
    [
        *(("simclr", wrong) for wrong in (THREE_VIEWS, ONE_IMAGE)),
        *(("mocov3", wrong) for wrong in (THREE_VIEWS, ONE_IMAGE)),
        *(("lejepa", wrong) for wrong in (ONE_VIEW, ONE_IMAGE)),
        *(("supcon", wrong) for wrong in (THREE_VIEWS, ONE_IMAGE)),
        ("dino", ONE_VIEW),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value[0])),
)
def test_what_has_nothing_to_compare_is_refused(
    digit_files, tmp_path: Path, method: str, wrong: tuple[dict, str]
) -> None:
    change, text = wrong
    assert text in refusal(str(tmp_path / "run"), digit_files, method=method, **change)


# What the probes tell


def probed(run: str, data: tuple[str, str], **options: Any) -> dict[str, float]:
    return read_metrics(small_run(run, data, eval__every_epochs=10, epochs=10, **options).metrics)[-1]


@pytest.mark.parametrize("method", ["simclr", "mocov3", "lejepa", "supcon", "dino", "mae"])
def test_a_run_that_collapses_on_purpose_is_seen_in_the_probes(
    rank_pool, digit_files, tmp_path: Path, method: str
) -> None:
    """A weight decay that kills every matrix leaves the same features for all images."""
    options = {
        "method": method,
        "optimizer__decay": "matrices",
        "optimizer__weight_decay": 90.0,
        "optimizer__lr_peak": 1e-2,
    }
    found = rank_pool(1).run(probed, str(tmp_path / "run"), digit_files, **options)[0]
    assert (
        found["probe/uniformity"] > -1e-3 and found["probe/rankme"] < 1.1 and found["probe/alignment"] < 1e-3
    )


def test_every_method_is_tried_here() -> None:
    assert {method for method, *_ in GRID} | {"idmm"} == set(METHODS)  # idmm: tests/engine/test_step.py
