"""What `vitds eval theory` left in RUN/analysis: a table with a column a checkpoint, and curves over them."""

from __future__ import annotations

from typing import Any

from markupsafe import Markup

from vitds.report.lines import Line, chart, number
from vitds.runs.directory import Run, read_json

Json = dict[str, Any]
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


def figure_rows(scores: list[Json]) -> list[tuple[str, str, list[float | None]]]:
    """Of each figure that was measured the item, the words and the values: one a score, and at the end the
    blind one, which is of the first score's images: what the figure is where nothing was learned.
    """
    rows = []
    for key, (item, words) in FIGURES.items():
        values = [score["theory"].get(key) for score in scores]
        if any(value is not None for value in values):
            rows.append((item, words, [*values, scores[0]["blind"].get(key)]))
    return rows


def value_text(value: float | None) -> str:
    """A figure in a table."""
    return "-" if value is None else f"{value:.3f}"


def theory_of_run(run: Run) -> Json | None:
    """The section of the page; None where nothing was measured.

    Args:
        run: finished.
    Returns: `images`, `crops`, `columns`, `rows` (item, words, texts), `notes`, and `charts` (title, svg,
        whether there is a blind line) of the figures that change from one checkpoint to another.
    Raises: RunError if a file of the analysis cannot be read.
    """
    analysis, summary = run.path / "analysis", run.summary
    files = [*analysis.glob("step-*/theory.json"), *analysis.glob("theory.json")]
    # By checkpoint, for the run's own figures are those of its newest one.
    by_step = {_step(score, summary): score for score in map(read_json, files)}
    if not by_step:
        return None
    steps = sorted(by_step)
    scores = [by_step[step] for step in steps]
    epochs = [step * summary["epochs"] / summary["steps"] for step in steps]
    rows = figure_rows(scores)
    return {
        "images": scores[-1]["images"],
        "crops": scores[-1]["crops"],
        "columns": [f"epoch {number(round(epoch, 2))}" for epoch in epochs],
        "rows": [(item, words.strip(), list(map(value_text, values))) for item, words, values in rows],
        "notes": list(dict.fromkeys(note for score in scores for note in score["notes"])),
        "charts": [
            (words.strip(), _curve(words.strip(), epochs, values), values[-1] is not None)
            for _, words, values in rows
            if len(set(values[:-1]) - {None}) > 1
        ],
    }


def _step(score: Json, summary: Json) -> int:
    """After which the figures were taken; the last one of a run that keeps no checkpoint."""
    return int(score["checkpoint"].removeprefix("step-")) if score["checkpoint"] else summary["steps"]


def _curve(title: str, epochs: list[float], values: list[float | None]) -> Markup:
    *measured, blind = values
    lines = [Line("measured", epochs, measured)]
    if blind is not None:
        lines.append(Line("blind", epochs, [blind] * len(epochs)))
    return chart(title, "epochs", lines)
