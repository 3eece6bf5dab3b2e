"""Features of a .beton file's images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.data.images import class_folders
from vitds.config.load import load_settings
from vitds.data.beton import open_beton
from vitds.data.build import build_beton
from vitds.errors import DataError
from vitds.evaluate.features import Features
from vitds.evaluate.files import file_features
from vitds.models.build import build_backbone

SMALL = ("views.crop_px=32", "backbone.options={layers: [1, 1, 1, 1], channels: [8, 8, 8, 8]}")


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Four images; the bytes of the second one are lost."""
    path = tmp_path / "photos.beton"
    build_beton([class_folders(tmp_path / "photos", {"a": 2, "b": 2})], path, storage="jpg")
    file = open_beton(path)
    with path.open("r+b") as bytes_of_it:
        bytes_of_it.seek(int(file.offsets[1]) + 2)
        bytes_of_it.write(bytes(int(file.sizes[1]) - 2))
    return path


def features(path: Path, damaged: str) -> Features:
    words = [*SMALL, f"data.damaged={damaged}"]
    settings = load_settings(recipe="photos_cpu", command="pretrain", assignments=words, flags={})
    backbone = build_backbone(settings.backbone, crop_px=32, seed=0)
    return file_features(settings, backbone, open_beton(path), torch.device("cpu"))


def test_images_that_cannot_be_decoded_are_left_out_where_training_leaves_them_out(damaged: Path) -> None:
    assert features(damaged, "skip").index_M.tolist() == [0, 2, 3]


def test_they_are_fatal_where_they_are_in_training(damaged: Path) -> None:
    with pytest.raises(DataError, match="image 1 .*damaged"):
        features(damaged, "fatal")
