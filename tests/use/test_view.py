"""A file's view is that of evaluation, to the bit, whatever kind of image it is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import TiffImagePlugin

from tests.data.encoders import png_of, tiff
from tests.data.images import encode, jpeg, photo, png, rotated_jpeg, write_folder
from tests.data.test_formats import PICTURES, UNDECODED
from tests.data.test_metadata import (
    MALFORMED_CHUNKS,
    MALFORMED_EXIF,
    MALFORMED_SEGMENTS,
    TIFF_TAGS,
    jpeg_with,
    png_with,
    segment,
)
from tests.data.test_odd_images import CONVERTED, LEFT_OUT, TURNS, damaged_jpeg
from tests.data.test_pixels import BMPS, PNG_KINDS, RAW_FILES, black_and_white_tiff, halves, portable
from vitds.config.tree import Views
from vitds.data.beton import BetonFile, open_beton
from vitds.data.build import build_beton
from vitds.data.images import LeftOut, Storing
from vitds.data.loader import eval_batches
from vitds.data.trees import SourceImage
from vitds.use.images import find_images
from vitds.use.view import view_of, whole_picture

SIDE = 16


def odd_images() -> Iterator[bytes]:
    """The odd images of the tests of data, each as a file."""
    yield from (data for data, *_ in CONVERTED.values())
    yield from (data for data, *_ in LEFT_OUT.values())
    yield from (data for data, *_ in UNDECODED.values())
    yield from PICTURES.values()
    yield from BMPS.values()
    yield from (rotated_jpeg(1, orientation) for orientation in TURNS)
    yield damaged_jpeg(1)
    yield from (jpeg_with(segment(0xE1, exif)) for exif in MALFORMED_EXIF.values())
    yield from map(jpeg_with, MALFORMED_SEGMENTS.values())
    yield from (
        png_with(chunk, place) for chunk in MALFORMED_CHUNKS.values() for place in ("before", "after")
    )
    yield from (tiff(photo(1), photometric=2, tags=tags) for tags in TIFF_TAGS.values())
    yield from (tiff(halves(0, 255, 3), photometric=2, tags=tags) for tags in RAW_FILES.values())
    yield from (black_and_white_tiff(key, 1, False) for key in TiffImagePlugin.OPEN_INFO)
    yield from (
        png_of(halves(0, 2**bits - 1, {0: 1, 2: 3, 4: 2, 6: 4}[kind]), bits, kind) for bits, kind in PNG_KINDS
    )
    yield from (portable("P6", maxval, 3) for maxval in (1, 100, 255, 1023, 65535))
    yield jpeg(3, 500, 20)
    yield png(4, 7, 900)
    yield jpeg(5, 200, 150, subsampling=2, progressive=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = {f"a/{number:04d}.jpg": data for number, data in enumerate(odd_images())}
    assert len(files) > 150
    return write_folder(tmp_path_factory.mktemp("odd"), files)


def views_of_beton(file: BetonFile) -> np.ndarray:
    """(N, 3, S, S), as evaluation reads them."""
    return np.concatenate(
        [batch.crops.numpy().copy() for batch in eval_batches(file, Views(crop_px=SIDE), batch_images=7)]
    )


@pytest.mark.parametrize(
    "storing",
    [Storing("raw", None, 90), Storing("jpg", None, 90), Storing("raw", 20, 90), Storing("jpg", 20, 70)],
    ids=str,
)
def test_the_view_of_every_odd_file_is_that_of_the_beton_to_the_bit(
    folder: Path, tmp_path: Path, storing: Storing
) -> None:
    options = {"storage": storing.storage, "side_px": storing.side_px}
    if storing.storage == "jpg":
        options["quality"] = storing.quality
    build_beton([folder], tmp_path / "odd.beton", workers=1, **options)
    beton = open_beton(tmp_path / "odd.beton")
    expected = views_of_beton(beton)
    images, _ = find_images([folder], tmp_path)
    found = [view_of(image, storing, SIDE) for image in images]
    usable = [view for view in found if not isinstance(view, LeftOut)]
    assert len(usable) == beton.images > 120 and len(usable) < len(found)
    assert np.array_equal(np.stack(usable), expected)
    left_out = {image.name for image, view in zip(images, found, strict=True) if isinstance(view, LeftOut)}
    named = {name for finding in beton.manifest.findings.values() for name in finding.names}
    assert all(any(one.startswith(f"{name} (") for one in named) for name in left_out)


def test_the_images_of_a_beton_have_its_own_views(folder: Path, tmp_path: Path) -> None:
    for storage in ("raw", "jpg"):
        build_beton([folder], tmp_path / f"{storage}.beton", workers=1, storage=storage)
        images, _ = find_images([tmp_path / f"{storage}.beton"], tmp_path)
        found = np.stack([view_of(image, Storing("jpg", 8, 10), SIDE) for image in images])
        assert np.array_equal(found, views_of_beton(open_beton(tmp_path / f"{storage}.beton")))


def test_a_beton_that_is_damaged_or_gone_gives_the_reason(tmp_path: Path) -> None:
    build_beton([write_folder(tmp_path / "set", {"a/1.jpg": jpeg(1)})], tmp_path / "x.beton", storage="jpg")
    (image,), _ = find_images([tmp_path / "x.beton"], tmp_path)
    content = bytearray((tmp_path / "x.beton").read_bytes())
    content[image.offset : image.offset + 4] = bytes(4)
    (tmp_path / "x.beton").write_bytes(content)
    assert view_of(image, Storing("raw", None, 90), SIDE).kind == "damaged"
    assert whole_picture(image, Storing("raw", None, 90)).kind == "damaged"
    (tmp_path / "x.beton").unlink()
    assert view_of(image, Storing("raw", None, 90), SIDE) == LeftOut(
        "unreadable", "No such file or directory"
    )


def test_an_array_is_seen_as_the_file_of_the_same_pixels(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(photo(2), "PNG"))
    storing = Storing("jpg", 24, 80)
    in_memory = view_of(SourceImage("x", "", None, pixels=photo(2)), storing, SIDE)
    assert np.array_equal(
        in_memory, view_of(SourceImage("x", "", None, str(tmp_path / "x.png")), storing, SIDE)
    )


def test_the_whole_picture_is_what_is_stored(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encode(photo(2), "PNG"))
    image = SourceImage("x", "", None, str(tmp_path / "x.png"))
    assert np.array_equal(whole_picture(image, Storing("raw", None, 90)), photo(2))
    assert whole_picture(image, Storing("raw", 15, 90)).shape == (15, 20, 3)
    assert (
        whole_picture(SourceImage("y", "", None, str(tmp_path / "y.png")), Storing("raw", None, 90)).kind
        == "unreadable"
    )
