"""Frozen parts of a backbone: they keep their first weights, the rest trains, and all else holds as without
them.

Exact resume with them is a dimension of grid.py.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.engine.grid import FROZEN
from tests.engine.training import SMALL, rewound, small_losses, small_run, small_run_path
from vitds.config.tree import Backbone
from vitds.config.yaml_text import parse_yaml
from vitds.errors import SettingsError
from vitds.heads.dense import INIT_STD
from vitds.models.build import build_backbone
from vitds.runs.directory import Run

PART, WHOLE = FROZEN["vit"]["a part"], FROZEN["vit"]["the backbone"]


def first_weights() -> dict[str, torch.Tensor]:
    settings = Backbone(name=SMALL["backbone.name"], options=parse_yaml(SMALL["backbone.options"], "options"))
    return build_backbone(settings, crop_px=16, seed=0).state_dict()


def kept(run: Path, before: dict[str, torch.Tensor]) -> set[str]:
    """The names of the weights that are as before, to the bit."""
    return {
        name
        for name, value in load_file(run / "backbone.safetensors").items()
        if torch.equal(value, before[name])
    }


@pytest.mark.parametrize("stage", ["0", "3_offload"])
def test_frozen_parts_keep_their_first_weights_and_the_rest_trains(
    rank_pool, digit_files, tmp_path: Path, stage: str
) -> None:
    rank_pool(2).run(
        small_run_path,
        str(tmp_path / "run"),
        digit_files,
        stage=stage,
        backbone__frozen=PART,
        optimizer__average_decay=0.9,
    )
    expected = {name for name in first_weights() if name.startswith(("patch_embed.", "blocks.1.attn."))}
    assert kept(tmp_path / "run", first_weights()) == expected


def test_a_wholly_frozen_backbone_is_a_linear_probe_by_gradient(
    rank_pool, digit_files, tmp_path: Path
) -> None:
    pretrained = Path(
        rank_pool(2).run(small_run_path, str(tmp_path / "pre"), digit_files, epochs=1, backbone__frozen=PART)[
            0
        ]
    )
    options = {
        "method": "supervised",
        "init": str(pretrained),
        "backbone__frozen": WHOLE,
        "epochs": 4,
        "stage": "2",
    }
    run = Path(rank_pool(2).run(small_run_path, str(tmp_path / "fine"), digit_files, **options)[0])
    before = load_file(pretrained / "backbone.safetensors")
    assert (
        kept(run, before) == set(before)
        and load_file(run / "head.safetensors")["weight"].std() > 1.2 * INIT_STD
    )
    assert 0 <= Run(tmp_path / "fine").summary["top1"] <= 100


@pytest.mark.parametrize(
    ("before", "after", "back", "options"),
    [
        ((2, "2"), (1, "3_offload"), (2, "0"), {"backbone__frozen": PART, "optimizer__average_decay": 0.9}),
        ((2, "3"), (1, "1"), (3, "3"), {"backbone__frozen": PART, "head__kind": "sharded"}),
        ((2, "0"), (1, "2"), (2, "3"), {"backbone__frozen": WHOLE, "head__kind": "dense"}),
    ],
    ids=str,
)
def test_a_run_with_frozen_parts_goes_on_with_other_ranks_and_stages(
    rank_pool, digit_files, tmp_path: Path, before, after, back, options: dict
) -> None:
    options |= {"checkpoint__every_steps": 2, "checkpoint__keep": 9, "batch__micro_images": 4}
    (ranks, stage), (ranks_after, stage_after), (ranks_back, stage_back) = before, after, back
    expected = rank_pool(ranks).run(
        small_losses, str(tmp_path / "whole"), digit_files, stage=stage, **options
    )[0]
    first = rewound(tmp_path / "whole", tmp_path / "first", 2)
    rank_pool(ranks_after).run(small_losses, str(first), digit_files, stage=stage_after, **options)
    second = rewound(first, tmp_path / "second", 4)
    losses = rank_pool(ranks_back).run(small_losses, str(second), digit_files, stage=stage_back, **options)[0]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert (
        kept(second, load_file(tmp_path / "whole/backbone.safetensors"))
        >= kept(second, first_weights())
        != set()
    )


def test_a_part_that_the_backbone_does_not_have_is_refused_with_near_ones() -> None:
    with pytest.raises(
        SettingsError,
        match=r"backbone.frozen 'patch_embd': no parameter's name begins so; there are patch_embed",
    ):
        build_backbone(Backbone(frozen=("patch_embd",)), crop_px=32, seed=0)
    with pytest.raises(
        SettingsError, match=r"begins so; there are blocks, cls_token, norm, patch_embed, pos_embed"
    ):
        build_backbone(Backbone(frozen=("x",)), crop_px=32, seed=0)


def test_block_1_is_not_block_10() -> None:
    frozen = [
        name
        for name, value in build_backbone(
            Backbone(frozen=("blocks.1",)), crop_px=32, seed=0
        ).named_parameters()
        if not value.requires_grad
    ]
    assert frozen and all(name.startswith("blocks.1.") for name in frozen)


def nothing_to_train(run: str, data: tuple[str, str]) -> str:
    with pytest.raises(SettingsError) as caught:
        small_run(run, data, backbone__frozen=WHOLE, head__kind="sharded")
    return str(caught.value)


def test_a_frozen_backbone_beside_a_sharded_head_is_refused(rank_pool, digit_files, tmp_path: Path) -> None:
    said = rank_pool(1).run(nothing_to_train, str(tmp_path / "run"), digit_files)[0]
    assert "backbone.frozen freezes the whole backbone" in said and "set head.kind=dense" in said
