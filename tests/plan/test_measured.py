"""The plan's memory against what real ranks took, to 15 %.

The first cases are for every run of the suite. All of them run with
`VITDS_PLAN_TESTS=1 pytest tests/plan/test_measured.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.plan.measured import NARROW, PVT, RECIPE, T2T, TINY, WIDE, measured_and_planned
from tests.ranks import RankPool

at_length = pytest.mark.skipif(
    os.environ.get("VITDS_PLAN_TESTS") != "1", reason="takes minutes; runs with VITDS_PLAN_TESTS=1"
)


def chunk_of(images: int) -> dict[str, int]:
    """A step of one chunk."""
    return {f"batch.{key}_images": images for key in ("global", "chunk", "micro")}


ACTIVATIONS = {"views.crop_px": 48, "batch.micro_images": 8}
PAPERS_SIDE = {"views.crop_px": 112, "batch.micro_images": 8, "backbone.drop_path": 0.1}
SHARDED = {"batch.micro_images": 4, "head.kind": "sharded"}
CHECKPOINTED = {
    "batch.global_images": 16,
    "batch.micro_images": 16,
    "engine.activation_checkpointing": "true",
}
LEAN_BF16 = {"head.optimizer": "lean", "head.row_dtype": "bf16"}
LAZY = {"head.sample_rate": 0.1, "head.lazy": "true"}
# ranks, ZeRO stage, rows, backbone, settings, recipe: 8 images a step at 32 px where not said otherwise, of 6
# crops with RECIPE
CASES = [
    (1, 0, 60, NARROW, ACTIVATIONS, RECIPE),
    (2, 2, 50_001, WIDE, SHARDED | {"head.optimizer": "lean"}, RECIPE),
]
MORE = [
    (1, 0, 60, NARROW, ACTIVATIONS | CHECKPOINTED, RECIPE),
    (1, 0, 60, T2T, PAPERS_SIDE, RECIPE),
    (1, 0, 60, PVT, PAPERS_SIDE, RECIPE),
    (1, 2, 60, WIDE, {"batch.micro_images": 4}, RECIPE),
    (1, 3, 60, WIDE, {"batch.micro_images": 8}, RECIPE),
    (1, "3_offload", 60, WIDE, {"batch.micro_images": 4}, RECIPE),
    (1, 0, 60, WIDE, {"batch.micro_images": 8, "optimizer.average_decay": 0.9}, RECIPE),
    (2, 0, 50_001, WIDE, SHARDED, RECIPE),
    (2, 2, 100_001, WIDE, SHARDED | LEAN_BF16, RECIPE),
    (2, 0, 50_001, WIDE, SHARDED | LAZY, RECIPE),
    (1, 0, 100_001, WIDE, SHARDED | LEAN_BF16 | LAZY, RECIPE),
    (2, 1, 60, WIDE, {"batch.micro_images": 2}, RECIPE),
    (2, 3, 60, WIDE, {"batch.micro_images": 4}, RECIPE),
    (2, 2, 60, WIDE, {"batch.micro_images": 4, "backbone.frozen": "[blocks.0, blocks.1]"}, RECIPE),
    (1, 0, 0, TINY, chunk_of(1024) | {"simclr.hidden": 1024}, "simclr_digits"),
    (1, 0, 0, TINY, chunk_of(1024) | {"mocov3.hidden": 1024}, "mocov3_digits"),
    (2, 2, 0, WIDE, {"batch.chunk_images": 4, "batch.micro_images": 4}, "mocov3_digits"),
]


@pytest.mark.parametrize(
    "ranks, stage, rows, backbone, changes, recipe",
    [*CASES, *(pytest.param(*case, marks=at_length) for case in MORE)],
)
def test_plan_is_what_a_rank_takes(
    digit_files: tuple[str, str],
    ranks: int,
    stage: int | str,
    rows: int,
    backbone: dict[str, Any],
    changes: dict[str, Any],
    recipe: str,
) -> None:
    # Ranks of its own: those that served other tests hold what those left.
    pool = RankPool(ranks)
    try:
        answers = pool.run(measured_and_planned, digit_files[0], stage, rows, backbone, changes, recipe)
    finally:
        pool.close()
    measured = max(took for took, _, _ in answers)
    _, planned, largest = answers[0]
    print(
        f"{ranks} rank(s), ZeRO {stage}, {recipe}: measured {[took >> 20 for took, _, _ in answers]} MiB, "
        f"planned {planned >> 20}; {largest}"
    )
    assert measured > 100e6
    assert planned == pytest.approx(measured, rel=0.15)
