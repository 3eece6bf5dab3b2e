"""Two small trained runs, and image files that neither has seen."""

from __future__ import annotations

from pathlib import Path

import pytest

from vitds.use.model import Model, open_model


@pytest.fixture(scope="session")
def used_runs(rank_pool, digit_files, tmp_path_factory) -> dict[str, str]:
    """A fine-tuned and a pretrained run of a small ViT on digits, by their methods' names."""
    folder = tmp_path_factory.mktemp("used")
    return {
        method: rank_pool(1).run(small_run_path, str(folder / method), digit_files, method=method, epochs=1)[
            0
        ]
        for method in ("supervised", "idmm")
    }


@pytest.fixture(scope="session")
def fine(used_runs) -> Model:
    return open_model(used_runs["supervised"])


@pytest.fixture(scope="session")
def photos(digit_files) -> Path:
    """The folder of the test images, a folder a class: the files that the test .beton was built from."""
    return Path(digit_files[1]).parent / "test"
