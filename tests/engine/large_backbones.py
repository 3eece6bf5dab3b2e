"""The recipes for large backbones where there is little memory: as deep, but narrow, on crops of four
patches, in steps of 32 images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from tests.engine.training import outcome, rewound
from tests.ranks import RankPool
from vitds.config.deepspeed import load_ds_config
from vitds.engine import resolve
from vitds.jobs.train import pretrain
from vitds.runs.metrics import read_metrics

CROP_PX = {"idmm_vit_large": 32, "idmm_vit_huge": 28, "idmm_vit_giant": 28}
RECIPES = tuple(CROP_PX)
REAL_WIDTH = {"idmm_vit_large": 1024, "idmm_vit_huge": 1280, "idmm_vit_giant": 1408}
CONFIGS = ("large_1gpu", "large_8gpu", "large_64gpu")
WIDTH = 32
# Four chunks: two ranks with two micro batches each. 52 images are two steps, the last with 20 real images.
SMALL = {
    "backbone.options": f"{{embed_dim: {WIDTH}, num_heads: 4}}",
    "batch.global_images": 32,
    "batch.micro_images": 8,
}
SMALL |= {
    "batch.chunk_images": 8,
    "log.tensorboard": "false",
    "log.page": "false",
    "eval.knn_k": "[5]",
    "checkpoint.every_steps": 1,
}
# DeepSpeed 0.19.8's own sizes, in numbers, where a file has none.
SIZES = {
    "stage3_prefetch_bucket_size": 5e7,
    "stage3_param_persistence_threshold": 1e5,
    "stage3_max_live_parameters": 1e9,
}
SIZES |= {"sub_group_size": 1e9}


def few_steps(run: str, data: tuple[str, str], recipe: str, ds_config: str) -> str:
    """Two steps of a recipe in its own precision, which a CPU without native bf16 is slow at, and as exact;
    for a pool to call."""
    words = [f"{key}={value}" for key, value in (SMALL | {"views.crop_px": CROP_PX[recipe]}).items()]
    with mock.patch.object(resolve, "resolve_precision", lambda wanted, device, has_teacher: wanted):
        return str(
            pretrain(
                run=run, recipe=recipe, data=data[0], test=data[1], epochs=1, ds_config=ds_config, set=words
            ).path
        )


def shrunk(ds_config: str, recipe: str, folder: Path) -> str:
    """A DeepSpeed file with all sizes divided as the narrow model's weights are, so that buckets fill and
    weights come and go as often."""
    values: dict[str, Any] = dict(load_ds_config(ds_config).values)
    zero = (SIZES if values["zero_optimization"]["stage"] == 3 else {}) | values["zero_optimization"]
    smaller = {
        key: max(1, int(size * (WIDTH / REAL_WIDTH[recipe]) ** 2))
        for key, size in zero.items()
        if isinstance(size, int | float)
    }
    values["zero_optimization"] = zero | smaller | {"stage": zero["stage"]}
    file = folder / f"{ds_config}.json"
    file.write_text(json.dumps(values))
    return str(file)


def trained_and_resumed(
    pool: RankPool, folder: Path, data: tuple[str, str], recipe: str, ds_config: str
) -> list[float]:
    """The losses of a run on the pool's ranks; the same run, cut after the first step, has gone on to the
    same bytes."""
    folder.mkdir()
    pool.run(few_steps, str(folder / "whole"), data, recipe, ds_config)
    cut = rewound(folder / "whole", folder / "cut", 1)
    pool.run(few_steps, str(cut), data, recipe, ds_config)
    assert outcome(cut) == outcome(folder / "whole"), (
        f"{cut} ended with other bytes than {folder / 'whole'}: {recipe}, {ds_config}"
    )
    return losses_of(folder / "whole")


def losses_of(run: Path) -> list[float]:
    """The loss of each of the two steps."""
    losses = [line["loss"] for line in read_metrics(run / "metrics.jsonl")]
    assert len(losses) == 2 and np.isfinite(losses).all()
    return losses
