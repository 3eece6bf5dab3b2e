"""The images nearest to one, by the cosine of their features, and a picture sheet of them."""

from __future__ import annotations

import heapq
import os
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageOps

from vitds.data.lettering import LINE_PX, Lettering, wrapped
from vitds.use.images import NamedImage
from vitds.use.model import Answer

CELL_PX, GAP_PX, COLUMNS = 176, 12, 4
FRAME = (214, 90, 20)  # around the image that was asked about


@dataclass(frozen=True)
class Neighbour:
    """One of the images that are looked through.

    Attributes:
        image: where it lies.
        cosine: of its features and those of the image that was asked about, -1 to 1.
    """

    image: NamedImage
    cosine: float


def nearest(
    query: Float[np.ndarray, " D"], images: Iterable[NamedImage], answers: Iterable[Answer], count: int
) -> list[Neighbour]:
    """The images with the highest cosine, the nearest first; of equal ones the earlier first.

    Args:
        query: features of the image that was asked about.
        images: those that are looked through.
        answers: their features, in the same order; none of them stay in memory.
        count: how many to find.
    """
    rows = (
        (_cosine(query, answer.row), -place, image)
        for place, (image, answer) in enumerate(zip(images, answers, strict=True))
        if answer.row is not None
    )
    best = heapq.nlargest(count, rows, key=lambda row: row[:2])
    return [Neighbour(image, cosine) for cosine, _, image in best]


def without(image: NamedImage, images: Iterable[NamedImage]) -> list[NamedImage]:
    """The images but for the one that was asked about, by where its bytes lie."""
    place = _place(image)
    return [one for one in images if _place(one) != place]


def draw_sheet(
    query: tuple[str, NDArray[np.uint8]], found: list[tuple[str, NDArray[np.uint8]]], title: str
) -> tuple[Image.Image, set[str]]:
    """A sheet of pictures: the one that was asked about in a frame, then the nearest, row by row.

    Args:
        query: caption and (H, W, 3) pixels.
        found: likewise, the nearest first.
        title: stands above.
    Returns: the page, and the letters that stand on it as code points, as no font here has them.
    """
    cells = [query, *found]
    rows = -(-len(cells) // COLUMNS)
    step_x, step_y = CELL_PX + GAP_PX, CELL_PX + 3 * LINE_PX + GAP_PX
    width_px = GAP_PX + COLUMNS * step_x
    header = wrapped(title, width_px - 2 * GAP_PX)
    top = GAP_PX + (len(header) + 1) * LINE_PX
    page = Image.new("RGB", (width_px, top + rows * step_y), "white")
    pen = ImageDraw.Draw(page)
    letters = Lettering(pen)
    letters.write((GAP_PX, GAP_PX), "\n".join(header), width_px)
    for place, (caption, pixels) in enumerate(cells):
        left, above = GAP_PX + place % COLUMNS * step_x, top + place // COLUMNS * step_y
        picture = ImageOps.contain(Image.fromarray(pixels), (CELL_PX, CELL_PX), Image.Resampling.BICUBIC)
        page.paste(picture, (left + (CELL_PX - picture.width) // 2, above + CELL_PX - picture.height))
        if place == 0:
            pen.rectangle(
                (left - 4, above - 4, left + CELL_PX + 3, above + CELL_PX + 3), outline=FRAME, width=3
            )
        letters.write((left, above + CELL_PX + 4), caption, CELL_PX)
    return page, letters.escaped


def _cosine(first: Float[np.ndarray, " D"], second: Float[np.ndarray, " D"]) -> float:
    """0 where one of them is 0 everywhere."""
    length = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / length if length else 0.0


def _place(image: NamedImage) -> tuple[str, int]:
    return os.path.realpath(image.path), image.offset
