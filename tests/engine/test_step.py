"""The contract of a step: the same losses for every number of ranks, ZeRO stage, accumulation and head."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.training import small_losses, small_run_path
from vitds.runs.checkpoint import CheckpointReader, list_checkpoints, verify_checkpoint

# (ranks, ZeRO stage, micro batch, head, more): every value of each column, in pairs; the first is what all
# are compared with.
GRID = [
    (1, 0, 24, "dense", {}),
    (1, 1, 4, "dense", {}),
    (1, 2, 8, "sharded", {}),
    (1, 3, 12, "dense", {}),
    (2, 0, 4, "sharded", {}),
    (2, 1, 12, "sharded", {}),
    (2, 2, 12, "dense", {"engine__activation_checkpointing": "true"}),
    (2, 3, 4, "dense", {}),
    (2, 3, 12, "sharded", {"engine__activation_checkpointing": "true"}),
    (3, 0, 8, "dense", {}),
    (3, 1, 4, "dense", {}),
    (3, 2, 4, "sharded", {}),
    (3, 3, 8, "dense", {}),
]


@pytest.fixture(scope="module")
def reference_losses(rank_pool, digit_files, tmp_path_factory) -> list[float]:
    return rank_pool(1).run(small_losses, str(tmp_path_factory.mktemp("reference") / "run"), digit_files)[0]


@pytest.mark.parametrize(("ranks", "stage", "micro_images", "head", "more"), GRID[1:])
def test_losses_do_not_depend_on_ranks_stage_accumulation_or_head(
    rank_pool, digit_files, tmp_path: Path, reference_losses, ranks, stage, micro_images, head, more
) -> None:
    losses = rank_pool(ranks).run(
        small_losses,
        str(tmp_path / "run"),
        digit_files,
        stage=stage,
        head__kind=head,
        batch__micro_images=micro_images,
        **more,
    )[0]
    np.testing.assert_allclose(losses, reference_losses, rtol=2e-5)


def test_the_loss_starts_near_two_ln_n(reference_losses) -> None:
    # Two crops' losses of ln N each; the last step of an epoch has 4 real images of 24.
    assert abs(reference_losses[0] - 2 * np.log(52)) < 0.1


def test_the_loss_falls_far_below_chance(rank_pool, digit_files, tmp_path: Path) -> None:
    easy = dict(
        views__groups="[{name: global, views: 2, scale: [0.9, 1.0]}]",
        mix__kind="none",
        head__label_smoothing=0.0,
    )
    calm = dict(backbone__drop_path=0.0, backbone__patch_drop=0.0, optimizer__lr_peak=2e-2)
    losses = rank_pool(1).run(small_losses, str(tmp_path / "run"), digit_files, epochs=100, **easy, **calm)[0]
    assert np.mean(losses[-3:]) < 0.5 * np.log(52)


def test_averaged_weights_follow_their_definition_and_are_the_result(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    options = {
        "stage": 2,
        "optimizer__average_decay": 0.5,
        "checkpoint__every_steps": 1,
        "checkpoint__keep": 9,
    }
    rank_pool(2).run(small_run_path, str(tmp_path / "run"), digit_files, **options)
    saved = [
        CheckpointReader(verify_checkpoint(path))
        for path in list_checkpoints(tmp_path / "run" / "checkpoints")
    ]
    result = load_file(tmp_path / "run" / "backbone.safetensors")
    for name in result:
        averages = [reader.get(f"backbone.{name}.average") for reader in saved]
        for t in range(2, 7):
            decay = min(0.5, (1 + t) / (10 + t))
            expected = decay * averages[t - 2] + (1 - decay) * saved[t - 1].get(f"backbone.{name}")
            assert torch.allclose(averages[t - 1], expected, rtol=1e-5, atol=1e-7)
        assert torch.equal(result[name], averages[-1])


def test_checkpoints_come_by_steps_epochs_and_minutes(rank_pool, digit_files, tmp_path: Path) -> None:
    def saved_steps(name: str, **rules: float) -> list[int]:
        options = {f"checkpoint__{rule}": value for rule, value in rules.items()}
        rank_pool(1).run(small_run_path, str(tmp_path / name), digit_files, checkpoint__keep=9, **options)
        return [
            int(path.name.removeprefix("step-")) for path in list_checkpoints(tmp_path / name / "checkpoints")
        ]

    assert saved_steps("steps and epochs", every_steps=2, every_epochs=1) == [2, 3, 4, 6]
    by_minutes = saved_steps("minutes", every_minutes=1e-6)
    assert (by_minutes[0], by_minutes[-1]) == (1, 6)
    assert saved_steps("end", every_minutes=0) == [6]
