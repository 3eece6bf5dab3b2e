"""The table that `vitds eval theory` prints: a line a figure, a column a model."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vitds.report.table import show
from vitds.report.theory import figure_rows, value_text
from vitds.terminal import say


def print_theory(scores: list[dict[str, Any]]) -> None:
    """What was measured of which model, its figures beside the blind ones, and the notes."""
    for number, score in enumerate(scores, 1):
        at = f" at {score['checkpoint']}" if score["checkpoint"] else ""
        of = f"({score['images']:,} images, {score['crops']} crops each)"
        say(f"[{number}] theory of {score['model']}{at} on {score['data']} {of}")
    table = Table(box=None, pad_edge=False)
    for column in ("", "", *(f"[{number}]" for number in range(1, len(scores) + 1)), "blind"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for item, words, values in figure_rows(scores):
        table.add_row(item, words, *map(value_text, values))
    show(table)
    for number, score in enumerate(scores, 1):
        for note in score["notes"]:
            say(f"[{number}] {note}")
