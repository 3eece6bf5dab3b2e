"""`vitds runs FOLDER`: every run below a folder, how far it is, and what came out."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.table import Table

from vitds.errors import RunError, VitdsError
from vitds.report.overview import result
from vitds.report.table import show
from vitds.runs.directory import Run, write_atomic
from vitds.runs.lock import is_held
from vitds.runs.metrics import last_line
from vitds.terminal import say
from vitds.use.tables import no_formula

COLUMNS = ("run", "state", "method", "backbone", "data", "result", "majority", "seconds")
FIGURES = ("top1", "balanced_accuracy", "macro_f1", "majority")


def list_runs(
    folder: str = "runs", *, to_csv: str | None = None, as_json: bool = False
) -> list[dict[str, Any]]:
    """Print all runs below a folder as a table, or as one JSON object.

    Args:
        folder: is searched at any depth.
        to_csv: a file that gets the same table.
        as_json: print one JSON object and nothing else.
    Returns: a row a run, by path: run, state (finished, running, stopped, not begun, unreadable), step,
        method, backbone, data, result (what the figures are of), top1, top1_interval, balanced_accuracy,
        macro_f1, majority, seconds, problem. None where there is none.
    Raises: RunError if the folder is not there or holds no run; ResourceError if the CSV cannot be written.
    """
    root = Path(folder)
    if not root.is_dir():
        raise RunError(
            f"{folder} is no folder, seen from {Path.cwd()}; name the folder that your runs are in"
        )
    rows = [_row(Run(path)) for path in _run_directories(root)]
    if not rows:
        raise RunError(f"{folder} holds no run directory, at any depth: none has a settings.yaml")
    if to_csv is not None:
        _write_csv(Path(os.path.expanduser(to_csv)), rows)
    if as_json:
        say(json.dumps({"runs": rows}, allow_nan=False))
    else:
        _print(rows)
        if to_csv is not None:
            say(f"{to_csv}: {len(rows)} runs")
    return rows


def _run_directories(root: Path) -> Iterator[Path]:
    """All folders with a settings.yaml, by path. A run may hold others; its own parts are passed over."""
    for folder, below, files in os.walk(root):
        below[:] = sorted(name for name in below if name not in ("checkpoints", "tensorboard", "analysis"))
        if "settings.yaml" in files:
            yield Path(folder)


def _row(run: Run) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(
        (*("run", "state", "step", "method", "backbone", "data", "result"), *FIGURES)
    )
    row |= {"top1_interval": None, "seconds": None, "problem": None, "run": str(run.path)}
    try:
        settings = run.settings
        row |= {
            "method": settings.method,
            "backbone": settings.backbone.name,
            "data": settings.data.train_text,
        }
        line = last_line(run.metrics)
        row["step"] = None if line is None else line["step"] + 1
        row["state"] = _state(run)
        if run.is_finished:
            row |= _result(run.summary)
    except (VitdsError, OSError, KeyError) as error:  # one damaged run hides no other
        row |= {"state": "unreadable", "problem": str(error)}
    return row


def _state(run: Run) -> str:
    if is_held(run.path):
        return "running"
    if run.is_finished:
        return "finished"
    return "stopped" if run.has_begun else "not begun"


def _result(summary: dict[str, Any]) -> dict[str, Any]:
    """The figures of a finished run."""
    found = {"seconds": summary["seconds"]}
    if score := result(summary):  # older runs have fewer figures
        found |= {"result": score["what"], **{key: score.get(key) for key in (*FIGURES, "top1_interval")}}
    return found


def _print(rows: list[dict[str, Any]]) -> None:
    table = Table(box=None, pad_edge=False)
    for column in COLUMNS:
        is_number = column in ("result", "majority", "seconds")
        is_long = column in ("run", "backbone", "data")
        table.add_column(
            column, justify="right" if is_number else "left", overflow="fold", no_wrap=not is_long
        )
    for row in rows:
        table.add_row(*_cells(row))
    show(table)
    for row in rows:
        if row["problem"]:
            say(f"{row['run']}: {row['problem']}")


def _cells(row: dict[str, Any]) -> tuple[str, ...]:
    state = row["state"]
    if state in ("running", "stopped") and row["step"]:
        state += f" at step {row['step']:,}"
    result = "" if row["top1"] is None else f"{row['result']} {row['top1']:.1f} %"
    majority = "" if row["majority"] is None else f"{row['majority']:.1f} %"
    seconds = "" if row["seconds"] is None else f"{row['seconds']:,.0f}"
    data = Path(row["data"] or "").name
    return (row["run"], state, row["method"] or "", row["backbone"] or "", data, result, majority, seconds)


def _write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    text = io.StringIO()
    names = [name for name in rows[0] if name != "top1_interval"]
    writer = csv.DictWriter(text, [*names, "top1_low", "top1_high"], extrasaction="ignore")
    writer.writeheader()
    for row in rows:
        low, high = row["top1_interval"] or (None, None)
        cells = row | {"top1_low": low, "top1_high": high}
        writer.writerow({name: no_formula(value) for name, value in cells.items()})
    write_atomic(path, text.getvalue().encode("utf-8", "backslashreplace"))
