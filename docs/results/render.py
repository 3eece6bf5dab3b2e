"""Write docs/results.md from its template and the rows beside this file: python docs/results/render.py

page.md.jinja is the text. Each NAME.json is a row (vitds/jobs/result_rows.py); add.py writes them. Each
experiments/NAME.json is a whole table; add_experiment.py writes them.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from vitds.jobs.experiment_result import result_columns
from vitds.jobs.result_rows import Row, RowFigure, read_row
from vitds.jobs.transfer import transfer_columns

FOLDER = Path(__file__).parent
EXPERIMENTS = FOLDER / "experiments"
PAGE = FOLDER.parent / "results.md"
ALL_TRAINING = "my-train.beton"  # in the commands: the images that are not held out


def page(folder: Path = FOLDER) -> str:
    """The text of docs/results.md.

    Args:
        folder: of the rows.
    Raises: DataError if a row cannot be read.
    """
    rows = [row for row in map(read_row, sorted(folder.glob("*.json"))) if row.held_out or row.test]

    shown = set()

    def of(name: str) -> list[Row]:
        shown.add(name)
        return [row for row in rows if row.table == name]

    def others() -> list[str]:
        """Tables that no text above speaks of."""
        return sorted({row.table for row in rows} - shown)

    environment = Environment(
        loader=FileSystemLoader(FOLDER), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    text = environment.get_template("page.md.jinja").render(
        table=lambda name, seconds="seconds": _table(of(name), seconds),
        commands=lambda name: "\n".join(_commands(of(name))),
        others=others,
        experiment=_experiment,
    )
    return text.strip() + "\n"


def _table(rows: list[Row], seconds: str) -> str:
    """A row a line; the columns of a split that nothing was measured on are left out."""
    if not rows:
        return "Nothing was run yet."
    splits = [split for split in ("held_out", "test") if any(getattr(row, split) for row in rows)]
    headings = [part for split in splits for part in (f"{split.replace('_', '-')} top-1", "95 %", "seeds")]
    lines = [["", *headings, seconds], ["---"] * (len(headings) + 2)]
    for row in rows:
        cells = [cell for split in splits for cell in _cells(getattr(row, split))]
        took = "" if row.seconds is None else f"{row.seconds:,.0f}"
        lines.append([row.title, *cells, took])
    majority = [_majority([getattr(row, split) for row in rows]) for split in splits]
    lines.append(["always the most frequent class", *(cell for m in majority for cell in (m, "", "")), ""])
    return "\n".join(_line(cells) for cells in lines)


def _experiment(name: str) -> str:
    """An arm a line, or a measure and source, as the command printed them."""
    result = json.loads((EXPERIMENTS / f"{name}.json").read_text("utf-8"))
    columns, rows = (transfer_columns if result["experiment"] == "transfer" else result_columns)(result)
    return "\n".join(_line(cells) for cells in [columns, ["---"] * len(columns), *rows])


def _line(cells: list[str]) -> str:
    if set(cells) == {"---"}:
        return f"|{'|'.join(cells)}|"
    return "|" + "|".join(f" {cell} " if cell else " " for cell in cells) + "|"


def _cells(figure: RowFigure | None) -> list[str]:
    if figure is None:
        return ["", "", ""]
    spread = "" if figure.deviation is None else f" ± {figure.deviation:.1f}"
    low, high = figure.interval
    seeds = str(len(figure.seeds))
    if len(figure.top1) > 1:
        seeds += f": {', '.join(f'{top1:.1f}' for top1 in figure.top1)}"
    return [f"{figure.mean:.1f}{spread} %", f"{low:.1f} to {high:.1f}", seeds]


def _majority(figures: list[RowFigure | None]) -> str:
    return f"{max(figure.majority for figure in figures if figure):.1f} %"


def _commands(rows: list[Row]) -> list[str]:
    """What trains each row, without names of runs but that of the pretraining."""
    lines: list[str] = []
    for row in rows:
        for number, stage in enumerate(row.stages):
            words = ["vitds", stage.command, "--recipe", stage.recipe]
            words += ["--data", stage.data or ALL_TRAINING, "--test", "my-test.beton"]
            words += ["--init", "runs/pre"] if number else []
            words += ["--epochs", str(stage.epochs)]
            words += [word for setting in stage.set for word in ("--set", setting)]
            lines.append(f"    {shlex.join(words)}")
    return list(dict.fromkeys(lines))


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
    print(PAGE)
