"""One image file to one stored sample: decoded, turned upright, made 8-bit RGB, reduced, encoded.

A JPEG that needs none of this keeps its own bytes: encoding again would lose quality. Every sample is decoded here as training
decodes it, so what cannot be decoded there never gets into a file.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from vitds.data.sources import SourceImage
from vitds.errors import DataError, ResourceError
from vitds.kernels.views import JPEG, RAW, decode

Image.init()  # else Pillow knows only the plugins that it has needed so far
FORMATS = (
    "JPEG",
    "PNG",
    "GIF",
    "BMP",
    "WEBP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
)  # none that starts another program
MAX_SIDE_PX = 65535
ORIENTATION = 0x0112  # EXIF


@dataclass(frozen=True)
class Storing:
    """How samples are stored: raw pixels or JPEG; the short side they are reduced to; quality where a JPEG must be encoded."""

    storage: Literal["raw", "jpg"]
    side_px: int | None
    quality: int


@dataclass(frozen=True, eq=False)
class Stored:
    """One sample as it goes into the file.

    Attributes:
        data: JPEG bytes, or height x width x 3 pixels. digest: SHA-256 of size and decoded pixels.
        sums: (3, 2) int64, per channel the sum and the sum of squares of the decoded pixels, 0..255.
        kinds: findings (findings.KINDS).
    """

    data: bytes
    is_jpeg: bool
    height: int
    width: int
    digest: bytes
    sums: NDArray[np.int64]
    kinds: tuple[str, ...]


@dataclass(frozen=True)
class LeftOut:
    """An image that cannot be used: its kind of finding, and the decoder's words."""

    kind: str
    reason: str


def read_bytes(image: SourceImage) -> bytes:
    """The encoded bytes of an image in a file. Raises: OSError."""
    with open(image.path, "rb") as file:
        file.seek(image.offset)
        return file.read(image.size)


def image_size(image: SourceImage) -> tuple[int, int] | None:
    """Height and width as the file's header gives them, before any turning; None where it gives none."""
    if image.pixels is not None:
        return image.pixels.shape[:2]
    try:
        with warnings.catch_warnings(), open(image.path, "rb") as file:
            warnings.simplefilter("ignore")
            raw = file if image.size < 0 else io.BytesIO(read_bytes(image))
            with Image.open(raw, formats=FORMATS) as picture:
                return picture.height, picture.width
    except MemoryError:
        raise
    except Exception:  # as in store_image, which will name it
        return None


def store_image(image: SourceImage, storing: Storing) -> Stored | LeftOut:
    """Decode one image and encode it as it is to be stored; whatever is wrong with it comes back as LeftOut."""
    if image.pixels is not None:
        return _store_pixels(Image.fromarray(image.pixels), (), storing)
    try:
        raw = read_bytes(image)
    except OSError as error:
        return LeftOut("unreadable", error.strerror or str(error))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore"
            )  # Pillow warns of odd metadata and of large pictures; what matters becomes a finding
            with Image.open(io.BytesIO(raw), formats=FORMATS) as picture:
                return _store_picture(picture, raw, storing)
    except (MemoryError, ResourceError):
        raise
    except (
        Exception
    ) as error:  # a decoder can raise anything on hostile bytes, and none of it may end the build
        return _left_out(error)


def decode_stored(data: bytes, is_jpeg: bool, height: int, width: int) -> NDArray[np.uint8]:
    """The (height, width, 3) pixels of a stored sample, as training sees them.

    Raises: DataError if the bytes are not a sound picture of that size (gives the decoder's reason; the caller knows the file).
    """
    return decode(data, JPEG if is_jpeg else RAW, (height, width))


def digest_of(pixels: NDArray[np.uint8]) -> bytes:
    """SHA-256 of a decoded sample: its height and width, then its pixels."""
    return hashlib.sha256(struct.pack("<II", *pixels.shape[:2]) + pixels.tobytes()).digest()


def hash_entry(digest: bytes, label: int) -> bytes:
    """What one sample adds to the content hash: the digest of its decoded pixels, and its label as 8 bytes."""
    return digest + label.to_bytes(8, "little", signed=True)


def _left_out(error: Exception) -> LeftOut:
    reason = str(error) or type(error).__name__
    if isinstance(error, _Refused):
        return LeftOut(error.kind, reason)
    if isinstance(error, UnidentifiedImageError):
        return LeftOut("not_image", "no known format")  # Pillow's own words name a place in memory
    if isinstance(error, Image.DecompressionBombError):
        return LeftOut("too_large", reason)
    return LeftOut("truncated" if "truncated" in reason.lower() else "damaged", reason)


class _Refused(Exception):
    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind = kind


def _store_picture(picture: Image.Image, raw: bytes, storing: Storing) -> Stored:
    kinds = _oddities(picture)
    is_plain = picture.format in ("JPEG", "MPO") and not {"cmyk", "rotated"} & set(kinds)
    small = storing.side_px is None or min(picture.size) <= storing.side_px
    if is_plain and small:
        try:
            pixels = decode_stored(raw, True, picture.height, picture.width)
        except DataError:
            kinds += (
                "mended",
            )  # Pillow is more lenient; if it can read the picture, what it reads is stored
        else:
            is_jpeg = storing.storage == "jpg"
            return _stored(raw if is_jpeg else pixels.tobytes(), is_jpeg, pixels, kinds)
    return _store_pixels(_upright_rgb(picture), kinds, storing)


def _oddities(picture: Image.Image) -> tuple[str, ...]:
    """The findings that an opened, not yet decoded picture shows."""
    mode, transparent = picture.mode, "transparency" in picture.info
    rawmode = str(picture.tile[0][3]) if picture.tile else ""
    return tuple(
        kind
        for kind, holds in {
            "grey": mode in ("1", "L", "LA", "La") or _is_deep_grey(picture),
            "cmyk": mode == "CMYK",
            "deep": _is_deep_grey(picture) or "16" in rawmode,
            "palette": mode in ("P", "PA"),
            "transparent": mode in ("LA", "La", "PA", "RGBA", "RGBa") or transparent,
            "rotated": picture.getexif().get(ORIENTATION, 1) in range(2, 9),
            "animated": getattr(picture, "is_animated", False) and picture.format != "MPO",
        }.items()
        if holds
    )


def _is_deep_grey(picture: Image.Image) -> bool:
    """16-bit greys; Pillow's mode of some is the 32-bit one."""
    sixteen = picture.format == "PPM" or (picture.tile and "16" in str(picture.tile[0][3]))
    return picture.mode.startswith("I;16") or (picture.mode == "I" and bool(sixteen))


def _upright_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: deeper greys scaled over their whole range, transparency laid on white, turned as the EXIF tag says."""
    is_deep_grey = _is_deep_grey(picture)
    upright = ImageOps.exif_transpose(picture)
    if is_deep_grey:
        return Image.fromarray(
            ((np.asarray(upright).astype(np.uint32) + 128) // 257).astype(np.uint8)
        ).convert("RGB")
    if upright.mode in ("I", "F"):
        raise _Refused("range_unknown", f"Pillow mode {upright.mode}")
    if "transparency" in upright.info or upright.mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        layers = upright.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", layers.size, "white"), layers).convert("RGB")
    return upright.convert("RGB")


def _store_pixels(rgb: Image.Image, kinds: tuple[str, ...], storing: Storing) -> Stored:
    short = min(rgb.size)
    if storing.side_px is not None and short > storing.side_px:
        width, height = (max(1, round(side * storing.side_px / short)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    if max(rgb.size) > MAX_SIDE_PX:
        raise _Refused("too_large", f"{rgb.width} x {rgb.height} pixels")
    if storing.storage == "raw":
        pixels = np.asarray(rgb)
        return _stored(pixels.tobytes(), False, pixels, kinds)
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=storing.quality)
    return _stored(
        encoded.getvalue(), True, decode_stored(encoded.getvalue(), True, rgb.height, rgb.width), kinds
    )


def _stored(data: bytes, is_jpeg: bool, pixels: NDArray[np.uint8], kinds: tuple[str, ...]) -> Stored:
    levels = np.arange(256)
    sums = np.array(Image.fromarray(pixels).histogram()).reshape(3, 256) @ np.stack(
        (levels, levels**2), axis=1
    )
    return Stored(data, is_jpeg, pixels.shape[0], pixels.shape[1], digest_of(pixels), sums, kinds)
