"""Pictures in memory have the pixels of their files, also after they were decoded; else they are refused."""

from __future__ import annotations

import inspect
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.data.images import encode, photo
from tests.data.test_odd_images import CONVERTED
from tests.data.test_pixels import black_and_white_tiff
from vitds.data.images import LeftOut, Storing, store_image
from vitds.data.trees import SourceImage
from vitds.errors import DataError
from vitds.use.images import find_images

RAMP = np.linspace(0, 65535, 40 * 30).reshape(30, 40).astype(np.uint16)


def of_memory(picture: Image.Image, tmp_path: Path) -> np.ndarray | None:
    """(H, W, 3) pixels; None where the picture is refused."""
    try:
        (image,), _ = find_images([picture], tmp_path)
    except DataError:
        return None
    return image.pixels


def of_file(file: Path) -> np.ndarray | None:
    stored = store_image(SourceImage("x", "", None, str(file)), Storing("raw", None, 90))
    if isinstance(stored, LeftOut):
        return None
    return np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, 3)


def same(first: np.ndarray | None, second: np.ndarray | None) -> bool:
    return first is second if first is None or second is None else np.array_equal(first, second)


@pytest.mark.parametrize("is_decoded", [False, True], ids=["opened", "decoded"])
@pytest.mark.parametrize("name", CONVERTED)
def test_a_picture_in_memory_has_the_pixels_of_its_file(tmp_path: Path, name: str, is_decoded: bool) -> None:
    (tmp_path / name).write_bytes(CONVERTED[name][0])
    with Image.open(tmp_path / name) as picture:
        if is_decoded:
            picture.load()
        expected = of_file(tmp_path / name)
        assert expected is not None
        for _ in range(2):  # asked once more it is the same
            np.testing.assert_array_equal(of_memory(picture, tmp_path), expected)


@pytest.mark.parametrize("is_decoded", [False, True], ids=["opened", "decoded"])
def test_so_has_every_kind_of_tiff_that_pillow_knows(tmp_path: Path, is_decoded: bool) -> None:
    file = tmp_path / "x.tif"
    for key in TiffImagePlugin.OPEN_INFO:
        file.write_bytes(black_and_white_tiff(key, planar=1, deflated=False))
        with Image.open(file) as picture:
            if is_decoded:
                try:
                    picture.load()
                except OSError:
                    continue
            assert same(of_memory(picture, tmp_path), of_file(file)), key


@pytest.mark.parametrize("mode", ["La", "RGBa", "PA"])
def test_transparency_is_laid_on_white_in_every_mode_of_pillow(tmp_path: Path, mode: str) -> None:
    clear = Image.fromarray(np.dstack((photo(1)[..., :1].repeat(3, 2), np.zeros((30, 40), np.uint8))))
    between = {"La": ("LA", "La"), "RGBa": ("RGBa",), "PA": ("PA",)}[mode]
    for each in between:
        clear = clear.convert(each)
    assert clear.mode == mode and of_memory(clear, tmp_path).min() == 255


@pytest.mark.parametrize("order", ["<", ">"])
def test_deep_greys_in_memory_are_scaled_in_both_orders_of_bytes(tmp_path: Path, order: str) -> None:
    mode = "I;16" if order == "<" else "I;16B"
    picture = Image.frombytes(mode, (40, 30), RAMP.astype(f"{order}u2").tobytes())
    assert np.abs(of_memory(picture, tmp_path)[..., 0] - RAMP / 257).max() <= 0.51


def test_the_depth_of_a_jpeg_2000_is_read_before_it_is_decoded(tmp_path: Path) -> None:
    file = tmp_path / "x.jp2"
    file.write_bytes(encode(Image.fromarray(photo(3)), "JPEG2000"))
    with Image.open(file) as picture:
        np.testing.assert_array_equal(of_memory(picture, tmp_path), of_file(file))


def test_types_that_no_checker_has_seen_are_refused_in_words(tmp_path: Path) -> None:
    """The suite checks types at every call, a user's program does not."""
    find = inspect.unwrap(find_images)
    for one in (tmp_path / "x.png", Image.fromarray(photo(1))):
        with pytest.raises(DataError, match=r"give the images as a list"):
            find(one, tmp_path)
    for one in (b"x.png", None):
        with pytest.raises(DataError, match=r"image 0 is of type (bytes|NoneType); give a path"):
            find([one], tmp_path)


def test_a_picture_without_pixels_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="image 0"):
        find_images([Image.new("RGB", (0, 4))], tmp_path)


def test_a_picture_that_is_cut_is_refused_with_the_decoders_words(tmp_path: Path) -> None:
    for format in ("PNG", "TIFF", "GIF"):
        cut = encode(Image.fromarray(photo(1)), format)[:-900]
        with pytest.raises(DataError, match="image 0: "):
            find_images([Image.open(io.BytesIO(cut))], tmp_path)
