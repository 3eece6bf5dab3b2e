"""Lines over an axis as inline SVG, drawn by the page's own style sheet: sharp at any size, light and dark.

matplotlib's SVG would bring its letters as shapes and fixed colours; here lines differ in dash and marker as
well, and the words are words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite

import numpy as np
from markupsafe import Markup

WIDTH, HEIGHT = 360, 210
LEFT, RIGHT, TOP, BOTTOM = 54, 12, 10, 40
MARKED = 30  # points; more of them would touch
MARKERS = (
    "M-3 0a3 3 0 1 0 6 0a3 3 0 1 0-6 0z",
    "M-3-3h6v6h-6z",
    "M0-4l4 7h-8z",
    "M-4 0l4-4 4 4-4 4z",
    "M0 4l4-7h-8z",
    "M-3-3l6 6m0-6l-6 6",
)


@dataclass(frozen=True)
class Line:
    """A line: its name in the legend, and y over x; None leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Those that are there."""
        return [(x, y) for x, y in zip(self.x, self.y, strict=True) if y is not None and isfinite(y)]


def chart(title: str, x_name: str, lines: Sequence[Line], *, square: bool = False) -> Markup:
    """An SVG with one y axis.

    Args:
        title: what a screen reader says before the lines' summary.
        x_name: under the axis.
        lines: at least one has a point.
        square: both axes go from 0 to 100, in percent.
    """
    points = [point for line in lines for point in line.points]
    x_low, x_high = (0.0, 100.0) if square else _range([x for x, _ in points])
    y_low, y_high = (0.0, 100.0) if square else _range([y for _, y in points])
    x_ticks, y_ticks = _ticks(x_low, x_high, 5), _ticks(y_low, y_high, 4)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def at(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_low) / (y_high - y_low)
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    parts = [
        Markup('<path class="grid" d="M{} {}H{}"/><text x="{}" y="{}" class="y">{}</text>').format(
            LEFT, at(x_low, y)[1], WIDTH - RIGHT, LEFT - 6, at(x_low, y)[1] + 4, number(y)
        )
        for y in y_ticks
    ]
    parts += [
        Markup('<text x="{}" y="{}" class="x">{}</text>').format(
            at(x, y_low)[0], HEIGHT - BOTTOM + 16, number(x)
        )
        for x in x_ticks
        if x_low <= x <= x_high
    ]
    parts.append(
        Markup('<text x="{}" y="{}" class="x">{}</text>').format(
            (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 5, x_name
        )
    )
    for order, line in enumerate(lines):
        parts.append(_drawn(line, order, at, alone=len(lines) == 1))
    said = "; ".join(filter(None, (summary(line, named=len(lines) > 1) for line in lines)))
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        WIDTH, HEIGHT, f"{title}: {said}", Markup().join(parts)
    )


def legend_mark(order: int) -> Markup:
    """A piece of a line as it is drawn, for the legend."""
    return Markup(
        '<svg class="key" viewBox="0 0 40 12" aria-hidden="true"><path class="line l{0}" d="M1 6H39"/>'
        '<path class="mark l{0}" transform="translate(20 6)" d="{1}"/></svg>'
    ).format(order % len(MARKERS), MARKERS[order % len(MARKERS)])


def summary(line: Line, *, named: bool) -> str:
    """A line in words: where it begins and ends, its lowest and highest."""
    values = [y for _, y in line.points]
    if not values:
        return ""
    words = f"{number(values[0])} to {number(values[-1])}, lowest {number(min(values))}, highest "
    return (f"{line.name}: " if named else "") + words + number(max(values))


def number(value: float) -> str:
    """As short as four digits need."""
    if value == 0:
        return "0"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}".replace("e-0", "e-")


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:  # one point, or a constant
        space = abs(low) / 2 or 1.0
        return low - space, high + space
    return low, high


def _ticks(low: float, high: float, most: int) -> list[float]:
    from matplotlib.ticker import MaxNLocator  # at the top it costs every start 0.4 s

    return [float(tick) for tick in MaxNLocator(most, steps=[1, 2, 5, 10]).tick_values(low, high)]


def _drawn(
    line: Line, order: int, at: Callable[[float, float], tuple[float, float]], *, alone: bool
) -> Markup:
    style = order % len(MARKERS)
    pieces, begins = [], True
    for x, y in zip(line.x, line.y, strict=True):
        if y is None or not isfinite(y):
            begins = True
            continue
        pieces.append("{}{} {}".format("M" if begins else "L", *at(x, y)))
        begins = False
    points = line.points
    if len(points) > MARKED:
        # A few points of a long line carry its marker, so that lines differ by more than colour.
        points = [] if alone else [points[i] for i in np.linspace(0, len(points) - 1, 6, dtype=int)]
    marks = [
        Markup('<path class="mark l{}" transform="translate({} {})" d="{}"/>').format(
            style, *at(x, y), MARKERS[style]
        )
        for x, y in points
    ]
    return Markup('<path class="line l{}" d="{}"/>{}').format(style, "".join(pieces), Markup().join(marks))
