"""From a picture of any kind to 8-bit RGB, upright: black is 0, white is 255, whatever its own numbers are.

Bit depth, sign and channels come from the decoder's description (Pillow's mode and raw mode, TIFF tags, the
JPEG 2000 header), never from the numbers themselves. What has no known range is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, TiffImagePlugin, features

from vitds.data.metadata import orientation_of

# Pillow's own reader of uncompressed TIFFs takes planes of 16 bits for 8, and knows no subsampling.
TiffImagePlugin.READ_LIBTIFF = features.check("libtiff")

NEW_SUBFILE_TYPE, BITS_PER_SAMPLE, PHOTOMETRIC = 254, 258, 262  # TIFF tags
PLANAR, SAMPLE_FORMAT, DNG_VERSION = 284, 339, 50706
WHITE_IS_ZERO, ONE_PLANE_A_CHANNEL, UNSIGNED, UNDEFINED = 0, 2, 1, 4  # their values
# Greys that Pillow hands over as they are, by raw mode: the level of white.
WHITE = {"I;12": 4095, "I;16": 65535, "I;16B": 65535, "I;16L": 65535, "I;16N": 65535, "I;16R": 65535}
ALPHA_MODES = ("LA", "La", "PA", "RGBA", "RGBa")
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}  # the EXIF orientation -> what turns the picture upright


class Refused(Exception):
    """A picture that cannot be used: its kind of finding, and why."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


@dataclass(frozen=True)
class Layout:
    """What the numbers of an opened picture mean, by its file's description.

    Attributes:
        rawmode: the samples as they lie in the file, in Pillow's words; "" where its decoder does not say.
        white: the level of white of a deep grey that Pillow does not scale; None for all else.
        is_inverted: white is 0.
        bits: of each channel of a JPEG 2000, which Pillow shifts to 8 and does not scale; () for all else.
        orientation: 1 to 8, as EXIF has it.
        kinds: findings (findings.KINDS).
    """

    rawmode: str
    white: int | None
    is_inverted: bool
    bits: tuple[int, ...]
    orientation: int
    kinds: tuple[str, ...]


def layout_of(picture: Image.Image, raw: bytes) -> Layout:
    """Read the description of a picture that Pillow has opened; a PNG is decoded then.

    Args:
        picture: as Image.open gives it; or decoded, or made in memory, when less of the description is left.
        raw: its file; b"" where that is gone.
    Raises: Refused for samples of unknown range (signed, floating-point, 32 bits), for a camera's raw file,
        and for what Pillow is known to read wrongly; of a PNG whatever its decoder raises.
    """
    tile = getattr(picture, "tile", ())  # empty once it is decoded
    arguments = tile[0][3] if tile else ""
    arguments = arguments if isinstance(arguments, tuple) else (arguments,)
    rawmode = next((part for part in arguments if isinstance(part, str)), "")
    bits = _jpeg2000_bits(raw, picture) if picture.format == "JPEG2000" and raw else ()
    is_inverted = False
    if picture.format == "TIFF":
        _check_tiff(picture)
        is_inverted = picture.tag_v2.get(PHOTOMETRIC) == WHITE_IS_ZERO
    white = _white_level(picture, rawmode, bits)
    if picture.format == "PNG":
        picture.load()  # its EXIF data may stand behind the pixels
    orientation, is_readable = orientation_of(picture)
    depth = max((*bits, picture.info.get("bit_depth", 8)))  # pillow-heif says it so
    maxval = arguments[-1] if picture.format == "PPM" and isinstance(arguments[-1], int) else 0
    holds = {
        "grey": picture.mode in ("1", "L", "LA", "La") or rawmode.startswith("LA;") or white is not None,
        "cmyk": picture.mode == "CMYK",
        "deep": white is not None or ";16" in rawmode or depth > 8 or maxval > 255,
        "palette": picture.mode in ("P", "PA"),
        "transparent": picture.mode in ALPHA_MODES or "transparency" in picture.info,
        "rotated": orientation != 1,
        "metadata": not is_readable,
    }
    return Layout(
        rawmode, white, is_inverted, bits, orientation, tuple(kind for kind in holds if holds[kind])
    )


def _white_level(picture: Image.Image, rawmode: str, bits: tuple[int, ...]) -> int | None:
    """None for what Pillow brings to 8 bits by itself."""
    if picture.mode != "F" and picture.mode[0] != "I":
        return None
    if picture.mode == "F":
        white = None
    elif picture.format == "PPM":  # its reader scales all greys to 16 bits
        white = 65535
    elif bits:  # JPEG 2000, whose reader shifts them up to 16 bits
        white = ((1 << bits[0]) - 1) << (16 - bits[0])
    elif picture.format == "TIFF":  # whose tags are there also when it is decoded
        white = (1 << picture.tag_v2[BITS_PER_SAMPLE][0]) - 1 if picture.mode in WHITE else None
    else:
        white = WHITE.get(rawmode or picture.mode)
    if white is None:
        what = "floating-point" if picture.mode == "F" else "signed or 32-bit"
        raise Refused("range_unknown", f"{what} samples, in Pillow's words {picture.mode} from {rawmode}")
    return white


def _check_tiff(picture: TiffImagePlugin.TiffImageFile) -> None:
    tags = picture.tag_v2
    if DNG_VERSION in tags or tags.get(NEW_SUBFILE_TYPE, 0) & 1:
        raise Refused(
            "no_decoder",
            "a camera's raw file (DNG, NEF, ARW, ...), of which only the preview could be read: "
            "convert it to TIFF, PNG or JPEG first",
        )
    for sample_format in tags.get(SAMPLE_FORMAT, (UNSIGNED,)):
        if sample_format not in (UNSIGNED, UNDEFINED):
            kind = {2: "signed", 3: "floating-point"}.get(sample_format, "complex")
            raise Refused("range_unknown", f"{kind} samples, by the tag SampleFormat")
    if tags.get(PLANAR) == ONE_PLANE_A_CHANNEL and picture.mode in ("LA", "La", "PA", "LAB"):
        raise Refused(
            "no_decoder", f"TIFF with a plane a channel in mode {picture.mode}: save it interleaved"
        )


def _jpeg2000_bits(raw: bytes, picture: Image.Image) -> tuple[int, ...]:
    """Bits of each channel, from the header of the code stream (ISO 15444-1, A.5.1: the marker SIZ)."""
    at = raw.index(b"\xff\x4f\xff\x51")
    channels = int.from_bytes(raw[at + 40 : at + 42], "big")
    sizes = raw[at + 42 : at + 42 + 3 * channels : 3]
    if any(size & 0x80 for size in sizes):
        raise Refused("range_unknown", "signed samples in JPEG 2000")
    bits = tuple(size + 1 for size in sizes)
    if max(bits) > 8 and picture.mode not in ("I;16", "I"):
        # Pillow rounds 4095 to 256 and keeps the lower byte: white becomes black.
        raise Refused("no_decoder", f"JPEG 2000 colours of {max(bits)} bits: convert it to TIFF or PNG first")
    return bits


def to_rgb(picture: Image.Image, layout: Layout) -> Image.Image:
    """Decode a picture: 8-bit RGB, transparency laid on white, turned upright.

    Raises: whatever its decoder raises.
    """
    picture.load()
    if "transparency" in picture.info:
        picture.info["transparency"] = _as_scaled(picture.info["transparency"], layout.rawmode)
    if layout.white is not None:
        rgb = _from_deep_grey(picture, layout)
    else:
        rgb = _on_white(_as_described(picture, layout))
    # Pillow's TIFF reader has turned the picture by itself and then removed the tag.
    is_upright = picture.format == "TIFF" and orientation_of(picture)[0] == 1
    return rgb if is_upright or layout.orientation == 1 else rgb.transpose(TURNS[layout.orientation])


def _as_scaled(transparent: object, rawmode: str) -> object:
    """The transparent colour of a PNG: Pillow leaves it in the file's own numbers, and scales the pixels."""
    if rawmode in ("L;2", "L;4") and isinstance(transparent, int):
        return transparent * {"L;2": 85, "L;4": 17}[rawmode]
    if rawmode == "RGB;16B" and isinstance(transparent, tuple):
        return tuple(level >> 8 for level in transparent)
    return transparent


def _from_deep_grey(picture: Image.Image, layout: Layout) -> Image.Image:
    levels = np.asarray(picture).astype(np.uint32)
    grey = (levels * 255 + layout.white // 2) // layout.white
    grey = (255 - grey if layout.is_inverted else grey).astype(np.uint8)
    if isinstance(transparent := picture.info.get("transparency"), int):
        grey[levels == transparent] = 255
    return Image.fromarray(grey).convert("RGB")


def _as_described(picture: Image.Image, layout: Layout) -> Image.Image:
    """Where Pillow's numbers are not what the file's description says."""
    if picture.format == "JPEG" and picture.mode == "CMYK" and "adobe" not in picture.info:
        return ImageChops.invert(picture)  # Pillow takes all for Adobe's, whose ink is 255 - value
    if layout.bits and min(layout.bits) < 8 and picture.mode not in ("P", "PA"):
        # Pillow shifts up to 8 bits, so white is 240 for 4 bits.
        return picture.point(
            [min(255, round(v * 255 / (((1 << b) - 1) << (8 - b)))) for b in layout.bits for v in range(256)]
        )
    return picture


def _on_white(picture: Image.Image) -> Image.Image:
    if "transparency" not in picture.info and picture.mode not in ALPHA_MODES:
        return picture.convert("RGB")
    if picture.mode == "La":  # of which Pillow knows only this one conversion
        picture = picture.convert("LA")
    layers = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
