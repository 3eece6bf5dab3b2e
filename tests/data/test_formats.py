"""Content decides what is a picture; a photograph that cannot be decoded here is named as one, with what to
do.
"""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image

from tests.data.built import build, names, pixels_of
from tests.data.images import cmyk_jpeg, encode, jpeg, photo, png, write_tar
from vitds.data.findings import Findings
from vitds.data.formats import DECODED, HEAD_BYTES, format_of
from vitds.data.sources import scan_sources
from vitds.errors import DataError

HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAVZtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAAAAAAAAAAAAACJpbG9jAAAAAERAAAEAAQAAAAABegABAAAAAAAAAB8AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAABAABodmMxAAAAAA5waXRtAAAAAAABAAAA1mlwcnAAAAC3aXBjbwAAAHhodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADwNgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQArQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqSSmubgIaDAgAAAMAyAAAAwAIQGIAAQAHRAHBcrAiQAAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAABBwaXhpAAAAAAMICAgAAAAXaXBtYQAAAAAAAAABAAEEgQIDBAAAACdtZGF0AAAAGygBrwngIYU0pf//xRFSqzj/wdtTmFZv/+Pn/w=="
)
"""A photograph of 64 x 64 pixels, the left half black and the right one white."""


def container(*brands: bytes) -> bytes:
    box = b"ftyp" + brands[0] + bytes(4) + b"".join(brands[1:])
    return (len(box) + 4).to_bytes(4, "big") + box + bytes(100)


UNDECODED = {  # name -> file, what the message calls it
    "IMG_0001.CR2": (b"II*\0\x10\0\0\0CR\x02\0" + bytes(200), "CR2"),
    "IMG_0002.CR3": (container(b"crx ", b"isom"), "CR3"),
    "DSCF0001.RAF": (b"FUJIFILMCCD-RAW 0201" + bytes(200), "RAF"),
    "P1010001.ORF": (b"IIRO\x08\0\0\0" + bytes(200), "ORF"),
    "P1000001.RW2": (b"IIU\0\x18\0\0\0" + bytes(200), "RW2"),
    "new.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(200), "JPEG XL"),
    "scan.dcm": (bytes(128) + b"DICM" + bytes(200), "DICOM"),
    "layers.psd": (b"8BPS\0\1" + bytes(200), "Photoshop"),
    "bright.exr": (b"\x76\x2f\x31\x01" + bytes(200), "OpenEXR"),
}
PICTURES = {
    "JPEG": jpeg(1),
    "PNG": png(1),
    "GIF": encode(Image.fromarray(photo(1)).quantize(8), "GIF"),
    "BMP": encode(photo(1), "BMP"),
    "WEBP": encode(photo(1), "WEBP"),
    "TIFF": encode(photo(1), "TIFF"),
    "PPM": encode(photo(1), "PPM"),
    "JPEG2000": encode(photo(1), "JPEG2000"),
    "AVIF": encode(photo(1), "AVIF"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_is_known_by_its_first_bytes(name):
    assert format_of(PICTURES[name][:HEAD_BYTES]) == name


@pytest.mark.parametrize(
    ("brands", "name"),
    [
        ((b"heic", b"mif1", b"heic"), "HEIF"),
        ((b"mif1", b"heic", b"miaf"), "HEIF"),
        ((b"mif1", b"avif"), "AVIF"),
        ((b"avif", b"mif1"), "AVIF"),
        ((b"msf1", b"hevc"), "HEIF"),
        ((b"isom", b"mp42"), None),
        ((b"qt  ",), None),
    ],
)
def test_photographs_and_videos_in_one_container_are_told_apart_by_their_brands(brands, name):
    assert format_of(container(*brands)[:HEAD_BYTES]) == name


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"hello",
        b"BM is how this text begins, with no picture in it at all",
        b"P5ycho",
        b"GIFs are fun",
        b"PK\3\4",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",
        b"%PDF-1.7",
        b"<svg>",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"%!PS-Adobe-3.0 EPSF-3.0",
    ],
)
def test_other_files_are_no_pictures(head):
    assert format_of(head) is None


@pytest.mark.parametrize(
    "name", ["photo", "photo.HEIC", "photo.png", "photo.dat", "photo.jpg.bak", "photo.CR2"]
)
@pytest.mark.parametrize("packed", [False, True])
def test_a_jpeg_of_any_name_is_a_picture(tmp_path, name, packed):
    beton = build(tmp_path, {f"a/{name}": jpeg(1), "b/2.jpg": jpeg(2)}, storage="jpg")
    assert beton.images == 2 and beton.manifest.findings == {}
    if packed:
        images = scan_sources([write_tar(tmp_path / "x.tar", {f"a/{name}": jpeg(1)})], Findings(), tmp_path)
        assert [image.member for image in images.images] == [f"a/{name}"]


@pytest.mark.parametrize("name", UNDECODED)
def test_a_photograph_that_cannot_be_decoded_is_named_with_what_to_do(tmp_path, name):
    data, format_name = UNDECODED[name]
    files = {
        f"a/{name}": data,
        "a/1.jpg": jpeg(1),
        "a/Thumbs.db": b"\xd0\xcf\x11\xe0",
        "a/list.docx": b"PK\3\4",
    }
    beton = build(tmp_path, files)
    assert beton.images == 1
    assert names(beton)["no_decoder"] == [f"a/{name} ({format_name}: convert it to TIFF, PNG or JPEG first)"]
    assert names(beton)["other_file"] == ["a/Thumbs.db", "a/list.docx"]
    with pytest.raises(DataError, match=r"`strict`: 1 x left out: a picture in a format that cannot be read"):
        build(tmp_path, files, strict=True)


def test_heic_photographs_are_named_with_the_package_that_reads_them(tmp_path, monkeypatch):
    monkeypatch.setattr("vitds.data.images.DECODED", DECODED - {"HEIF"})  # as without that package
    files = {"a/1.jpg": jpeg(1), **{f"a/IMG_{i}.HEIC": HEIC for i in range(26)}, "a/named.jpg": HEIC}
    beton = build(tmp_path, files)
    assert beton.manifest.findings["no_decoder"].count == 27
    assert "(HEIC: `pip install pillow-heif`, then build again)" in names(beton)["no_decoder"][0]
    with pytest.raises(DataError, match=r"none of the 1 images can be used.*HEIC: `pip install pillow-heif`"):
        build(tmp_path / "only", {"a/1.heic": HEIC})


def test_heic_photographs_are_read_where_pillow_heif_is_installed(tmp_path):
    beton = build(tmp_path, {"a/1.HEIC": HEIC}, storage="raw")
    assert beton.manifest.findings == {}
    assert np.abs(pixels_of(beton, 0)[32, [0, -1]].astype(int).T - [0, 255]).max() <= 2


def test_a_known_picture_that_cannot_be_opened_is_left_out_in_its_decoders_words(tmp_path):
    twelve_bits = jpeg(1).replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c")
    beton = build(tmp_path, {"a/1.jpg": twelve_bits, "a/2.jpg": cmyk_jpeg(2)})
    assert names(beton)["damaged"] == ["a/1.jpg (JPEG: cannot handle 12-bit layers)"]
