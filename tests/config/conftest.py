"""A small recipe file for the tests of settings."""

from pathlib import Path

import pytest

RECIPE = """\
method: idmm
epochs: 7
data: {train: own.beton, test: own-test.beton}
views:
  crop_px: 48
  groups:
  - {name: global, views: 2, scale: [0.14, 1.0]}
backbone:
  options: {depth: 6, num_heads: 3}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """Its path."""
    (tmp_path / "r.yaml").write_text(RECIPE)
    return str(tmp_path / "r.yaml")
