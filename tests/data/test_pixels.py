"""What a file's numbers mean is read from its description: black is 0 and white is 255, or the picture is
left out and named.

Pictures here are black on their left half and white on their right one, in whatever way their kind of file
says so.
"""

from __future__ import annotations

import base64
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, TiffImagePlugin

from tests.data.encoders import bmp, png_chunk, png_of, tiff
from tests.data.images import encode
from vitds.data.images import LeftOut, Stored, Storing, store_image
from vitds.data.trees import SourceImage

HEIGHT, WIDTH = 4, 16
BLACK_AND_WHITE = np.zeros((HEIGHT, WIDTH), np.uint8)
BLACK_AND_WHITE[:, WIDTH // 2 :] = 255


@pytest.fixture
def store(tmp_path: Path):
    """store(file) -> its sample as raw pixels (H, W, 3) with its findings, or how it was left out."""

    def store_it(data: bytes) -> tuple[np.ndarray, set[str]] | LeftOut:
        (tmp_path / "x").write_bytes(data)
        stored = store_image(SourceImage("x", "x", None, str(tmp_path / "x")), Storing("raw", None, 90))
        if not isinstance(stored, Stored):
            return stored
        return np.frombuffer(stored.data, np.uint8).reshape(stored.height, stored.width, 3), set(stored.kinds)

    return store_it


def halves(black: object, white: object, channels: int = 1) -> np.ndarray:
    """(HEIGHT, WIDTH, channels) samples."""
    samples = np.empty((HEIGHT, WIDTH, channels))
    samples[:, : WIDTH // 2], samples[:, WIDTH // 2 :] = black, white
    return samples


def is_black_and_white(pixels: np.ndarray, tolerance: int = 0) -> bool:
    expected = np.repeat(BLACK_AND_WHITE[..., None], 3, axis=2).astype(int)
    return pixels.shape == expected.shape and np.abs(pixels - expected).max() <= tolerance


# ------------------------------------------------------------------------------------------------------- TIFF


def black_and_white_tiff(key: tuple, planar: int, deflated: bool) -> bytes:
    """By a key of Pillow's table: byte order, photometric, sample format, fill order, bits, extra samples."""
    order, photometric, (sample_format, *_), fill, bits_of, extra = key
    bits, channels = bits_of[0], len(bits_of)
    colours = {2: 3, 5: 4, 6: 3, 8: 3}.get(photometric, 1)
    top = {1: 2**bits - 1, 2: 2 ** (bits - 1) - 1, 3: 1}[sample_format]
    low = -(2 ** (bits - 1)) if sample_format == 2 else 0
    samples = halves(low, top, channels)
    if photometric in (0, 5):  # white is 0; no ink is 0
        samples = top + low - samples
    tags = {}
    if photometric == 3:
        samples[:, WIDTH // 2 :, 0] = 1
        tags[320] = ("H", ([0] + [65535] * (2**bits - 1)) * 3)
    if photometric == 6:
        samples[..., 1:] = 128
        tags[530] = ("H", [1, 1])
    if photometric == 8:
        samples[..., 1:] = 0
    samples[..., colours:] = top  # opaque
    return tiff(
        samples,
        photometric=photometric,
        bits=bits,
        sample_format=sample_format,
        extra=extra,
        fill=fill,
        planar=planar,
        deflated=deflated,
        order="<" if order == b"II" else ">",
        tags=tags,
    )


def refusal_of(key: tuple, mode: str, planar: int) -> str | None:
    """The finding that a kind of TIFF is left out with, if it is."""
    _, photometric, (sample_format, *_), _, bits, extra = key
    if sample_format != 1 or bits[0] == 32:
        return "range_unknown"
    if planar == 2 and mode in ("LA", "La", "PA", "LAB"):
        return "no_decoder"
    if photometric == 6 and len(bits) == 1 or planar == 2 and len(extra) > 1 and max(extra) > 0:
        return "damaged"  # Pillow's table names it and libtiff does not read it
    return None


@pytest.mark.parametrize("key", TiffImagePlugin.OPEN_INFO, ids=str)
def test_every_kind_of_tiff_that_pillow_knows_is_read_by_its_tags(store, key):
    mode, _ = TiffImagePlugin.OPEN_INFO[key]
    for deflated in (False, True):
        for planar in (1, 2) if len(key[4]) > 1 else (1,):
            found, refusal = store(black_and_white_tiff(key, planar, deflated)), refusal_of(key, mode, planar)
            if refusal:
                assert found.kind == refusal
            else:
                pixels, kinds = found
                assert is_black_and_white(pixels, tolerance=1 if mode == "LAB" else 0), (planar, deflated)
                assert ("deep" in kinds) == (key[4][0] in (12, 16))


def test_levels_between_black_and_white_keep_their_place(store):
    for bits, photometric in ((12, 1), (16, 1), (16, 0)):
        top = 2**bits - 1
        levels = np.linspace(0, top, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round()
        pixels, _ = store(tiff(levels, photometric=photometric, bits=bits))
        expected = 255 * (levels if photometric else top - levels) / top
        assert np.abs(pixels[..., 0] - expected).max() <= 0.51


def test_a_signed_tiff_is_left_out_and_said_to_be_signed(store):
    levels = np.linspace(-1000, 1000, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH).round()
    for bits in (16, 32):
        found = store(tiff(levels, photometric=1, bits=bits, sample_format=2))
        assert found.kind == "range_unknown" and "signed" in found.reason


def test_premultiplied_alpha_is_laid_on_white(store):
    samples = np.stack(
        [halves(0, 50)[..., 0], halves(0, 100)[..., 0]], axis=2
    )  # 50 of 100 covered: half white
    pixels, kinds = store(tiff(samples, photometric=1, extra=(1,)))
    assert pixels[0, 0].tolist() == [255] * 3 and abs(int(pixels[0, -1, 0]) - 205) <= 1
    assert kinds == {"grey", "transparent"}


@pytest.mark.parametrize("subsampled", [(2, 2), (1, 1)])
def test_uncompressed_chroma_is_read_as_its_tag_says(store, subsampled):
    units = WIDTH // subsampled[0] * (HEIGHT // subsampled[1])
    luma = [0] * (subsampled[0] * subsampled[1])
    left, right = bytes([*luma, 128, 128]), bytes([*(255 for _ in luma), 128, 128])
    row = left * (WIDTH // subsampled[0] // 2) + right * (WIDTH // subsampled[0] // 2)
    data = row * (units // (WIDTH // subsampled[0]))
    whole = tiff(
        halves(0, 255, 3), photometric=6, tags={530: ("H", list(subsampled)), 279: ("I", [len(data)])}
    )
    pixels, _ = store(whole[:8] + data + whole[8 + len(data) :])
    assert is_black_and_white(pixels)


RAW_FILES = {
    "a preview before the raw picture": {254: ("I", [1])},
    "DNG": {254: ("I", [0]), 50706: ("B", [1, 4, 0, 0])},
}


@pytest.mark.parametrize("case", RAW_FILES)
def test_the_preview_in_a_cameras_raw_file_is_not_taken_for_the_photograph(store, case):
    found = store(tiff(halves(0, 255, 3), photometric=2, tags=RAW_FILES[case]))
    assert found.kind == "no_decoder" and "raw file" in found.reason and "convert it" in found.reason


# -------------------------------------------------------------------------------------------------------- PNG


PNG_KINDS = [(bits, 0) for bits in (1, 2, 4, 8, 16)] + [
    (bits, kind) for kind in (2, 4, 6) for bits in (8, 16)
]


@pytest.mark.parametrize(("bits", "colour_type"), PNG_KINDS)
def test_every_kind_of_png_has_its_ends_at_black_and_white(store, bits, colour_type):
    samples = halves(0, 2**bits - 1, {0: 1, 2: 3, 4: 2, 6: 4}[colour_type])
    if colour_type in (4, 6):
        samples[..., -1] = 2**bits - 1
    pixels, kinds = store(png_of(samples, bits, colour_type))
    assert is_black_and_white(pixels)
    expected = {"grey": colour_type in (0, 4), "deep": bits == 16, "transparent": colour_type in (4, 6)}
    assert kinds == {kind for kind, holds in expected.items() if holds}


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_every_depth_of_palette_is_read(store, bits):
    palette = png_chunk(b"PLTE", bytes([255, 255, 255, 0, 0, 0]))
    pixels, kinds = store(png_of(halves(1, 0), bits, 3, palette))
    assert is_black_and_white(pixels) and kinds == {"palette"}


@pytest.mark.parametrize(
    ("bits", "colour_type"), [(bits, 0) for bits in (1, 2, 4, 8, 16)] + [(8, 2), (16, 2)]
)
def test_the_transparent_colour_of_a_png_is_in_the_files_own_numbers(store, bits, colour_type):
    channels, key = (1, 1) if colour_type == 0 else (3, 1 if bits == 8 else 257)
    transparent = png_chunk(b"tRNS", key.to_bytes(2, "big") * channels)
    pixels, kinds = store(png_of(halves(0, key, channels), bits, colour_type, transparent))
    assert is_black_and_white(pixels) and "transparent" in kinds


@pytest.mark.parametrize("alphas", [bytes([0]), bytes([0, 128])])
def test_the_transparent_entries_of_a_palette_become_white(store, alphas):
    chunks = png_chunk(b"PLTE", bytes(6)), png_chunk(b"tRNS", alphas)
    pixels, kinds = store(png_of(halves(1, 0), 8, 3, *chunks))
    assert pixels[0, -1].tolist() == [255] * 3 and pixels[0, 0, 0] == (0 if len(alphas) == 1 else 127)
    assert kinds == {"palette", "transparent"}


# ------------------------------------------------------------------------------------------------------ JPEG,
# JPEG 2000


def without_adobe_mark(data: bytes) -> bytes:
    at = data.index(b"\xff\xee\x00\x0eAdobe")
    return data[:at] + data[at + 16 :]


def test_inks_of_a_cmyk_jpeg_are_inverted_where_adobes_mark_says_so(store):
    inks = Image.merge("CMYK", [Image.fromarray(255 - BLACK_AND_WHITE.repeat(8, 0))] * 4)
    data = encode(inks, "JPEG", quality=100)
    for file, expected in ((data, [0, 255]), (without_adobe_mark(data), [255, 0])):
        pixels, kinds = store(file)
        assert np.abs(pixels[0, [0, -1], 0].astype(int) - expected).max() <= 2 and kinds == {"cmyk"}


@pytest.mark.parametrize("mode", ["L", "RGB", "YCbCr"])
def test_black_and_white_survive_jpeg(store, mode):
    pixels, _ = store(
        encode(Image.fromarray(BLACK_AND_WHITE.repeat(8, 0)).convert(mode), "JPEG", quality=100)
    )
    assert pixels[0, 0].max() <= 1 and pixels[0, -1].min() >= 254


# Written by OpenJPEG: bits and channels that Pillow does not write.
JPEG_2000 = {
    "1-bit grey": (
        "/0//UQApAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAABAAEB/1IADAAAAAEAAAQEAAH/XAAEQAj/kAAKAAAAAAAW"
        "AAH/k9MAEVBTGP9//9k="
    ),
    "4-bit grey": (
        "/0//UQApAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAABAwEB/1IADAAAAAEAAAQEAAH/XAAEQCD/kAAKAAAAAAAj"
        "AAH/k98hIBFQUxj/Vpy6QABhH52aAABhH//Z"
    ),
    "4-bit colour": (
        "/0//UQAvAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAADAwEBAwEBAwEB/1IADAAAAAEBAAQEAAH/XAAEQCD/kAAK"
        "AAAAAAAlAAH/k98hIBFQUxj/Vpy6QABhH52aAABhH4CA/9k="
    ),
    "12-bit grey": (
        "/0//UQApAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAABCwEB/1IADAAAAAEAAAQEAAH/XAAEQGD/kAAKAAAAAABYAAH/k9/hHBFQUxj/Vpy6QABhH52aAABhHOP8fopwj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj/9k="
    ),
    "12-bit colour": (
        "/0//UQAvAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAADCwEBCwEBCwEB/1IADAAAAAEBAAQEAAH/XAAEQGD/kAAKAAAAAABaAAH/k9/hHBFQUxj/Vpy6QABhH52aAABhHOP8fopwj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpoj7lNEfcpojgID/2Q=="
    ),
    "signed": (
        "/0//UQApAAAAAAAQAAAABAAAAAAAAAAAAAAAEAAAAAQAAAAAAAAAAAABhwEB/1IADAAAAAEAAAQEAAH/XAAEQED/kAAKAAAAAAA9"
        "AAH/k9+BYBFQUxj/Vpy6QABhH52aAABhHOP8fopwj7lNEfcpoj7lNEfcpoj7lNEfcpoj/9k="
    ),
}
"""Base64 of code streams of 16 x 4 pixels, black and white."""


@pytest.mark.parametrize("kind", ["1-bit grey", "4-bit grey", "4-bit colour", "12-bit grey"])
def test_jpeg_2000_of_any_depth_has_its_ends_at_black_and_white(store, kind):
    pixels, kinds = store(base64.b64decode(JPEG_2000[kind]))
    assert is_black_and_white(pixels) and ("deep" in kinds) == kind.startswith("12")


def test_deep_colours_of_jpeg_2000_whose_white_pillow_turns_black_are_left_out(store):
    found = store(base64.b64decode(JPEG_2000["12-bit colour"]))
    assert found.kind == "no_decoder" and "colours of 12 bits" in found.reason


def test_signed_jpeg_2000_is_left_out(store):
    assert store(base64.b64decode(JPEG_2000["signed"])).kind == "range_unknown"


# --------------------------------------------------------------------------------------------------- BMP, PPM
# and others


def two_halves(black: bytes, white: bytes) -> bytes:
    return (black * (WIDTH // 2) + white * (WIDTH // 2)) * HEIGHT


GREYS = b"".join(bytes([level, level, level, 0]) for level in (0, 255))
BMPS = {
    "16 bits, 5 of green": bmp(two_halves(b"\0\0", b"\xff\x7f"), WIDTH, HEIGHT, 16),
    "16 bits, 6 of green": bmp(two_halves(b"\0\0", b"\xff\xff"), WIDTH, HEIGHT, 16, (0xF800, 0x7E0, 0x1F)),
    "24 bits": bmp(two_halves(bytes(3), b"\xff" * 3), WIDTH, HEIGHT, 24),
    "32 bits, the fourth unused": bmp(two_halves(bytes(4), b"\xff\xff\xff\0"), WIDTH, HEIGHT, 32),
    "32 bits with alpha": bmp(
        two_halves(b"\0\0\0\xff", b"\x7f\x7f\x7f\0"), WIDTH, HEIGHT, 32, (0xFF0000, 0xFF00, 0xFF, 0xFF000000)
    ),
    "palette of 1 bit": bmp(b"\x00\xff\0\0" * HEIGHT, WIDTH, HEIGHT, 1, palette=GREYS),
    "palette of 1 bit, white first": bmp(
        b"\xff\x00\0\0" * HEIGHT, WIDTH, HEIGHT, 1, palette=GREYS[4:] + GREYS[:4]
    ),
    "palette of 4 bits": bmp(
        b"\0\0\0\0\x11\x11\x11\x11" * HEIGHT, WIDTH, HEIGHT, 4, palette=GREYS + bytes(56)
    ),
    "palette of 8 bits": bmp(two_halves(b"\0", b"\1"), WIDTH, HEIGHT, 8, palette=GREYS + bytes(1016)),
}


@pytest.mark.parametrize("kind", BMPS)
def test_every_kind_of_bmp_has_its_ends_at_black_and_white(store, kind):
    assert is_black_and_white(store(BMPS[kind])[0])


def portable(mark: str, maxval: int, channels: int) -> bytes:
    samples = halves(0, maxval, channels)
    head = f"{mark}\n{WIDTH} {HEIGHT}\n{maxval}\n".encode()
    if mark in ("P2", "P3"):
        return head + " ".join(str(int(level)) for level in samples.flat).encode()
    return head + samples.astype(">u2" if maxval > 255 else "u1").tobytes()


@pytest.mark.parametrize("maxval", [1, 15, 100, 255, 256, 1023, 65535])
@pytest.mark.parametrize(("mark", "channels"), [("P2", 1), ("P3", 3), ("P5", 1), ("P6", 3)])
def test_portable_maps_are_scaled_by_their_own_white(store, mark, channels, maxval):
    pixels, kinds = store(portable(mark, maxval, channels))
    assert is_black_and_white(pixels) and ("deep" in kinds) == (maxval > 255)


def test_ones_of_portable_bitmaps_are_black(store):
    assert is_black_and_white(store(b"P4\n16 4\n" + b"\xff\x00" * HEIGHT)[0])
    assert is_black_and_white(store(b"P1\n16 4\n" + (b"1 " * 8 + b"0 " * 8) * HEIGHT)[0])


def test_floating_point_maps_are_left_out(store):
    assert (
        store(encode(Image.fromarray(halves(0, 1)[..., 0].astype(np.float32)), "PPM")).kind == "range_unknown"
    )


MODES = {
    "WEBP": ("1", "L", "P", "RGB", "RGBA", "LA"),
    "AVIF": ("1", "L", "P", "RGB", "RGBA", "LA"),
    "PNG": ("1", "L", "P", "RGB", "RGBA", "LA", "I;16"),
    "GIF": ("1", "L", "P", "RGB", "RGBA"),
    "JPEG2000": ("L", "RGB", "RGBA", "LA", "YCbCr"),
    "TIFF": ("1", "L", "P", "RGB", "RGBA", "LA", "CMYK", "YCbCr", "LAB"),
}


@pytest.mark.parametrize(("kind", "mode"), [(kind, mode) for kind in MODES for mode in MODES[kind]])
def test_what_pillow_writes_is_read_back(store, kind, mode):
    tall = BLACK_AND_WHITE.repeat(8, 0)
    picture = (
        Image.fromarray(tall * np.uint16(257)) if mode == "I;16" else Image.fromarray(tall).convert("RGB")
    )
    options = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}.get(kind, {})
    pixels, _ = store(encode(picture.convert(mode), kind, **options))
    assert np.abs(pixels[0, [0, -1], 0].astype(int) - [0, 255]).max() <= (2 if kind == "AVIF" else 1)
