"""Settings that make the runs of an experiment small: a narrow network, no pages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from vitds.cli import main

# Of a pretraining and of a fine-tuning.
TINY = (
    *("backbone.options={patch_size: 4, embed_dim: 24, depth: 1, num_heads: 3, global_pool: avg}",),
    *("log.page=false", "log.tensorboard=false", "engine.compile=off", "eval.knn_k=[5, 20]"),
)


def flagged(flags: Mapping[str, str], settings: Sequence[str] = TINY) -> list[str]:
    """Words of a command line; the settings are those of both kinds of training."""
    words = [word for name, value in flags.items() for word in (f"--{name}", value)]
    return words + [
        word for flag in ("--set", "--finetune_set") for setting in settings for word in (flag, setting)
    ]


def refusal(words: Sequence[str], out: Path, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Status and line of a command that is refused before anything lies in its folder."""
    status = main(words)
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1 and not out.exists()
    return status, error
