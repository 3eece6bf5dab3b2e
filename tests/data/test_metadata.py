"""Only pixels decide whether a picture can be used: metadata that cannot be read are ignored, and named."""

from __future__ import annotations

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from tests.data.built import build, names, pixels_of
from tests.data.encoders import png_chunk, tiff
from tests.data.images import encode, jpeg, photo, png, rotated_jpeg
from vitds.errors import DataError


def segment(marker: int, body: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(body) + 2) + body


def jpeg_with(*segments: bytes) -> bytes:
    return jpeg(1)[:2] + b"".join(segments) + jpeg(1)[2:]


def png_with(chunk: bytes, place: str = "before") -> bytes:
    """The chunk stands before the pixels, or at the file's end."""
    at = 33 if place == "before" else len(png(1)) - 12
    return png(1)[:at] + chunk + png(1)[at:]


def exif(orientation: int) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010F] = "camera"
    return tags.tobytes()


MALFORMED_EXIF = {
    "no header": b"Exif\0\0garbage!",
    "nothing": b"Exif\0\0",
    "cut": exif(6)[:-9],
    "a directory outside": b"Exif\0\0II*\0\xff\xff\xff\x7f",
    "a thousand entries": b"Exif\0\0II*\0\x08\0\0\0\xe8\x03\x12\x01",
    "a resolution of nothing": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x1a\0\x05\0\0\0\x01\xff\xff\xff\xf0",
}
MALFORMED_SEGMENTS = {
    "JFIF, cut": segment(0xE0, b"JFIF"),
    "multi-picture index, cut": segment(0xE2, b"MPF\0II*\0\x08\0\0\0\x03\0"),
    "multi-picture index without pictures": segment(
        0xE2, b"MPF\0MM\0*\0\0\0\x08\0\x01\xb0\x01\0\x04\0\0\0\x01\0\0\0\x02\0\0\0\0"
    ),
    "Photoshop's resources, cut": segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04"),
    "Adobe's mark, cut": segment(0xEE, b"Adobe\0"),
}
BOMB = zlib.compress(bytes(1 << 26))
MALFORMED_CHUNKS = {
    "text, false checksum": png_chunk(b"tEXt", b"Title\0x", 1),
    "time, false checksum": png_chunk(b"tIME", bytes(7), 1),
    "compressed text, not compressed": png_chunk(b"zTXt", b"k\0\0not compressed"),
    "compressed text, a bomb": png_chunk(b"zTXt", b"k\0\0" + BOMB),
    "international text, a bomb": png_chunk(b"iTXt", b"k\0\1\0\0\0" + BOMB),
    "text without a key": png_chunk(b"iTXt", b"\xff\xff\xff"),
    "profile, a bomb": png_chunk(b"iCCP", b"k\0\0" + BOMB),
    "profile, unknown compression": png_chunk(b"iCCP", b"k\0\7xx"),
    "EXIF": png_chunk(b"eXIf", b"garbage!"),
    "EXIF as text": png_chunk(b"tEXt", b"Raw profile type exif\0\nexif\n4\nzzzz"),
    "resolution, cut": png_chunk(b"pHYs", b"\0\0"),
    "chromaticity, cut": png_chunk(b"cHRM", b"\0"),
    "gamma, cut": png_chunk(b"gAMA", b""),
    "animation, cut": png_chunk(b"acTL", b"\0\0\0\2"),
    "frame, outside": png_chunk(b"fcTL", struct.pack(">IIIII", 0, 999, 999, 0, 0) + bytes(6)),
}


@pytest.mark.parametrize("case", MALFORMED_EXIF)
@pytest.mark.parametrize("storage", ["raw", "jpg"])
def test_a_jpeg_with_malformed_exif_keeps_its_pixels(tmp_path, case, storage):
    plain = build(tmp_path / "plain", {"a/1.jpg": jpeg(1)}, storage=storage)
    beton = build(tmp_path, {"a/1.jpg": jpeg_with(segment(0xE1, MALFORMED_EXIF[case]))}, storage=storage)
    assert np.array_equal(pixels_of(beton, 0), pixels_of(plain, 0))
    assert names(beton) == ({} if case == "nothing" else {"metadata": ["a/1.jpg"]})


@pytest.mark.parametrize("case", MALFORMED_SEGMENTS)
def test_a_jpeg_with_any_malformed_segment_keeps_its_pixels(tmp_path, case):
    plain = build(tmp_path / "plain", {"a/1.jpg": jpeg(1)}, storage="raw")
    beton = build(tmp_path, {"a/1.jpg": jpeg_with(MALFORMED_SEGMENTS[case])}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), pixels_of(plain, 0))
    assert names(beton) == {"metadata": ["a/1.jpg"]}


@pytest.mark.parametrize("place", ["before", "behind"])
@pytest.mark.parametrize("case", MALFORMED_CHUNKS)
def test_a_png_with_a_malformed_side_chunk_keeps_its_pixels(tmp_path, case, place):
    beton = build(tmp_path, {"a/1.png": png_with(MALFORMED_CHUNKS[case], place)}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), photo(1))
    assert names(beton).get("metadata", ["a/1.png"]) == ["a/1.png"] and set(names(beton)) <= {"metadata"}
    if "checksum" in case or "bomb" in case:  # the others Pillow passes over in some places
        assert "metadata" in names(beton)


def test_a_jpeg_that_is_turned_stays_so_where_other_metadata_are_broken(tmp_path):
    upright = pixels_of(build(tmp_path / "plain", {"a/1.jpg": rotated_jpeg(1, 6)}, storage="raw"), 0)
    data = rotated_jpeg(1, 6)
    for case, broken in MALFORMED_SEGMENTS.items():
        beton = build(tmp_path / case, {"a/1.jpg": data[:2] + broken + data[2:]}, storage="raw")
        assert np.array_equal(pixels_of(beton, 0), upright)
        assert set(names(beton)) == {"rotated", "metadata"}


def test_a_png_that_is_turned_stays_so_where_its_text_is_broken(tmp_path):
    chunks = png_chunk(b"eXIf", exif(8)[6:]) + MALFORMED_CHUNKS["compressed text, a bomb"]
    beton = build(tmp_path, {"a/1.png": png_with(chunks)}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), np.rot90(photo(1)))
    assert set(names(beton)) == {"rotated", "metadata"}


@pytest.mark.parametrize("place", ["before", "behind"])
def test_a_png_is_turned_wherever_its_exif_data_stand(tmp_path, place):
    chunk = png_chunk(b"eXIf", exif(8)[6:])
    beton = build(tmp_path, {"a/1.png": png_with(chunk, place)}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), np.rot90(photo(1))) and set(names(beton)) == {"rotated"}


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_means_nothing_is_upright(tmp_path, orientation):
    beton = build(tmp_path, {"a/1.png": png_with(png_chunk(b"eXIf", exif(orientation)[6:]))}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), photo(1)) and names(beton) == {}


def test_a_transparent_colour_with_a_false_checksum_is_ignored(tmp_path):
    colour = b"".join(struct.pack(">H", level) for level in photo(1)[0, 0].tolist())
    beton = build(tmp_path, {"a/1.png": png_with(png_chunk(b"tRNS", colour, 1))}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), photo(1)) and names(beton) == {"metadata": ["a/1.png"]}


@pytest.mark.parametrize("name", [b"IHDR", b"IDAT", b"IEND"])
def test_a_png_whose_own_chunks_are_damaged_is_no_matter_of_metadata(tmp_path, name):
    data = bytearray(png(1))
    at = data.index(name)
    data[at + 5 if name == b"IHDR" else at + 30 : at + 33] = b"\xff" * 3
    beton = build(tmp_path, {"a/1.png": bytes(data), "a/2.png": png(2)}, storage="raw")
    assert "metadata" not in names(beton)


def test_a_webp_with_malformed_exif_keeps_its_pixels(tmp_path):
    good = encode(photo(1), "WEBP", lossless=True, exif=exif(1))
    at = good.index(b"EXIF") + 8
    for bad in (good[:at] + b"garbage!" + good[at + 8 :], good + b"XMP \xff\xff\xff\x7f<x"):
        beton = build(tmp_path, {"a/1.webp": bad}, storage="raw")
        assert np.array_equal(pixels_of(beton, 0), photo(1))
    assert set(names(beton)) <= {"metadata"}


def test_an_avif_with_malformed_exif_keeps_its_pixels(tmp_path):
    good = encode(photo(1), "AVIF", quality=100, exif=exif(1))
    at = good.index(b"II*\0" if b"II*\0" in good else b"MM\0*")
    beton = build(tmp_path, {"a/1.avif": good[:at] + b"XXXX" + good[at + 4 :]}, storage="raw")
    assert np.abs(pixels_of(beton, 0).astype(int) - photo(1)).mean() < 6
    assert names(beton) == {"metadata": ["a/1.avif"]}


TIFF_TAGS = {
    "XMP of another type": {700: ("H", [1, 2, 3])},
    "an EXIF directory outside": {34665: ("I", [1 << 30])},
    "a profile outside": {34675: ("I", [7])},
    "a resolution unit that does not exist": {296: ("H", [999])},
    "resources": {34377: ("B", b"8BIM")},
}


@pytest.mark.parametrize("case", TIFF_TAGS)
def test_a_tiff_with_malformed_tags_beside_its_pixels_keeps_them(tmp_path, case):
    beton = build(tmp_path, {"a/1.tif": tiff(photo(1), photometric=2, tags=TIFF_TAGS[case])}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), photo(1))
    assert set(names(beton)) <= {"metadata"}


def test_a_turned_tiff_is_turned_once(tmp_path):
    for orientation, turn in ((6, lambda p: np.rot90(p, -1)), (3, lambda p: p[::-1, ::-1])):
        for extra in ({}, {700: ("H", [1, 2, 3])}):
            file = tiff(photo(1), photometric=2, tags={274: ("H", [orientation]), **extra})
            beton = build(tmp_path, {"a/1.tif": file}, storage="raw")
            assert np.array_equal(pixels_of(beton, 0), turn(photo(1)))
            assert "rotated" in names(beton)


def test_frames_after_the_first_cannot_spoil_it(tmp_path):
    frames = [Image.fromarray(photo(seed)).quantize(64) for seed in (1, 2)]
    file = io.BytesIO()
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    whole = file.getvalue()
    single = build(tmp_path / "one", {"a/1.gif": encode(frames[0], "GIF")}, storage="raw")
    beton = build(tmp_path, {"a/1.gif": whole[: len(whole) - 300]}, storage="raw")
    assert np.array_equal(pixels_of(beton, 0), pixels_of(single, 0))


def test_random_metadata_never_cost_a_picture(tmp_path):
    draw = random.Random(0)
    files = {}
    for i in range(60):
        junk = draw.randbytes(draw.randrange(60))
        starts = (
            b"Exif\0\0II*\0\x08\0\0\0",
            b"MPF\0MM\0*\0\0\0\x08",
            b"Photoshop 3.0\x008BIM",
            b"ICC_PROFILE\0",
            b"JFIF",
        )
        files[f"a/{i}.jpg"] = jpeg_with(
            segment(draw.choice((0xE0, 0xE1, 0xE2, 0xED)), draw.choice(starts) + junk)
        )
        name = draw.choice((b"tEXt", b"zTXt", b"iTXt", b"eXIf", b"iCCP", b"pHYs", b"acTL", b"fcTL", b"sBIT"))
        files[f"b/{i}.png"] = png_with(
            png_chunk(name, junk, draw.randrange(2)), draw.choice(("before", "behind"))
        )
    beton = build(tmp_path, files, storage="raw")
    assert beton.images == len(files)
    assert set(names(beton)) <= {"metadata", "duplicate", "rotated", "animated"}


def test_strict_refuses_metadata_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"1 x metadata that cannot be read .*first: .*1\.jpg"):
        build(tmp_path, {"a/1.jpg": jpeg_with(segment(0xE1, MALFORMED_EXIF["no header"]))}, strict=True)
