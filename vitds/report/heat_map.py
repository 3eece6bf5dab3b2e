"""Matrices of figures as colours, with the figures written on them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

CELL_IN = (1.1, 0.6)  # inches of a cell
DARK = 0.6  # of the range: below, the figure is white on its colour


def draw_heat_maps(
    matrices: Mapping[str, Sequence[Sequence[float]]], rows: Sequence[str], columns: Sequence[str]
) -> bytes:
    """A PNG with a panel a matrix, each over its own range of colours.

    Args:
        matrices: title -> figures, a row a row.
        rows: names.
        columns: names.
    """
    width, height = CELL_IN[0] * len(columns) + 2.5, CELL_IN[1] * len(rows) + 1.2
    figure = Figure(figsize=(width, height * len(matrices)), layout="constrained", dpi=120)
    canvas = FigureCanvasAgg(figure)  # needs no display
    panels = figure.subplots(len(matrices), 1, squeeze=False)[:, 0]
    for panel, (title, values) in zip(panels, matrices.items(), strict=True):
        panel.set_title(f"{title}, top-1 %")
        panel.imshow(values, aspect="auto", cmap="viridis")
        panel.set_xticks(range(len(columns)), columns)
        panel.set_yticks(range(len(rows)), rows)
        low, high = min(map(min, values)), max(map(max, values))
        for i, row in enumerate(values):
            for j, value in enumerate(row):
                is_dark = value < low + DARK * (high - low)
                panel.text(j, i, f"{value:.1f}", ha="center", va="center", color="w" if is_dark else "k")
    picture = io.BytesIO()
    canvas.print_png(picture)
    return picture.getvalue()
