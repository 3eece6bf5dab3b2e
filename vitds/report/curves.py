"""metrics.jsonl as charts: every metric on an axis of its own, long runs thinned, several runs over one
another.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from vitds.report.lines import Line, chart, number
from vitds.runs.directory import Run
from vitds.runs.metrics import read_metrics

MOST_POINTS = 300
ROWS = 8  # of the table beside a chart

# Groups of charts; key of metrics.jsonl -> title and what it says.
GROUPS: dict[str, dict[str, tuple[str, str]]] = {
    "Losses and rate": {
        r"loss": ("Loss", "the sum of all terms, of mixed and smoothed targets"),
        r"loss/(.+)": ("Loss term: {}", "a part of the loss"),
        r"lr": ("Learning rate", "warm-up, then a cosine to 0"),
        r"grad_norm": ("Gradient norm", "before any clipping"),
    },
    "Accuracy along training": {
        r"probe/knn(\d+)_top1": (
            "kNN, k = {} (%)",
            "test images that their nearest training images name rightly",
        ),
        r"probe/instance_top1": ("Instance accuracy (%)", "crops that are recognised as their own image"),
        r"probe/top1": ("Top-1 (%)", "by the class head that trains"),
        r"probe/balanced_accuracy": ("Balanced accuracy (%)", "mean over the classes"),
        r"probe/macro_f1": ("Macro-F1 (%)", "mean over the classes"),
    },
    "Features": {
        r"probe/alignment": ("Alignment", "distance of two crops of an image; lower is closer"),
        r"probe/uniformity": ("Uniformity", "lower is more evenly spread; 0 is a collapse"),
        r"probe/rankme": ("RankMe", "directions that the features use; 1 is a collapse"),
        r"probe/rankme_centred": ("RankMe, centred", "the same without the features' mean"),
    },
    "Speed": {
        r"time/images_per_s": ("Images a second", "of all ranks"),
        r"time/data_s": ("Waiting for data (s)", "seconds of a step in which nothing could be computed"),
    },
}


@dataclass(frozen=True)
class Chart:
    """One metric: heading, explanation, drawing, and some of its numbers as rows of a table."""

    title: str
    about: str
    svg: Markup
    names: list[str]
    rows: list[list[str]]


def charts(runs: Sequence[Run], names: Sequence[str]) -> dict[str, list[Chart]]:
    """The charts by group; a group without a metric is left out.

    Args:
        runs: whose metrics are read.
        names: of the runs, in the legend.
    """
    metrics = [_columns(read_metrics(run.metrics)) for run in runs]
    keys = sorted({key for columns in metrics for key in columns}, key=_natural)
    terms = [key for key in keys if key.startswith("loss/")]
    keys = [key for key in keys if key not in terms or len(terms) > 1]  # one term alone is the loss
    found: dict[str, list[Chart]] = {}
    for group, patterns in GROUPS.items():
        for pattern, (title, about) in patterns.items():
            for key in keys:
                if match := re.fullmatch(pattern, key):
                    # The place of a run decides how its line looks, in every chart.
                    lines = [
                        Line(name, *columns.get(key, ((), ())))
                        for name, columns in zip(names, metrics, strict=True)
                    ]
                    if any(line.points for line in lines):
                        found.setdefault(group, []).append(
                            _chart(title.format(*match.groups()), about, lines)
                        )
    return found


def _natural(key: str) -> list[Any]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", key)]


def _chart(title: str, about: str, lines: list[Line]) -> Chart:
    longest = max(lines, key=lambda line: len(line.points))
    shown = sorted({x for x, _ in _some(longest.points)})
    rows = []
    for x in shown:
        near = [min(line.points, key=lambda point: abs(point[0] - x), default=None) for line in lines]
        rows.append([number(round(x, 2)), *("-" if point is None else number(point[1]) for point in near)])
    return Chart(title, about, chart(title, "epochs", lines), [line.name for line in lines], rows)


def _some(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    places = np.unique(np.linspace(0, len(points) - 1, min(len(points), ROWS), dtype=int))
    return [points[place] for place in places]


def _columns(lines: list[dict[str, Any]]) -> dict[str, tuple[list[float], list[float | None]]]:
    """For each key the epochs and the values, thinned."""
    if not lines:
        return {}
    per_epoch = next((line["step"] for line in lines if line["epoch"] > 0), len(lines))
    epochs = np.array([(line["step"] + 1) / max(per_epoch, 1) for line in lines])
    keys = {key for line in lines for key in line if key not in ("step", "epoch")}
    return {key: _thinned(epochs, [line.get(key) for line in lines], key) for key in keys}


def _thinned(epochs: np.ndarray, values: list[Any], key: str) -> tuple[list[float], list[float | None]]:
    """At most MOST_POINTS, each the mean of the steps around it; what is not measured at every step loses the
    gaps.
    """
    y = np.array([np.nan if value is None else value for value in values], np.float64)
    if key.startswith("probe/"):
        epochs, y = epochs[~np.isnan(y)], y[~np.isnan(y)]
    if not len(y):
        return [], []
    x_parts, y_parts = (np.array_split(column, min(MOST_POINTS, len(y))) for column in (epochs, y))
    means = [float(part[~np.isnan(part)].mean()) if (~np.isnan(part)).any() else None for part in y_parts]
    return [float(part.mean()) for part in x_parts], means
