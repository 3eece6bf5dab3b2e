"""What a run can be made of, and a choice of cases in which each two values meet."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations, product
from typing import Any

# step: where the run is cut, of three steps an epoch. micro_images: of 24 a step.
DIMENSIONS: dict[str, tuple[Any, ...]] = {
    "ranks": (1, 2),
    "stage": ("0", "1", "2", "3", "2_offload", "3_offload"),
    "precision": ("fp32", "bf16", "bf16_parameters"),
    "head": ("dense", "sharded", "lean", "lazy_bf16"),
    "micro_images": (4, 12),
    "step": (2, 3),
    "average_decay": (0.0, 0.9),
    "backbone": ("vit", "resnet"),
    "method": ("idmm", "supervised"),
    "frozen": ("nothing", "a part", "the backbone"),
}
FROZEN = {
    "vit": {
        "nothing": "[]",
        "a part": "[patch_embed, blocks.1.attn]",
        "the backbone": "[cls_token, pos_embed, patch_embed, blocks, norm]",
    },
    "resnet": {
        "nothing": "[]",
        "a part": "[conv1, layer2]",
        "the backbone": "[conv1, bn1, layer1, layer2, layer3, layer4]",
    },
}
Case = dict[str, Any]
HEADS = {
    "lean": {"head__kind": "sharded", "head__optimizer": "lean"},
    "lazy_bf16": {
        "head__optimizer": "lean",
        "head__row_dtype": "bf16",
        "head__sample_rate": 0.5,
        "head__lazy": True,
    },
}


def all_cases() -> Iterator[Case]:
    """The whole grid, but what is refused.

    That is: bf16 parameters at stage 0 or with BatchNorm, an instance head's kinds in fine-tuning, a sharded
    head with nothing beside it.
    """
    for values in product(*DIMENSIONS.values()):
        case = dict(zip(DIMENSIONS, values, strict=True))
        is_refused = case["precision"] == "bf16_parameters" and (
            case["stage"] == "0" or case["backbone"] == "resnet"
        )
        is_refused |= case["frozen"] == "the backbone" and case["head"] != "dense"
        if not is_refused and (case["method"] == "idmm" or case["head"] == "dense"):
            yield case


def pairwise_cases() -> list[Case]:
    """Few cases in which every two values of two dimensions, that can be together, are together: the greedy
    choice."""
    pairs_of = [(case, set(combinations(case.items(), 2))) for case in all_cases()]
    missing = set().union(*(pairs for _, pairs in pairs_of))
    chosen = []
    while missing:
        case, pairs = max(pairs_of, key=lambda item: len(item[1] & missing))
        chosen.append(case)
        missing -= pairs
    return chosen


def options_of(case: Case) -> dict[str, Any]:
    """Words for small_run; a checkpoint is saved at the case's step."""
    return HEADS.get(case["head"], {"head__kind": case["head"]}) | {
        **{key: case[key] for key in ("stage", "precision", "backbone", "method")},
        "batch__micro_images": case["micro_images"],
        "optimizer__average_decay": case["average_decay"],
        "backbone__frozen": FROZEN[case["backbone"]][case["frozen"]],
        "checkpoint__every_steps": case["step"],
        "checkpoint__keep": 9,
    }
