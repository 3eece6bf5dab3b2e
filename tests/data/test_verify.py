"""Reading a .beton back finds what changed since it was built."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.data.images import class_folders
from vitds.data.beton import SAMPLE, SAMPLES_START, open_beton
from vitds.data.build import build_beton
from vitds.data.verify import verify_beton
from vitds.errors import DataError


@pytest.fixture(params=["jpg", "raw"])
def built(request, tmp_path) -> Path:
    """Seven images of two classes, in each storage."""
    build_beton(
        [class_folders(tmp_path / "set", {"cat": 4, "dog": 3})], tmp_path / "x.beton", storage=request.param
    )
    return tmp_path / "x.beton"


def flip_byte(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x55
    path.write_bytes(data)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_file_as_it_was_built_is_sound(built, workers):
    verdict = verify_beton(built, workers=workers)
    assert verdict.is_sound and verdict.images == 7 and verdict.undecodable == {}
    assert verdict.content_hash == open_beton(built).manifest.content_hash


def test_a_changed_pixel_is_found(built):
    beton = open_beton(built)
    flip_byte(built, int(beton.offsets[3] + beton.sizes[3]) - 20)
    assert not verify_beton(built).is_sound


def test_a_changed_label_is_found(built):
    data = bytearray(built.read_bytes())
    np.frombuffer(data, SAMPLE, 7, SAMPLES_START)["label"][0] = 1
    built.write_bytes(data)
    verdict = verify_beton(built)
    assert not verdict.is_sound and verdict.undecodable == {}


@pytest.mark.parametrize("workers", [1, 2])
def test_samples_that_cannot_be_decoded_are_named_by_index(tmp_path, workers):
    build_beton([class_folders(tmp_path / "set", {"cat": 4, "dog": 3})], tmp_path / "x.beton", storage="jpg")
    beton = open_beton(tmp_path / "x.beton")
    for index in (1, 5):
        flip_byte(tmp_path / "x.beton", int(beton.offsets[index]))
    verdict = verify_beton(tmp_path / "x.beton", workers=workers)
    assert list(verdict.undecodable) == [1, 5]
    assert all(
        reason.endswith("the JPEG data are damaged or end early.") for reason in verdict.undecodable.values()
    )
    assert verdict.content_hash is None and not verdict.is_sound


def test_a_file_whose_tables_are_damaged_is_refused(built):
    built.write_bytes(built.read_bytes()[:-5])
    with pytest.raises(DataError, match=r"x\.beton: truncated"):
        verify_beton(built)
