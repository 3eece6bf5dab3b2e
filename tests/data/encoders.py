"""Writers of TIFF, PNG and BMP files in the kinds that Pillow reads but does not write.

Samples are (H, W, C) of the file's own numbers.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Mapping

import numpy as np

REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def pack(samples: np.ndarray, bits: int, order: str, sample_format: int = 1) -> bytes:
    """Rows of samples, each row padded to whole bytes."""
    kind = {1: "u", 2: "i", 3: "f"}[sample_format]
    if bits in (8, 16, 32):
        return (
            samples.astype(np.float64 if kind == "f" else np.int64)
            .astype(f"{order}{kind}{bits // 8}")
            .tobytes()
        )
    rows = samples.reshape(len(samples), -1, 1).astype(np.int64) >> np.arange(bits)[::-1] & 1
    return np.packbits(rows.reshape(len(samples), -1).astype(np.uint8), axis=1).tobytes()


def tiff(
    samples: np.ndarray,
    *,
    photometric: int,
    bits: int = 8,
    sample_format: int = 1,
    extra: tuple[int, ...] = (),
    order: str = "<",
    planar: int = 1,
    fill: int = 1,
    deflated: bool = False,
    tags: Mapping[int, tuple[str, bytes | list[int]]] = {},  # noqa: B006 (never written to)
) -> bytes:
    """A TIFF of one strip a plane.

    Args:
        order: < or >, the bytes of a number.
        fill: 1 or 2, the bits of a byte.
        tags: number -> a letter of struct and the values, beside or in place of the usual ones.
    """
    samples = samples.reshape(*samples.shape[:2], -1)
    height, width, channels = samples.shape
    planes = [samples] if planar == 1 else np.split(samples, channels, axis=2)
    strips = [pack(plane, bits, order, sample_format) for plane in planes]
    strips = [zlib.compress(strip) if deflated else strip for strip in strips]
    strips = [strip.translate(REVERSED) if fill == 2 else strip for strip in strips]
    places = np.cumsum([8, *(len(strip) for strip in strips)]).tolist()
    entries = {
        256: ("H", [width]),
        257: ("H", [height]),
        258: ("H", [bits] * channels),
        259: ("H", [8 if deflated else 1]),
        262: ("H", [photometric]),
        266: ("H", [fill]),
        273: ("I", places[:-1]),
        277: ("H", [channels]),
        278: ("H", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [planar]),
        339: ("H", [sample_format] * channels),
        **({338: ("H", list(extra))} if extra else {}),
        **tags,
    }
    directory, far = struct.pack(f"{order}H", len(entries)), b""
    far_at = places[-1] + 2 + 12 * len(entries) + 4
    for tag, (letter, values) in sorted(entries.items()):
        packed = (
            values if isinstance(values, bytes) else struct.pack(f"{order}{len(values)}{letter}", *values)
        )
        if len(packed) > 4:
            packed, far = struct.pack(f"{order}I", far_at + len(far)), far + packed
        kind = {"B": 1, "s": 2, "H": 3, "I": 4}[letter]
        directory += struct.pack(f"{order}HHI", tag, kind, len(values)) + packed.ljust(4, b"\0")
    mark = {"<": b"II*\0", ">": b"MM\0*"}[order]
    return mark + struct.pack(f"{order}I", places[-1]) + b"".join(strips) + directory + bytes(4) + far


def png_chunk(name: bytes, body: bytes, checksum_off_by: int = 0) -> bytes:
    """One chunk; its checksum is the right one, with the bits of the last argument turned."""
    checksum = zlib.crc32(name + body) ^ checksum_off_by
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", checksum)


def png_of(samples: np.ndarray, bits: int, colour_type: int, *side_chunks: bytes) -> bytes:
    """A PNG of `bits` a sample; the side chunks stand before the pixels."""
    samples = samples.reshape(*samples.shape[:2], -1)
    height, width, _ = samples.shape
    rows = b"".join(b"\0" + pack(samples[i : i + 1], bits, ">") for i in range(height))
    header = struct.pack(">IIBBBBB", width, height, bits, colour_type, 0, 0, 0)
    chunks = [
        png_chunk(b"IHDR", header),
        *side_chunks,
        png_chunk(b"IDAT", zlib.compress(rows)),
        png_chunk(b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def bmp(
    rows: bytes, width: int, height: int, bits: int, masks: tuple[int, ...] = (), palette: bytes = b""
) -> bytes:
    """A BMP, top row first; rows are padded to four bytes by the caller."""
    header = 40 if len(masks) < 4 else 56
    extra = struct.pack(f"<{len(masks)}I", *masks)
    offset = 14 + 40 + len(extra) + len(palette)
    return (
        struct.pack("<2sIHHI", b"BM", offset + len(rows), 0, 0, offset)
        + struct.pack(
            "<IiiHHIIiiII",
            header,
            width,
            -height,
            1,
            bits,
            3 if masks else 0,
            len(rows),
            0,
            0,
            len(palette) // 4,
            0,
        )
        + extra
        + palette
        + rows
    )
