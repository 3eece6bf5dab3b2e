"""Who may read the files of a run: whoever the umask lets."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from vitds.runs.backbone import save_class_head, save_weights
from vitds.runs.checkpoint import write_checkpoint
from vitds.runs.directory import write_json


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_checkpoints_and_weights_obey_the_umask(umask: int, tmp_path: Path) -> None:
    weights = {"weight": torch.ones(3, 2)}
    write_checkpoint(tmp_path / "checkpoints", 1, {"model": weights, "head": weights}, {}, keep=1)
    save_weights(tmp_path / "backbone.safetensors", weights)
    save_class_head(tmp_path, weights, ("cat", "dog"))
    write_json(tmp_path / "summary.json", {})
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 6
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in files} == {
        path.name: oct(0o666 & ~umask) for path in files
    }
