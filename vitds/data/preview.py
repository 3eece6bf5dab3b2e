"""A labelled grid of pictures: for each image the original with its crops' boxes, each view, and each view as it is trained on."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 128  # at least; smaller crops are enlarged by whole factors, so that pixels stay pixels
GAP_PX, LINE_PX = 8, 14
COLOURS = ((230, 75, 60), (60, 120, 220), (60, 160, 90), (220, 150, 40))  # one a view group
FONT = ImageFont.load_default(LINE_PX - 2)


@dataclass(frozen=True)
class ImagePreview:
    """One image.

    Attributes:
        name: caption of the original. original: (H, W, 3) uint8.
        boxes: (V, 4) top, left, height, width of the crops in the original.
        views, trained: (V, 3, S, S) uint8: as the loader gives them, and after mixing.
        targets: V captions of the mixed views, two lines each.
    """

    name: str
    original: NDArray[np.uint8]
    boxes: NDArray[np.int32]
    views: NDArray[np.uint8]
    trained: NDArray[np.uint8]
    targets: tuple[str, ...]


def draw_preview(
    images: list[ImagePreview], view_names: list[str], groups: list[int], title: str
) -> Image.Image:
    """The grid: two bands an image, the views as cut above the same views as trained on.

    Args:
        view_names: V captions. groups: (V,) number of each view's group, which is its colour.
    """
    side_px = images[0].views.shape[-1]
    cell_px = side_px * max(1, -(-CELL_PX // side_px))
    step_x, step_y = cell_px + GAP_PX, cell_px + 2 * LINE_PX + GAP_PX
    size = (GAP_PX + (len(view_names) + 1) * step_x, GAP_PX + 2 * LINE_PX + 2 * len(images) * step_y)
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    pen.text((GAP_PX, GAP_PX), title, "black", FONT)
    for number, image in enumerate(images):
        top = GAP_PX + 2 * LINE_PX + 2 * number * step_y
        original = _original(image, groups, cell_px)
        page.paste(original, (GAP_PX, top))
        pen.multiline_text((GAP_PX, top + original.height + 1), image.name, "black", FONT, spacing=1)
        pen.multiline_text(
            (GAP_PX, top + step_y), "as trained on,\nwith its targets' weights", "black", FONT, spacing=1
        )
        for band, crops in enumerate((image.views, image.trained)):
            for view, crop in enumerate(crops):
                corner = (GAP_PX + (view + 1) * step_x, top + band * step_y)
                cell = Image.fromarray(np.ascontiguousarray(crop.transpose(1, 2, 0))).resize(
                    (cell_px, cell_px), Image.Resampling.NEAREST
                )
                page.paste(cell, corner)
                edge = (corner[0] - 2, corner[1] - 2, corner[0] + cell_px + 1, corner[1] + cell_px + 1)
                pen.rectangle(edge, outline=COLOURS[groups[view] % len(COLOURS)], width=2)
                caption = image.targets[view] if band else view_names[view]
                pen.multiline_text((corner[0], corner[1] + cell_px + 1), caption, "black", FONT, spacing=1)
    return page


def _original(image: ImagePreview, groups: list[int], cell_px: int) -> Image.Image:
    """The picture, fitted into a cell, with the boxes of its crops."""
    height, width = image.original.shape[:2]
    scale = cell_px / max(height, width)
    picture = Image.fromarray(image.original).resize(
        (max(1, round(width * scale)), max(1, round(height * scale)))
    )
    pen = ImageDraw.Draw(picture)
    for (top, left, box_height, box_width), group in zip(image.boxes.tolist(), groups, strict=True):
        corners = [scale * edge for edge in (left, top, left + box_width, top + box_height)]
        pen.rectangle([*corners[:2], corners[2] - 1, corners[3] - 1], outline=COLOURS[group % len(COLOURS)])
    return picture
