"""`vitds bench step`: what it sets a step beside."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vitds.bench.step import bare_steps
from vitds.config.load import load_settings
from vitds.data.beton import open_beton

SMALL = {"backbone.options": "{patch_size: 6, embed_dim: 24, depth: 1, num_heads: 3}"}


@pytest.mark.parametrize("recipe", ["idmm_digits", "dino_digits", "lejepa_digits"])
def test_a_bare_loop_takes_the_batch_that_the_method_makes(digit_files, recipe: str) -> None:
    words = [f"{key}={value}" for key, value in SMALL.items()]
    words += ["batch.global_images=24", "batch.chunk_images=12", "batch.micro_images=24", "data.workers=1"]
    settings = load_settings(recipe=recipe, command="pretrain", assignments=words, flags={})
    file = open_beton(Path(digit_files[0]))
    bare_s, with_optimizer_s = bare_steps(settings, file, 2, 1, torch.device("cpu"))
    assert len(bare_s) == len(with_optimizer_s) == 2
    assert all(bare < whole for bare, whole in zip(bare_s, with_optimizer_s, strict=True))
