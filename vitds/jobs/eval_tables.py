"""The tables that `vitds eval` prints."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from vitds.jobs.compare import Evaluation
from vitds.report.table import show
from vitds.terminal import say

MANY_CLASSES = 20  # of more, the worst WORST_CLASSES are printed
WORST_CLASSES = 10
WORST_CONFUSIONS = 5
# Key of the JSON -> column of the table.
COLUMNS = {
    "top1": "top-1 %",
    "top1_deviation": "deviation",
    "top1_interval": "95 % interval",
    "map": "mAP %",
    "map_interval": "95 % interval",
    "recall": "recall at",
    "top5": "top-5 %",
    "balanced_accuracy": "balanced",
    "macro_f1": "macro-F1",
    "ece": "ECE",
    "majority": "majority",
}


def print_evaluation(evaluation: Evaluation) -> None:
    """The figures, the classes (of many, the worst), the most frequent confusions."""
    score, lines = evaluation.score, evaluation.lines
    kind = score["kind"]
    keys = [key for key in COLUMNS if key in lines[0].numbers]
    say(f"{kind} of {score['model']} on {score['data']} ({score['images']:,} images), in percent")
    table = Table(box=None, pad_edge=False)
    for column in ("", *(COLUMNS[key] for key in keys)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for line in lines:
        table.add_row(line.name or kind, *(_text(line.numbers[key]) for key in keys))
    show(table)
    if "per_class" in score:
        _print_classes(score["per_class"])
    if "confusion" in score:
        _print_confusions(score["confusion"], score["classes"])
    for note in score["notes"]:
        say(note)


def print_comparison(result: dict[str, Any]) -> None:
    """A row a group, and one a difference."""
    say(f"{result['kind']}: mean and deviation over the runs of a group, in percent")
    table = Table(box=None, pad_edge=False)
    columns = ("group", "", "runs", "figure", "mean", "deviation", "balanced", "macro-F1", "majority")
    for number, column in enumerate(columns):
        # The group's name gives way where the terminal is narrow, not the figures.
        table.add_column(
            column, justify="right" if number > 1 else "left", overflow="fold", no_wrap=number > 0
        )
    for row in result["groups"]:
        figures = (row.get(key) for key in ("mean", "deviation", "balanced_accuracy", "macro_f1", "majority"))
        table.add_row(
            row["group"],
            row["line"],
            str(len(row["models"])),
            COLUMNS[row["figure"]].removesuffix(" %"),
            *map(_text, figures),
        )
    show(table)
    for row in result["differences"]:
        line = f" ({row['line']})" if row["line"] else ""
        low, high = row["interval"]
        say(
            f"{row['group']} minus {row['minus']}{line}: {row['difference']:+.2f} points of "
            f"{COLUMNS[row['figure']].removesuffix(' %')}, 95 % interval {low:+.2f} to {high:+.2f}, paired "
            "over images"
        )
    for note in result["notes"]:
        say(note)


def _print_classes(rows: list[dict[str, Any]]) -> None:
    by = "recall" if "recall" in rows[0] else "map"
    shown, title = rows, "\neach class"
    if len(rows) > MANY_CLASSES:
        known = [row for row in rows if row[by] is not None]
        shown = sorted(known, key=lambda row: row[by])[:WORST_CLASSES]
        title = f"\nthe {len(shown)} worst of {len(rows)} classes"
    say(title)
    table = Table(box=None, pad_edge=False)
    for key in rows[0]:
        is_share = key in ("recall", "precision", "f1", "map")
        table.add_column(f"{key} %" if is_share else key, justify="left" if key == "class" else "right")
    for row in shown:
        table.add_row(row["class"], *(_text(value) for key, value in row.items() if key != "class"))
    show(table)


def _print_confusions(triples: list[tuple[int, int, int]], names: list[str]) -> None:
    wrong = sorted((triple for triple in triples if triple[0] != triple[1]), key=lambda each: -each[2])
    for right, predicted, images in wrong[:WORST_CONFUSIONS]:
        say(f"{images} of class {names[right]!r} were taken for {names[predicted]!r}")


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, dict):  # recall at k
        return ", ".join(f"{k}: {share:.2f}" for k, share in value.items())
    if isinstance(value, list | tuple):
        return " to ".join(f"{end:.1f}" for end in value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.2f}"
