"""The map of a run's features as inline SVG: a mark an image, its class by shape and colour."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup

from vitds.report.lines import MARKERS

SIDE, MARGIN = 700, 14
SHAPES = MARKERS[:5]  # those that can be hollow
COLOURS = 8  # of page.css
MOST_NAMED = 20  # classes; more names would cover the map
NEAREST = 10


def scatter(found: dict[str, Any]) -> tuple[Markup, dict[str, Any]]:
    """The drawing, and what the page's script reads of it.

    Args:
        found: of jobs/gallery.py: x and y in 0..1, label, predicted, name, classes.
    """
    x, y = (
        np.round(MARGIN + np.array(found[key]) * (SIDE - 2 * MARGIN)).astype(int).tolist() for key in "xy"
    )
    labels, predicted, classes = found["label"], found["predicted"], found["classes"]
    shapes = Markup().join(
        Markup('<path id="m{}" d="{}"/>').format(number, shape) for number, shape in enumerate(SHAPES)
    )
    marks = Markup().join(
        Markup('<use href="#m{}" x="{}" y="{}" style="color:var(--c{})"{}/>').format(
            label % len(SHAPES),
            x[i],
            y[i],
            label % COLOURS,
            Markup(' class="w"') if predicted is not None and predicted[i] != label else "",
        )
        for i, label in enumerate(labels)
    )
    names = _class_names(np.array(x), np.array(y), np.array(labels), classes)
    drawing = Markup(
        '<svg id="scatter" viewBox="0 0 {0} {0}" tabindex="0" role="application" aria-roledescription="map" '
        'aria-label="Map of {1} images. Arrow keys go from image to image." aria-describedby="said">'
        '<defs>{2}</defs>{3}{4}<circle id="ring" r="9" visibility="hidden"/></svg>'
    ).format(SIDE, len(x), shapes, marks, names)
    points = {key: found[key] for key in ("label", "predicted", "name", "classes", "columns")}
    return drawing, points | {"x": x, "y": y, "side": SIDE}


def class_marks(found: dict[str, Any]) -> list[tuple[Markup, str]]:
    """Each class's mark and name, for the legend; none of many classes."""
    if len(found["classes"]) > MOST_NAMED:
        return []
    mark = Markup(
        '<svg class="key" viewBox="-12 -5 24 10" aria-hidden="true"><path style="fill:var(--c{})" d="{}"/>'
        "</svg>"
    )
    return [
        (mark.format(number % COLOURS, SHAPES[number % len(SHAPES)]), name)
        for number, name in enumerate(found["classes"])
    ]


def together(found: dict[str, Any]) -> float | None:
    """Percent of each labelled image's NEAREST on the map that are of its class."""
    label = np.array(found["label"])
    if (label < 0).any() or len(label) <= NEAREST:
        return None
    at = np.stack([found["x"], found["y"]], 1)
    apart = ((at[:, None] - at[None]) ** 2).sum(2)
    np.fill_diagonal(apart, np.inf)
    near = np.argpartition(apart, NEAREST, axis=1)[:, :NEAREST]
    return float(100 * (label[near] == label[:, None]).mean())


def _class_names(x: np.ndarray, y: np.ndarray, label: np.ndarray, classes: list[str]) -> Markup:
    """Each class's name at the image of it that is nearest to the middle of all, where no other name is."""
    if not 0 < len(classes) <= MOST_NAMED:
        return Markup()
    parts: list[Markup] = []
    taken: list[tuple[int, int, int]] = []
    for number, name in enumerate(classes):
        own = np.flatnonzero(label == number)
        if not len(own):
            continue
        middle = own[((x[own] - np.median(x[own])) ** 2 + (y[own] - np.median(y[own])) ** 2).argmin()]
        text, left, top = name[:24], int(x[middle]), int(y[middle]) - 8
        half = 5 * len(text)
        if all(abs(left - a) > half + b or abs(top - c) > 18 for a, b, c in taken):
            taken.append((left, half, top))
            parts.append(Markup('<text x="{}" y="{}">{}</text>').format(left, top, text))
    return Markup().join(parts)
