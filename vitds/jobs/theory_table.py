"""The table that `vitds eval theory` prints: a line a figure, a column a model."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vitds.report.table import show
from vitds.terminal import say

# Key of the JSON -> item of docs/theory.md, and the figure in words.
FIGURES = {
    "alignment": ("1", "alignment: distance of two crops"),
    "uniformity": ("1", "uniformity, near -4 at best"),
    "prototype_cosine": ("2", "cosine of row and own feature"),
    "own_row_first": ("2", "own row is the nearest, %"),
    "similarity_pearson": ("3", "similarities kept, Pearson"),
    "similarity_spearman": ("3", "similarities kept, Spearman"),
    "mass_ratio": ("4", "mass on own class over chance"),
    "mass_ratio_largest": ("4", "  the most it could be"),
    "off_target_mass": ("4", "  mass off the image itself"),
    "rows_knn": ("5", "rows alone: kNN, %"),
    "rows_map": ("5", "rows alone: mAP, %"),
    "rows_auc": ("5", "rows alone: AUC"),
    "features_knn": ("5", "features: kNN, %"),
    "features_map": ("5", "features: mAP, %"),
    "features_auc": ("5", "features: AUC"),
    "class_r2": ("6", "R² from classes"),
}


def print_theory(scores: list[dict[str, Any]]) -> None:
    """`blind` is what a figure is where features or rows know nothing, for the first model's images."""
    for number, score in enumerate(scores, 1):
        at = f" at {score['checkpoint']}" if score["checkpoint"] else ""
        of = f"({score['images']:,} images, {score['crops']} crops each)"
        say(f"[{number}] theory of {score['model']}{at} on {score['data']} {of}")
    table = Table(box=None, pad_edge=False)
    for column in ("", "", *(f"[{number}]" for number in range(1, len(scores) + 1)), "blind"):
        # \\[: or rich takes it for a style.
        table.add_column(column.replace("[", r"\["), justify="right" if column else "left", no_wrap=True)
    for key, (item, words) in FIGURES.items():
        values = [score["theory"].get(key) for score in scores]
        if any(value is not None for value in values):
            table.add_row(item, words, *map(_text, [*values, scores[0]["blind"].get(key)]))
    show(table)
    for number, score in enumerate(scores, 1):
        for note in score["notes"]:
            say(f"[{number}] {note}")


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
