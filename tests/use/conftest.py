"""Two small trained runs, and image files that neither has seen."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.use.trained import trained
from vitds.use.model import Model, open_model


@pytest.fixture(scope="session")
def given_back(rank_pool, digit_files, tmp_path_factory) -> dict[str, tuple[str, np.ndarray]]:
    """A fine-tuned and a pretrained run of a small ViT on digits, by method: its path, and its features."""
    folder = tmp_path_factory.mktemp("used")
    return {
        method: rank_pool(1).run(trained, str(folder / method), digit_files, method)[0]
        for method in ("supervised", "idmm")
    }


@pytest.fixture(scope="session")
def used_runs(given_back) -> dict[str, str]:
    """Their paths."""
    return {method: path for method, (path, _) in given_back.items()}


@pytest.fixture(scope="session")
def fine(used_runs) -> Model:
    return open_model(used_runs["supervised"])


@pytest.fixture(scope="session")
def photos(digit_files) -> Path:
    """The folder of the test images, a folder a class: the files that the test .beton was built from."""
    return Path(digit_files[1]).parent / "test"
