"""The instance head in a run: its own rate, rows that start from features, sampled negatives, and one flag
for head and backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.training import small_losses, small_run, stopped_run, untimed
from tests.heads.reference import full_logits
from vitds import dist
from vitds.config.load import load_settings
from vitds.data.beton import open_beton
from vitds.data.loader import eval_batches
from vitds.engine.head_shard import HeadShard
from vitds.engine.optimizer import build_optimizer
from vitds.engine.update import JointUpdate
from vitds.errors import DataError
from vitds.evaluate.files import own_features
from vitds.heads import DenseHead
from vitds.heads.first_rows import set_rows_from_features
from vitds.methods import method_class
from vitds.methods.classifier import WithHead
from vitds.models.build import build_backbone

TINY = [
    "views.crop_px=16",
    "backbone.name=vit_tiny_patch16_224",
    "backbone.options={patch_size: 8, embed_dim: 24, depth: 2, num_heads: 3}",
]


@pytest.mark.parametrize("options", [{"head__lr_scale": 4}, {"head__init": "features"}], ids=str)
def test_losses_are_the_same_dense_and_sharded(
    rank_pool, digit_files, tmp_path: Path, options: dict[str, Any]
) -> None:
    plain, expected = (
        rank_pool(1).run(small_losses, str(tmp_path / str(len(more))), digit_files, **more)[0]
        for more in ({}, options)
    )
    assert abs(np.subtract(plain, expected)).max() > 1e-3
    for ranks, stage, kind in ((2, 2, "dense"), (2, 3, "dense"), (2, 1, "sharded")):
        run = str(tmp_path / f"{stage}{kind}")
        found = rank_pool(ranks).run(small_losses, run, digit_files, stage=stage, head__kind=kind, **options)[
            0
        ]
        np.testing.assert_allclose(found, expected, rtol=2e-5)


def test_the_heads_rate_is_a_multiple_of_the_backbones() -> None:
    settings = load_settings(recipe=None, command="pretrain", assignments=[], flags={})
    head = DenseHead(5, 4, bias=True, label_smoothing=0.0, seed=0)
    module = WithHead(torch.nn.Linear(3, 4), head)
    alike = build_optimizer(module, settings.optimizer, lr_scales={"head.": 1.0})
    assert [len(group["params"]) for group in alike.param_groups] == [4]
    optimizer = build_optimizer(module, settings.optimizer, lr_scales={"head.": 4.0})
    assert [group["lr_scale"] for group in optimizer.param_groups] == [1.0, 4.0]
    assert optimizer.param_groups[1]["params"] == list(head.parameters())


@torch.no_grad()
@pytest.mark.parametrize("images", [1, 7])
def test_first_rows_of_images_that_are_all_the_same_are_refused(images: int) -> None:
    head = DenseHead(images, 24, bias=True, label_smoothing=0.0, seed=0)
    x_nD = torch.randn(1, 24).expand(images, -1) * (1 + 1e-7 * torch.randn(images, 1))
    with pytest.raises(DataError, match=r"all training images have the same features.*head\.init=noise"):
        set_rows_from_features(head, x_nD.clone(), torch.arange(images), torch.device("cpu"))


@torch.no_grad()
def test_first_rows_are_the_images_features_centred_and_scaled(digit_files) -> None:
    settings = load_settings(recipe=None, command="pretrain", assignments=TINY, flags={})
    file = open_beton(digit_files[0])
    backbone = build_backbone(settings.backbone, crop_px=16, seed=3).eval()
    head = DenseHead(file.images, 24, bias=True, label_smoothing=0.0, seed=0)
    x_nD, index_n = own_features(settings, backbone, file, np.arange(file.images), torch.device("cpu"))
    set_rows_from_features(head, x_nD, index_n, torch.device("cpu"))
    channels = [torch.tensor(values)[:, None, None] for values in (settings.views.mean, settings.views.std)]
    rows = []
    for batch in eval_batches(file, settings.views, batch_images=1):
        rows.append(backbone((batch.crops / 255 - channels[0]) / channels[1])[0])
    expected = torch.stack(rows) - torch.stack(rows).mean(0)
    torch.testing.assert_close(
        head.weight.data, 0.02 * expected / expected.square().mean().sqrt(), rtol=1e-3, atol=1e-6
    )


LAZY = {"head__sample_rate": 0.5, "head__lazy": True}
LEAN_BF16 = {"head__optimizer": "lean", "head__row_dtype": "bf16"}


@pytest.mark.parametrize(
    "options",
    [{"head__init": "features"}, {"head__sample_rate": 0.5}, LAZY, LEAN_BF16, LAZY | LEAN_BF16],
    ids=str,
)
def test_a_stopped_run_goes_on_to_the_same_lines(
    rank_pool, digit_files, tmp_path: Path, options: dict[str, Any]
) -> None:
    options |= {"epochs": 3, "head__kind": "sharded", "checkpoint__every_steps": 1}
    rank_pool(2).run(whole_run, str(tmp_path / "whole"), digit_files, **options)
    rank_pool(2).run(stopped_run, str(tmp_path / "stopped"), digit_files, after_lines=4, **options)
    assert 0 < len(untimed(tmp_path / "stopped")) < 9
    rank_pool(2).run(whole_run, str(tmp_path / "stopped"), digit_files, **options)
    assert untimed(tmp_path / "stopped") == untimed(tmp_path / "whole")


def whole_run(run: str, data: tuple[str, str], **options: Any) -> None:
    small_run(run, data, **options)


def changes_of_steps(
    run: str, data: tuple[str, str], bad_step: int, **options: Any
) -> list[tuple[bool, bool]]:
    """Whether each step changed the backbone and the head's rows; in one, rank 1's rows get a gradient that
    is not finite."""
    changes: list[tuple[bool, bool]] = []
    gradient_norm = HeadShard.gradient_norm
    apply = JointUpdate.apply

    def norm_with_inf(head: HeadShard) -> float:
        if len(changes) == bad_step and dist.rank() == 1:
            head.head.weight.grad[0, 0] = torch.inf
        return gradient_norm(head)

    def watched(update: JointUpdate, *arguments: Any, **options: Any) -> tuple[bool, dict[str, float]]:
        before = update.state.weights()
        rows = update.heads[0].head.weight.detach().clone()
        found = apply(update, *arguments, **options)
        after = update.state.weights()
        is_same = all(torch.equal(before[name], after[name]) for name in before)
        changes.append((not is_same, not torch.equal(rows, update.heads[0].head.weight)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeadShard, "gradient_norm", norm_with_inf)
        patch.setattr(JointUpdate, "apply", watched)
        small_run(run, data, head__kind="sharded", **options)
    return changes


@pytest.mark.parametrize("stage", [0, 2])
def test_an_infinite_gradient_of_the_head_alone_skips_head_and_backbone_on_all_ranks(
    rank_pool, digit_files, tmp_path: Path, stage: int
) -> None:
    for changes in rank_pool(2).run(
        changes_of_steps, str(tmp_path / "run"), digit_files, bad_step=3, stage=stage
    ):
        moved, stayed = (True, True), (False, False)
        assert changes == [stayed, moved, moved, stayed, moved, moved]  # the first step's learning rate is 0
    assert '"skipped": 1' in untimed(tmp_path / "run")[-1]


def test_instances_recognised_are_counted_by_the_cosine_heads_own_logits() -> None:
    words = [*TINY, "head.cosine=true", "head.temperature=0.5", "head.kind=dense"]
    settings = load_settings(recipe=None, command="pretrain", assignments=words, flags={})
    method = method_class(settings.method)(
        settings, build_backbone(settings.backbone, crop_px=16, seed=0), 40
    )
    generator = torch.Generator().manual_seed(0)
    shapes = ((40, 24), (40, 24), (40,))
    features, weight, bias = (torch.randn(shape, generator=generator) for shape in shapes)
    features = 5 * (features + weight)  # as long as these they would outweigh any bias
    expected = full_logits(features, weight, bias, temperature=0.5).argmax(1) == torch.arange(40)
    found = method.probes(features, torch.arange(40), {"head.weight": weight, "head.bias": bias})
    assert found == {"probe/instance_top1": 100 * float(expected.double().mean())}
    assert 10 < found["probe/instance_top1"] < 90
