"""JPEG: PIL's pixels, and damage named by sample, never silently grey."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from tests.kernels.pictures import photograph_parts, photographs, whole_spec
from vitds.errors import DataError
from vitds.kernels.views import JPEG, RAW, cut_views, decode, error_text

SIDE = 32


def jpeg(picture: np.ndarray, **options: object) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "JPEG", **options)
    return file.getvalue()


def cmyk_jpeg(picture: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture).convert("CMYK").save(file, "JPEG")
    return file.getvalue()


@pytest.mark.parametrize(
    "options",
    [{"quality": 80}, {"quality": 95, "subsampling": 0}, {"progressive": True}, {"restart_marker_rows": 1}],
)
def test_decoded_picture_is_pils(options: dict) -> None:
    for picture in photographs()[:4]:
        stored = jpeg(picture, **options)
        pil = np.asarray(Image.open(io.BytesIO(stored)))
        assert np.abs(decode(stored, JPEG, picture.shape[:2]).astype(int) - pil).max() <= 1


def test_views_of_a_jpeg_are_the_views_of_its_pixels() -> None:
    pictures = photographs()[:4]
    stored, sizes = [jpeg(picture) for picture in pictures], [picture.shape[:2] for picture in pictures]
    pixels = [decode(data, JPEG, size) for data, size in zip(stored, sizes, strict=True)]
    specs = np.stack([np.repeat(whole_spec(*size, SIDE, blur_sigma=1.0), 2) for size in sizes])
    from_jpeg, _ = cut_views(stored, [JPEG] * len(stored), sizes, specs, SIDE)
    from_raw, _ = cut_views(pixels, [RAW] * len(pixels), sizes, specs, SIDE)
    assert np.array_equal(from_jpeg, from_raw)


def test_grey_jpeg_becomes_three_equal_channels() -> None:
    picture = photograph_parts(64)[0]
    file = io.BytesIO()
    Image.fromarray(picture).convert("L").save(file, "JPEG")
    pixels = decode(file.getvalue(), JPEG, (64, 64))
    assert np.array_equal(pixels, np.repeat(np.asarray(Image.open(file))[..., None], 3, -1))


PICTURE = photograph_parts(96)[1]
STORED = jpeg(PICTURE)
CASES = {
    "the JPEG data are damaged or end early": [
        STORED[: len(STORED) // 2], STORED[:-200], STORED[:20], STORED[:300], STORED[100:],
        STORED[:700] + STORED[900:-2], b"", b"\xff", b"no picture at all", bytes(1000),
    ],
    "size differs from the one that was recorded": [jpeg(PICTURE[:95]), jpeg(PICTURE[:, :90])],
    "no direct way to RGB (CMYK)": [cmyk_jpeg(PICTURE)],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "stored"), [(reason, stored) for reason, all_stored in CASES.items() for stored in all_stored]
)
def test_unusable_jpeg_is_named_and_the_next_one_decodes(reason: str, stored: bytes) -> None:
    with pytest.raises(DataError, match="a picture of 96 x 96 px in ") as caught:
        decode(stored, JPEG, (96, 96))
    assert reason in str(caught.value)
    assert (
        np.abs(decode(STORED, JPEG, (96, 96)).astype(int) - np.asarray(Image.open(io.BytesIO(STORED)))).max()
        <= 1
    )


def test_one_damaged_sample_does_not_stop_the_others() -> None:
    sources = [STORED, STORED[:40], STORED, PICTURE[:-1], STORED[:-300], np.ascontiguousarray(PICTURE)]
    storages = [JPEG, JPEG, JPEG, RAW, JPEG, RAW]
    specs = np.repeat(whole_spec(96, 96, SIDE)[None], 6, 0)
    views, status = cut_views(sources, storages, [(96, 96)] * 6, specs, SIDE)
    wanted = ["no error", "damaged", "no error", "a buffer does not have the length", "damaged", "no error"]
    assert all(text in error_text(code) for text, code in zip(wanted, status.tolist(), strict=True))
    sound, _ = cut_views([STORED], [JPEG], [(96, 96)], specs[:1], SIDE)
    assert np.array_equal(views[0], sound[0]) and np.array_equal(views[2], sound[0])
    assert np.array_equal(views[5], cut_views([PICTURE], [RAW], [(96, 96)], specs[:1], SIDE)[0][0])
