"""Pictures as text that stands in an HTML file: data URIs, and many thumbnails as one sheet."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from math import ceil, isqrt

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

PIXEL_ART_PX = 48  # smaller pictures are kept to the pixel, and enlarged by the browser
QUALITY = 80
SHEET_QUALITY = 70


def data_uri(pixels: UInt8[np.ndarray, "H W 3"], side_px: int) -> str:
    """A picture within side_px x side_px; a small one keeps each pixel.

    Returns: `data:image/…`, with letters, digits and signs that need no escaping.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    if max(picture.size) <= PIXEL_ART_PX:
        return _encoded(picture, "PNG", optimize=True)
    picture.thumbnail((side_px, side_px))
    return _encoded(picture, "JPEG", quality=QUALITY)


def sheet_uri(pictures: Sequence[UInt8[np.ndarray, "H W 3"]], cell_px: int) -> tuple[str, int]:
    """Thumbnails in rows of equal length, each in the middle of its cell; and how many are in a row."""
    columns = isqrt(max(len(pictures) - 1, 0)) + 1
    sheet = Image.new("RGB", (columns * cell_px, ceil(len(pictures) / columns) * cell_px), "grey")
    for number, pixels in enumerate(pictures):
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        scale = cell_px / max(picture.size)
        size = tuple(max(1, round(side * scale)) for side in picture.size)
        picture = picture.resize(size, Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BOX)
        row, column = divmod(number, columns)
        left, top = ((cell_px - side) // 2 for side in size)
        sheet.paste(picture, (column * cell_px + left, row * cell_px + top))
    return _encoded(sheet, "JPEG", quality=SHEET_QUALITY), columns


def dimmed(
    pixels: UInt8[np.ndarray, "S S 3"], map_hw: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "S S 3"]:
    """A picture that is bright where a map is 1 and dark where it is 0: seen without colour too."""
    side = pixels.shape[:2][::-1]
    light = Image.fromarray(np.round(255 * map_hw).astype(np.uint8)).resize(side, Image.Resampling.BILINEAR)
    factor = 0.12 + 0.88 * np.asarray(light, np.float32)[..., None] / 255
    return np.round(pixels * factor).astype(np.uint8)


def _encoded(picture: Image.Image, kind: str, **options: object) -> str:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode()}"
