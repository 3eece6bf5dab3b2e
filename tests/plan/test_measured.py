"""The plan's memory against what real ranks took, to 15 %.

The first cases are for every run of the suite, the others for `VITDS_PLAN_TESTS=1 pytest tests/plan/test_measured.py`.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

from tests.plan.measured import NARROW, WIDE, measured_and_planned
from tests.ranks import RankPool

at_length = pytest.mark.skipif(
    os.environ.get("VITDS_PLAN_TESTS") != "1", reason="takes minutes; runs with VITDS_PLAN_TESTS=1"
)

ACTIVATIONS = {"views.crop_px": 48, "batch.micro_images": 8}
SHARDED = {"batch.micro_images": 4, "head.kind": "sharded"}
LEAN_BF16 = {"head.optimizer": "lean", "head.row_dtype": "bf16"}
LAZY = {"head.sample_rate": 0.1, "head.lazy": "true"}
# ranks, ZeRO stage, rows, backbone, settings: 8 images a step of 6 crops at 32 px where not said otherwise
CASES = [
    (1, 0, 60, NARROW, ACTIVATIONS),
    (2, 2, 50_001, WIDE, SHARDED | {"head.optimizer": "lean"}),
]
MORE = [
    (
        1,
        0,
        60,
        NARROW,
        ACTIVATIONS
        | {"batch.global_images": 16, "batch.micro_images": 16, "engine.activation_checkpointing": "true"},
    ),
    (1, 2, 60, WIDE, {"batch.micro_images": 4}),
    (1, 3, 60, WIDE, {"batch.micro_images": 8}),
    (1, "3_offload", 60, WIDE, {"batch.micro_images": 4}),
    (1, 0, 60, WIDE, {"batch.micro_images": 8, "optimizer.average_decay": 0.9}),
    (2, 0, 50_001, WIDE, SHARDED),
    (2, 2, 100_001, WIDE, SHARDED | LEAN_BF16),
    (2, 0, 50_001, WIDE, SHARDED | LAZY),
    (1, 0, 100_001, WIDE, SHARDED | LEAN_BF16 | LAZY),
    (2, 1, 60, WIDE, {"batch.micro_images": 2}),
    (2, 3, 60, WIDE, {"batch.micro_images": 4}),
    (2, 2, 60, WIDE, {"batch.micro_images": 4, "backbone.frozen": "[blocks.0, blocks.1]"}),
]


@pytest.mark.parametrize(
    "ranks, stage, rows, backbone, changes",
    [*CASES, *(pytest.param(*case, marks=at_length) for case in MORE)],
)
def test_plan_is_what_a_rank_takes(
    digit_files: tuple[str, str],
    ranks: int,
    stage: int | str,
    rows: int,
    backbone: dict[str, Any],
    changes: dict[str, Any],
) -> None:
    pool = RankPool(ranks)  # of its own: ranks that served other tests hold what those left
    try:
        answers = pool.run(measured_and_planned, digit_files[0], stage, rows, backbone, changes)
    finally:
        pool.close()
    measured, planned = max(took for took, _, _ in answers), answers[0][1]
    print(
        f"{ranks} rank(s), ZeRO {stage}: measured {[took >> 20 for took, _, _ in answers]} MiB, planned {planned >> 20}; {answers[0][2]}"
    )
    assert measured > 100e6
    assert planned == pytest.approx(measured, rel=0.15)
