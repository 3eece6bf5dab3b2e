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


def features_of_ranks(path: str) -> list[int]:
    return features(Path(path), "skip").index_M.tolist()


def test_ranks_without_an_image_get_what_the_others_made(rank_pool, tmp_path: Path, damaged: Path) -> None:
    for images, path in ((2, tmp_path / "two.beton"), (3, damaged)):  # of four the second is damaged
        if images == 2:
            build_beton([class_folders(tmp_path / "two", {"a": 1, "b": 1})], path, storage="jpg")
        found = rank_pool(3).run(features_of_ranks, str(path))
        assert found == [[0, 1] if images == 2 else [0, 2, 3]] * 3


def test_a_file_without_a_usable_image_is_said(tmp_path: Path) -> None:
    path = tmp_path / "photos.beton"
    build_beton([class_folders(tmp_path / "photos", {"a": 1, "b": 1})], path, storage="jpg")
    file = open_beton(path)
    with path.open("r+b") as bytes_of_it:
        for offset, size in zip(file.offsets.tolist(), file.sizes.tolist(), strict=True):
            bytes_of_it.seek(offset + 2)
            bytes_of_it.write(bytes(size - 2))
    with pytest.raises(DataError, match=r"photos\.beton: none of its 2 images can be used"):
        features(path, "skip")
