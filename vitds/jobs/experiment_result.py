"""What came out of an experiment: one table, the same as JSON and CSV, and a page."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from vitds.jobs.compare import compared, group_of
from vitds.jobs.evaluate import evaluated
from vitds.jobs.experiment import Arm, Experiment, Json
from vitds.jobs.report import PAGE, write_experiment_report
from vitds.report.overview import KNN_K
from vitds.report.page import ResultTable
from vitds.report.table import show
from vitds.runs.directory import Run, read_json, write_atomic, write_json
from vitds.terminal import say
from vitds.use.tables import no_formula

ABOUT = (
    f"Top-1 on the test images in percent (kNN: k = {KNN_K}): mean and deviation over seeds, and the 95 % "
    "interval of the mean by the bootstrap over test images, in which the spread over seeds is not. Forward "
    "units and seconds are of one seed."
)


@dataclass(frozen=True)
class Measure:
    """One column of figures.

    Attributes:
        key: in the JSON.
        title: of the column.
        kind: of `vitds eval`.
        training: the name of the runs that are measured.
    """

    key: str
    title: str
    kind: str
    training: str


KNN = Measure("knn", "kNN", "knn", "pretrain")
LINEAR = Measure("linear", "linear", "linear", "pretrain")
FINETUNED = Measure("finetuned", "fine-tuned", "top1", "finetune")


def figures(
    kind: str, models: Mapping[str, Sequence[str]], data: str | None = None, bank: str | None = None
) -> dict[str, Json]:
    """One measure of every arm.

    Args:
        kind: of `vitds eval`.
        models: title of an arm -> its runs, whose names differ in their seed alone.
        data: see `evaluate`.
        bank: likewise.
    Returns: by title: `mean`, `deviation` (None of one run), `interval` of the mean, `runs` with `top1` and
        `interval`, `difference` to the first arm with its paired `interval` (None of the first).
    """
    found = {
        title: [evaluated(kind, run, data, bank, knn_k=(int(KNN_K),)) for run in runs]
        for title, runs in models.items()
    }
    all_of_them = [each for evaluations in found.values() for each in evaluations]
    if not all_of_them:
        return {}
    chosen = f"k = {KNN_K}" if kind == KNN.kind else all_of_them[0].lines[0].name
    beside = compared(kind, all_of_them)
    groups = {row["group"]: row for row in beside["groups"] if row["line"] == chosen}
    differences = {row["group"]: row for row in beside["differences"] if row["line"] == chosen}
    return {
        title: {key: groups[group_of(models[title][0])][key] for key in ("mean", "deviation", "interval")}
        | {
            "runs": [
                {
                    "run": each.score["model"],
                    "top1": line.numbers["top1"],
                    "interval": list(line.numbers["top1_interval"]),
                }
                for each in evaluations
                for line in each.lines
                if line.name == chosen
            ],
            "difference": differences.get(group_of(models[title][0])),
        }
        for title, evaluations in found.items()
    }


def result_of(experiment: Experiment, measures: Sequence[Measure]) -> Json:
    """Evaluate all arms; of an experiment that was evaluated before, what was found then.

    Returns: what OUT/KIND.json holds.
    """
    path = experiment.out / f"{experiment.kind}.json"
    if path.exists() and (before := read_json(path)).get("seeds") == experiment.seeds:
        return before
    found = {measure.key: figures(measure.kind, experiment.runs(measure.training)) for measure in measures}
    result = {
        "experiment": experiment.kind,
        "asked": dict(experiment.asked),
        "seeds": experiment.seeds,
        "measures": {measure.key: measure.title for measure in measures},
        "arms": [
            _costs(experiment, arm) | {key: of_arm.get(arm.title) for key, of_arm in found.items()}
            for arm in experiment.arms
        ],
    }
    write_json(path, result)
    return result


def _costs(experiment: Experiment, arm: Arm) -> Json:
    """What each training of an arm took."""
    trainings = []
    for training in arm.trainings:
        runs = [Run(experiment.run(arm, training, seed)) for seed in range(experiment.seeds)]
        trainings.append(
            {
                "name": training.name,
                "epochs": training.settings.epochs,
                "steps": training.steps,
                "forward_units": round(training.units, 1),
                "seconds": [run.summary["seconds"] for run in runs],
            }
        )
    return {"arm": arm.title, "trainings": trainings}


def report(
    experiment: Experiment,
    result: Json,
    title: str,
    *,
    notes: Sequence[str] = (),
    published: Sequence[float] = (),
) -> None:
    """Print the table; write the CSV and the page beside the JSON.

    Args:
        experiment: finished.
        result: of result_of.
        title: of table and page.
        notes: lines below the table.
        published: figures of others, of each arm, for a column of their own.
    """
    columns, rows = result_columns(result)
    if published:
        columns.append("published %")
        rows = [[*row, f"{figure:.1f}"] for row, figure in zip(rows, published, strict=True)]
    caption = f"{result['seeds']} seed{'s' * (result['seeds'] != 1)}"
    table = ResultTable(title, caption, columns, rows, (ABOUT, *notes))
    print_table(table)
    _write_csv(experiment, result)
    runs = [str(stage.run) for stage in experiment.stages]
    drawn = [run for run in runs if run.endswith("-seed0")]
    say(f"{experiment.out / experiment.kind}.json, .csv")
    write_experiment_report(table, runs, drawn, experiment.out / PAGE)


def result_columns(result: Json) -> tuple[list[str], list[list[str]]]:
    """The result as text: headings, and a row an arm."""
    measures = result["measures"]
    *_, last = measures
    columns = ["arm"]
    columns += [f"{heading} %" for heading in measures.values()]
    is_one = len(result["arms"]) == 1
    columns += [*([] if is_one else ["minus the first"]), "epochs", "units", "seconds"]
    rows = []
    for arm in result["arms"]:
        row = [arm["arm"], *(figure_text(arm[key]) for key in measures)]
        row += [] if is_one else [_difference(arm[last])]
        trainings = arm["trainings"]
        row.append(" + ".join(str(each["epochs"]) for each in trainings))
        row.append(f"{sum(each['forward_units'] for each in trainings):,.0f}")
        row.append(f"{sum(sum(each['seconds']) / len(each['seconds']) for each in trainings):,.0f}")
        rows.append(row)
    return columns, rows


def figure_text(found: Json | None) -> str:
    """`79.9 ± 0.4 (78.8 to 80.9)`; a dash for what an arm does not have."""
    if found is None:
        return "-"
    spread = "" if found["deviation"] is None else f" ± {found['deviation']:.1f}"
    low, high = found["interval"]
    return f"{found['mean']:.1f}{spread} ({low:.1f} to {high:.1f})"


def _difference(found: Json | None) -> str:
    if found is None or found["difference"] is None:
        return ""
    low, high = found["difference"]["interval"]
    return f"{found['difference']['difference']:+.1f} ({low:+.1f} to {high:+.1f})"


def print_table(table: ResultTable) -> None:
    """On standard output, with its notes."""
    say(f"{table.title} ({table.caption})")
    drawn = Table(box=None, pad_edge=False)
    shown = [place for place, column in enumerate(table.columns) if column != "epochs"]  # the plan has them
    for place in shown:
        is_name = place == 0
        drawn.add_column(
            table.columns[place], justify="left" if is_name else "right", min_width=10 if is_name else 6
        )
    for row in table.rows:
        drawn.add_row(*(row[place].replace(" (", "\n(") for place in shown))  # an interval below its figure
    show(drawn)
    for note in table.notes:
        say(note)


def _write_csv(experiment: Experiment, result: Json) -> None:
    """A row an arm and seed."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    figures = [f"{key}{end}" for key in result["measures"] for end in ("_top1", "_low", "_high")]
    table.writerow(["arm", "seed", *figures, "epochs", "forward_units", "seconds"])
    for arm in result["arms"]:
        trainings = arm["trainings"]
        for seed in range(result["seeds"]):
            row: list[Any] = [no_formula(arm["arm"]), seed]
            for key in result["measures"]:
                run = arm[key] and arm[key]["runs"][seed]
                row += [run["top1"], *run["interval"]] if run else ["", "", ""]
            row.append("+".join(str(each["epochs"]) for each in trainings))
            row.append(round(sum(each["forward_units"] for each in trainings), 1))
            table.writerow([*row, round(sum(each["seconds"][seed] for each in trainings), 1)])
    path = experiment.out / f"{experiment.kind}.csv"
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
