"""Which files are pictures, by their first bytes; the extension counts only where it saves opening a file.

HEIC comes from pillow-heif where that is installed; this is the one place that knows of it.
"""

from __future__ import annotations

import re

from PIL import features

try:
    import pillow_heif
except ImportError:
    HAS_HEIF = False
else:
    pillow_heif.register_heif_opener()
    HAS_HEIF = True

# Files of these names are taken without a look inside; decoding finds out a name that lies.
IMAGE_SUFFIXES = frozenset(
    ".jpg .jpeg .jpe .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .jp2 .avif"
    " .heic .heif .hif".split()
)
HEAD_BYTES = 132  # what `format_of` looks at: DICOM's mark ends there

# Name -> the first bytes, as a regular expression. Cameras' formats that are TIFF files inside (NEF, ARW,
# DNG) are recognised by their tags, in pixels.py.
_MARKS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "GIF": rb"GIF8[79]a",
    "BMP": rb"BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0{3}",  # "BM" alone also begins texts
    "WEBP": rb"RIFF.{4}WEBP",
    "CR2": rb"II\*\0.{4}CR",
    "TIFF": rb"II\*\0|MM\0\*|II\+\0|MM\0\+",
    "PPM": rb"P[1-6f][ \t\r\n]+[#0-9]",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "JPEG XL": rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n",
    "JPEG XR": rb"II\xbc",
    "CRW": rb"II\x1a\0\0\0HEAPCCDR",
    "ORF": rb"IIRO|IIRS|MMOR",
    "RW2": rb"IIU\0",
    "RAF": rb"FUJIFILMCCD-RAW",
    "X3F": rb"FOVb",
    "MRW": rb"\0MRM",
    "Photoshop": rb"8BPS",
    "OpenEXR": rb"\x76\x2f\x31\x01",
    "Radiance HDR": rb"#\?R(ADIANCE|GBE)",
    "PFM": rb"PF[ \t\r\n]",
    "PAM": rb"P7\n",
    "FITS": rb"SIMPLE  =",
    "DICOM": rb".{128}DICM",
}
_MATCHERS = {name: re.compile(mark, re.DOTALL) for name, mark in _MARKS.items()}
_HEIC_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"))

# What this installation decodes, by Pillow's names; nothing that would start another program.
DECODED = frozenset(
    ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000")
    + ("AVIF",) * bool(features.check("avif"))
    + ("HEIF",) * HAS_HEIF
)


def format_of(head: bytes) -> str | None:
    """The format that a file's first HEAD_BYTES announce.

    Returns: the name that Pillow or its users give it; None for no picture.
    """
    if head[4:8] == b"ftyp":
        return _container_of(head)
    return next((name for name, matcher in _MATCHERS.items() if matcher.match(head)), None)


def _container_of(head: bytes) -> str | None:
    """HEIF, AVIF and CR3 share a container with videos; its first box lists the brands that it is of."""
    size = int.from_bytes(head[:4], "big")
    brands = {head[at : at + 4] for at in (8, *range(16, min(size, len(head)), 4))}
    if brands & {b"avif", b"avis"}:
        return "AVIF"
    if brands & _HEIC_BRANDS or brands & {b"mif1", b"msf1"}:
        return "HEIF"
    return "CR3" if b"crx " in brands else None


def how_to_read(name: str) -> str:
    """The message about a picture in a format that is not in DECODED: its name, and what to do."""
    if name == "HEIF":
        return "HEIC: `pip install pillow-heif`, then build again"
    if name == "AVIF":
        return "AVIF: `pip install --upgrade pillow`, then build again"
    return f"{name}: convert it to TIFF, PNG or JPEG first"
