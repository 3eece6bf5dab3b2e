"""A labelled grid of pictures: for each image the original with its crops' boxes, each view, and each view as
it is trained on.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from vitds.data.lettering import LINE_PX, Lettering, wrapped

CELL_PX = 128  # at least; smaller crops are enlarged by whole factors, so that pixels stay pixels
GAP_PX = 8
COLOURS = ((230, 75, 60), (60, 120, 220), (60, 160, 90), (220, 150, 40))  # one a view group


@dataclass(frozen=True)
class ImagePreview:
    """One image.

    Attributes:
        name: caption of the original.
        original: (H, W, 3) uint8.
        boxes: (V, 4) top, left, height, width of the crops in the original.
        views: (V, 3, S, S) uint8, as the loader gives them.
        trained: (V, 3, S, S) uint8, after mixing.
        targets: V captions of the mixed views, two lines each at most.
    """

    name: str
    original: NDArray[np.uint8]
    boxes: NDArray[np.int32]
    views: NDArray[np.uint8]
    trained: NDArray[np.uint8]
    targets: tuple[str, ...]


def draw_preview(
    images: list[ImagePreview], view_names: list[str], groups: list[int], title: str
) -> tuple[Image.Image, set[str]]:
    """The grid: two bands an image, the views as cut above the same views as trained on.

    Args:
        images: at least one.
        view_names: V captions.
        groups: (V,) number of each view's group, which is its colour.
        title: stands above the grid, in as many lines as it needs.
    Returns: the page, and the letters that stand on it as code points, as no font here has them.
    """
    side_px = images[0].views.shape[-1]
    cell_px = side_px * max(1, -(-CELL_PX // side_px))
    step_x, step_y = cell_px + GAP_PX, cell_px + 2 * LINE_PX + GAP_PX
    width_px = GAP_PX + (len(view_names) + 1) * step_x
    header = wrapped(title, width_px - 2 * GAP_PX)
    top = GAP_PX + (len(header) + 1) * LINE_PX
    page = Image.new("RGB", (width_px, top + 2 * len(images) * step_y), "white")
    pen = ImageDraw.Draw(page)
    letters = Lettering(pen)
    letters.write((GAP_PX, GAP_PX), "\n".join(header), width_px)
    for image in images:
        original = boxed_original(image, groups, cell_px)
        page.paste(original, (GAP_PX, top))
        letters.write((GAP_PX, top + original.height + 1), image.name, cell_px)
        letters.write((GAP_PX, top + step_y), "as trained on, with\nits targets' weights", cell_px)
        for band, crops in enumerate((image.views, image.trained)):
            for view, crop in enumerate(crops):
                left, above = GAP_PX + (view + 1) * step_x, top + band * step_y
                cell = Image.fromarray(np.ascontiguousarray(crop.transpose(1, 2, 0)))
                page.paste(cell.resize((cell_px, cell_px), Image.Resampling.NEAREST), (left, above))
                edge = (left - 2, above - 2, left + cell_px + 1, above + cell_px + 1)
                pen.rectangle(edge, outline=COLOURS[groups[view] % len(COLOURS)], width=2)
                caption = image.targets[view] if band else view_names[view]
                letters.write((left, above + cell_px + 1), caption, cell_px)
        top += 2 * step_y
    return page, letters.escaped


def boxed_original(image: ImagePreview, groups: list[int], cell_px: int) -> Image.Image:
    """The picture, fitted into a cell, with the boxes of its crops."""
    height, width = image.original.shape[:2]
    scale = cell_px / max(height, width)
    picture = Image.fromarray(image.original).resize(
        (max(1, round(width * scale)), max(1, round(height * scale)))
    )
    pen = ImageDraw.Draw(picture)
    for (top, left, box_height, box_width), group in zip(image.boxes.tolist(), groups, strict=True):
        corners = [scale * edge for edge in (left, top, left + box_width, top + box_height)]
        # Pillow refuses a corner beyond its opposite, as a box of less than a pixel of the cell would have
        # it.
        far = (max(corners[0], corners[2] - 1), max(corners[1], corners[3] - 1))
        pen.rectangle([*corners[:2], *far], outline=COLOURS[group % len(COLOURS)])
    return picture
