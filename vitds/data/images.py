"""One image file to one stored sample: decoded, turned upright, made 8-bit RGB, reduced, encoded.

A JPEG that needs none of this keeps its own bytes: encoding again would lose quality. Every sample is decoded
here as training decodes it, so what cannot be decoded there never gets into a file.
"""

from __future__ import annotations

import hashlib
import io
import struct
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from vitds.data.formats import DECODED, HEAD_BYTES, format_of, how_to_read
from vitds.data.likeness import look_of
from vitds.data.metadata import has_false_checksums, without_metadata
from vitds.data.pixels import Refused, layout_of, to_rgb
from vitds.data.trees import SourceImage
from vitds.data.zips import unpack
from vitds.errors import DataError, ResourceError
from vitds.kernels.views import JPEG, RAW, decode

Image.init()  # else Pillow knows only the plugins that it has needed so far
MAX_SIDE_PX = 65535


@dataclass(frozen=True)
class Storing:
    """How samples are stored.

    Attributes:
        storage: raw pixels or JPEG.
        side_px: the short side that larger images are reduced to; None for none.
        quality: of JPEGs that must be encoded, 1 to 100.
        has_look: whether `Stored.look` is made, which finds images that are almost alike.
    """

    storage: Literal["raw", "jpg"]
    side_px: int | None
    quality: int
    has_look: bool = False


@dataclass(frozen=True, eq=False)
class Stored:
    """One sample as it goes into the file.

    Attributes:
        data: JPEG bytes, or height x width x 3 pixels.
        is_jpeg: which of the two.
        height: in pixels.
        width: in pixels.
        digest: SHA-256 of size and decoded pixels.
        sums: (3, 2) int64, per channel the sum and the sum of squares of the decoded pixels, 0..255.
        kinds: findings (findings.KINDS).
        look: as likeness.look_of; b"" where it was not asked for.
    """

    data: bytes
    is_jpeg: bool
    height: int
    width: int
    digest: bytes
    sums: NDArray[np.int64]
    kinds: tuple[str, ...]
    look: bytes


@dataclass(frozen=True)
class LeftOut:
    """An image that cannot be used.

    Attributes:
        kind: the finding (findings.KINDS).
        reason: the decoder's words, or what to do.
    """

    kind: str
    reason: str


def read_bytes(image: SourceImage) -> bytes:
    """The encoded bytes of an image in a file. Raises: OSError; ValueError if a zip's member is damaged."""
    with open(image.path, "rb") as file:
        file.seek(image.offset)
        raw = file.read(image.size)
    return raw if image.packed is None else unpack(raw, image.packed)


def image_size(image: SourceImage) -> tuple[int, int] | None:
    """Height and width as the file's header gives them, before any turning; None where it gives none."""
    if image.pixels is not None:
        return image.pixels.shape[:2]
    try:
        with warnings.catch_warnings(), open(image.path, "rb") as file:
            warnings.simplefilter("ignore")
            raw = file if image.size < 0 else io.BytesIO(read_bytes(image))
            with Image.open(raw, formats=tuple(DECODED)) as picture:
                return picture.height, picture.width
    except MemoryError:
        raise
    except Exception:  # as in store_image, which will name it
        return None


def store_image(image: SourceImage, storing: Storing) -> Stored | LeftOut:
    """Decode one image and encode it as it is to be stored; whatever is wrong with it comes as LeftOut."""
    if image.pixels is not None:
        return _store_pixels(Image.fromarray(image.pixels), (), storing)
    try:
        raw = read_bytes(image)
    except OSError as error:
        return LeftOut("unreadable", error.strerror or str(error))
    except ValueError as error:
        return LeftOut("damaged", str(error))
    name = format_of(raw[:HEAD_BYTES])
    if name is None:
        return LeftOut("not_image", "no known format" if raw else "an empty file")
    if name not in DECODED:
        return LeftOut("no_decoder", how_to_read(name))
    try:
        return _store_file(raw, name, storing)
    except (MemoryError, ResourceError):
        raise
    except Exception as error:  # a decoder raises anything on hostile bytes; none of it may end the build
        return _left_out(error, raw, name)


def _store_file(raw: bytes, name: str, storing: Storing) -> Stored:
    """Decode a file; where the decoder stumbles, once more without the metadata: only pixels decide."""
    with warnings.catch_warnings(record=True) as complaints:  # Pillow's, of metadata that it passes over
        warnings.simplefilter("always")
        try:
            with Image.open(io.BytesIO(raw), formats=(name,)) as picture:
                stored = _store_picture(picture, raw, storing)
        except (MemoryError, ResourceError, Refused, Image.DecompressionBombError):
            raise
        except Exception:
            if (plain := without_metadata(raw)) is None:
                raise
            stored = _store_plain(*plain, raw, name, storing)
            is_odd = True
        else:
            is_odd = any(issubclass(each.category, UserWarning) for each in complaints)
    if is_odd or has_false_checksums(raw):
        return replace(stored, kinds=tuple(dict.fromkeys((*stored.kinds, "metadata"))))
    return stored


def _store_plain(plain: bytes, exif: bytes, raw: bytes, name: str, storing: Storing) -> Stored:
    with Image.open(io.BytesIO(plain), formats=(name,)) as picture:
        if exif:
            picture.info["exif"] = exif
        return _store_picture(picture, raw, storing)


def decode_stored(data: bytes, is_jpeg: bool, height: int, width: int) -> NDArray[np.uint8]:
    """The (height, width, 3) pixels of a stored sample, as training sees them.

    Raises: DataError if the bytes are not a sound picture of that size (gives the decoder's reason; the
        caller knows the file).
    """
    return decode(data, JPEG if is_jpeg else RAW, (height, width))


def digest_of(pixels: NDArray[np.uint8]) -> bytes:
    """SHA-256 of a decoded sample: its height and width, then its pixels."""
    return hashlib.sha256(struct.pack("<II", *pixels.shape[:2]) + pixels.tobytes()).digest()


def hash_entry(digest: bytes, label: int) -> bytes:
    """What one sample adds to the content hash: the digest of its pixels, and its label as 8 bytes."""
    return digest + label.to_bytes(8, "little", signed=True)


def _left_out(error: Exception, raw: bytes, name: str) -> LeftOut:
    if isinstance(error, Refused):
        return LeftOut(error.kind, str(error))
    if isinstance(error, Image.DecompressionBombError):
        return LeftOut("too_large", str(error))
    if isinstance(error, UnidentifiedImageError):  # which hides the decoder's own words
        error = _hidden_error(raw, name) or error
    reason = f"{name}: {str(error) or type(error).__name__}"
    return LeftOut("truncated" if "truncated" in reason.lower() else "damaged", reason)


def _hidden_error(raw: bytes, name: str) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            Image.OPEN[name][0](io.BytesIO(raw), "")
        except Exception as error:
            return error
    return None


def _store_picture(picture: Image.Image, raw: bytes, storing: Storing) -> Stored:
    """Args: raw: the picture's own file, which is kept where it is a JPEG that needs no change."""
    layout = layout_of(picture, raw)
    kinds = layout.kinds
    is_plain = picture.format in ("JPEG", "MPO") and not {"cmyk", "rotated"} & set(kinds)
    small = storing.side_px is None or min(picture.size) <= storing.side_px
    if is_plain and small:
        try:
            pixels = decode_stored(raw, True, picture.height, picture.width)
        except DataError:
            kinds += ("mended",)  # Pillow is more lenient; what it reads, if it can, is stored
        else:
            is_jpeg = storing.storage == "jpg"
            return _stored(raw if is_jpeg else pixels.tobytes(), is_jpeg, pixels, kinds, storing)
    rgb = to_rgb(picture, layout)
    if picture.format != "MPO" and _has_more_frames(picture):
        kinds += ("animated",)
    return _store_pixels(rgb, kinds, storing)


def _has_more_frames(picture: Image.Image) -> bool:
    """Asked after decoding, as it moves in the file; what follows the first frame cannot spoil it."""
    try:
        return getattr(picture, "is_animated", False)
    except Exception:
        return False


def _store_pixels(rgb: Image.Image, kinds: tuple[str, ...], storing: Storing) -> Stored:
    short = min(rgb.size)
    if storing.side_px is not None and short > storing.side_px:
        width, height = (max(1, round(side * storing.side_px / short)) for side in rgb.size)
        rgb = rgb.resize((width, height), Image.Resampling.BICUBIC)
    if max(rgb.size) > MAX_SIDE_PX:
        raise Refused("too_large", f"{rgb.width} x {rgb.height} pixels")
    if storing.storage == "raw":
        pixels = np.asarray(rgb)
        return _stored(pixels.tobytes(), False, pixels, kinds, storing)
    encoded = io.BytesIO()
    rgb.save(encoded, "JPEG", quality=storing.quality)
    pixels = decode_stored(encoded.getvalue(), True, rgb.height, rgb.width)
    return _stored(encoded.getvalue(), True, pixels, kinds, storing)


def _stored(
    data: bytes, is_jpeg: bool, pixels: NDArray[np.uint8], kinds: tuple[str, ...], storing: Storing
) -> Stored:
    levels = np.arange(256)
    sums = np.array(Image.fromarray(pixels).histogram()).reshape(3, 256) @ np.stack(
        (levels, levels**2), axis=1
    )
    look = look_of(pixels) if storing.has_look else b""
    return Stored(data, is_jpeg, pixels.shape[0], pixels.shape[1], digest_of(pixels), sums, kinds, look)
