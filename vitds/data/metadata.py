"""What lies beside a picture's pixels in its file: how it is to be turned, and the file without all the rest.

A decoder that stumbles over metadata stops before the pixels. `without_metadata` takes it out, so that only
pixels decide whether a picture can be used.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterator

from PIL import Image

ORIENTATION = 0x0112  # the EXIF and TIFF tag
_PNG_MARK = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_WEBP_PIXELS = (b"VP8X", b"VP8 ", b"VP8L", b"ALPH", b"ANIM", b"ANMF")
_WEBP_HAS_METADATA = 0x20 | 0x08 | 0x04  # flags of VP8X: ICC profile, EXIF, XMP
# Sizes, samples, where they lie, compression and colours (of JPEG too), orientation, a raw file's version.
_TIFF_PIXELS = frozenset(
    (*range(254, 260), 262, 266, 273, 274, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326))
) | {332, 338, 339, 347, *range(512, 522), *range(529, 533), 50706}
_EXIF_MARK = b"Exif\0\0"
# In HEIF and AVIF, the entry of an item that is no picture: header, number (2 or 4 bytes), protection, type.
_HEIF_METADATA = re.compile(rb"(infe\x02.{3}.{4}|infe\x03.{3}.{6})(?:Exif|mime)", re.DOTALL)


def orientation_of(picture: Image.Image) -> tuple[int, bool]:
    """How an opened picture is to be turned, and whether its EXIF data could be read.

    Args:
        picture: not yet decoded; a PNG decoded, as its EXIF data may stand behind the pixels.
    Returns: the EXIF orientation 1 to 8, 1 where there is none or it cannot be read; True if all of it could
        be read.
    """
    if picture.format == "TIFF":
        return _valid(picture.tag_v2.get(ORIENTATION)), True
    # Pillow remembers a failed attempt as empty data, so they are read by a picture that has made none.
    reader = Image.Image()
    reader.info = dict(picture.info)
    with warnings.catch_warnings(record=True) as complaints:
        warnings.simplefilter("always")
        try:
            orientation = reader.getexif().get(ORIENTATION)
        except Exception:  # EXIF data are anyone's bytes: Pillow raises whatever they lead to
            return 1, False
    return _valid(orientation), not complaints


def _valid(orientation: object) -> int:
    return orientation if isinstance(orientation, int) and orientation in range(1, 9) else 1


def without_metadata(raw: bytes) -> tuple[bytes, bytes] | None:
    """A picture file with only what its pixels need, and the EXIF data that were in it (b"" for none).

    Returns: None for a format whose metadata are not in pieces of their own, or a damaged file.
    """
    if raw.startswith(b"\xff\xd8"):
        return _plain_jpeg(raw)
    if raw.startswith(_PNG_MARK):
        return _plain_png(raw)
    if raw[:4] == b"RIFF" and raw[8:12] == b"WEBP":
        return _plain_webp(raw)
    if raw[:4] in (b"II*\0", b"MM\0*"):
        return _plain_tiff(raw), b""
    if raw[4:8] == b"ftyp":  # its turning is no EXIF tag but a property of the picture, which stays
        return _HEIF_METADATA.sub(rb"\1free", raw), b""
    return None


def _plain_jpeg(raw: bytes) -> tuple[bytes, bytes] | None:
    """Without application segments and comments but the two that say which colours the numbers mean."""
    kept = [raw[:2]]
    exif = b""
    at = 2
    while 0 <= (at := raw.find(b"\xff", at)) < len(raw) - 4:
        marker = raw[at + 1]
        if marker in (0x00, 0xFF):  # stray or filling bytes between segments
            at += 1
            continue
        if marker == 0xDA:  # from here on, pixels
            return b"".join([*kept, raw[at:]]), exif
        segment = raw[at : at + 2 + max(2, int.from_bytes(raw[at + 2 : at + 4], "big"))]
        body = segment[4:]
        is_jfif = marker == 0xE0 and len(body) >= 14 and body.startswith(b"JFIF\0")
        is_adobe = marker == 0xEE and len(body) >= 12 and body.startswith(b"Adobe")
        if is_jfif or is_adobe or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(segment)
        elif body.startswith(_EXIF_MARK):
            exif += body[len(_EXIF_MARK) :]
        at += len(segment)
    return None


def _plain_png(raw: bytes) -> tuple[bytes, bytes] | None:
    kept = [_PNG_MARK]
    exif = b""
    for name, body, is_sound in _png_chunks(raw):
        if name in _PNG_PIXELS and name != b"tRNS" and not is_sound:
            return None
        if name in _PNG_PIXELS and is_sound:
            kept.append(_png_chunk(name, body))
        elif name == b"eXIf":
            exif = body
    return (b"".join(kept), exif) if len(kept) > 2 else None


def has_false_checksums(raw: bytes) -> bool:
    """Whether a PNG has side chunks (text, profiles, time) that are not what was written.

    Pillow looks only at those before the pixels.
    """
    return raw.startswith(_PNG_MARK) and any(
        not is_sound for name, _, is_sound in _png_chunks(raw) if name not in _PNG_PIXELS or name == b"tRNS"
    )


def _png_chunks(raw: bytes) -> Iterator[tuple[bytes, bytes, bool]]:
    """Name, content, and whether the checksum is right, of each chunk that is there as a whole."""
    at = len(_PNG_MARK)
    while at + 12 <= len(raw):
        end = at + 8 + int.from_bytes(raw[at : at + 4], "big")
        if end + 4 > len(raw):
            return
        name = raw[at + 4 : at + 8]
        body = raw[at + 8 : end]
        yield name, body, zlib.crc32(name + body) == int.from_bytes(raw[end : end + 4], "big")
        at = end + 4


def _png_chunk(name: bytes, body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + name + body + zlib.crc32(name + body).to_bytes(4, "big")


def _plain_webp(raw: bytes) -> tuple[bytes, bytes] | None:
    kept = [b"WEBP"]
    exif = b""
    at = 12
    while at + 8 <= len(raw):
        name = raw[at : at + 4]
        size = int.from_bytes(raw[at + 4 : at + 8], "little")
        body = raw[at + 8 : at + 8 + size]
        if name == b"VP8X" and body:
            body = bytes([body[0] & ~_WEBP_HAS_METADATA]) + body[1:]
        if name in _WEBP_PIXELS:
            kept.append(name + size.to_bytes(4, "little") + body + b"\0" * (size % 2))
        elif name == b"EXIF":
            exif = body.removeprefix(_EXIF_MARK)
        at += 8 + size + size % 2
    content = b"".join(kept)
    return b"RIFF" + len(content).to_bytes(4, "little") + content, exif


def _plain_tiff(raw: bytes) -> bytes:
    """The same file, its first directory cut down to the tags that say how to read the pixels."""
    order = "little" if raw.startswith(b"II") else "big"
    at = int.from_bytes(raw[4:8], order)
    count = int.from_bytes(raw[at : at + 2], order)
    entries = [raw[at + 2 + 12 * i : at + 14 + 12 * i] for i in range(count)]
    kept = [entry for entry in entries if int.from_bytes(entry[:2], order) in _TIFF_PIXELS]
    directory = len(kept).to_bytes(2, order) + b"".join(kept) + bytes(4)  # no second picture
    return raw[:at] + directory + raw[at + len(directory) :]
