"""`vitds report RUN …`: a page of one run, or of several beside each other."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich import filesize

from vitds import dist
from vitds.config.load import FREE_ON_RESUME
from vitds.errors import ResourceError, RunError, UsageError
from vitds.jobs.compare import group_of
from vitds.jobs.gallery import Files, gallery
from vitds.report.overview import result, settings_leaves, shown
from vitds.report.page import ResultTable, page_of_experiment, page_of_run, page_of_runs
from vitds.runs.directory import Run, no_run, write_atomic
from vitds.terminal import say

PAGE = "report.html"


def report(run: str, *more: str, out: str | Path | None = None) -> Path:
    """Write the page of a run, or of several beside each other.

    Args:
        run: a finished run directory.
        more: others, to be beside it.
        out: the HTML file; by default report.html in the run, which only one run has.
    Returns: the file.
    Raises: UsageError for a run given twice, or several without `out`; RunError if one cannot be
        read, or has no analysis and none can be made; ResourceError if the file cannot be written.
    """
    opened = [_opened(name) for name in (run, *more)]
    paths = [run.path for run in opened]
    if twice := [path for path in paths if paths.count(path) > 1]:
        raise UsageError(f"{twice[0]} is given {paths.count(twice[0])} times; leave one")
    if out is None and len(opened) > 1:
        raise UsageError("`out` is missing: say where the page of several runs goes, as in `out=page.html`")
    if len(opened) > 1:
        html = page_of_runs(opened, _table(opened))
    else:
        html = page_of_run(opened[0], gallery(opened[0]))
    path = Path(os.path.expanduser(out)) if out is not None else opened[0].path / PAGE
    if not path.parent.is_dir():
        raise ResourceError(f"`out={path}`: there is no folder {path.parent}; make it first")
    _write(path, html)
    return path


def write_experiment_report(
    result: ResultTable, runs: Sequence[str], drawn: Sequence[str], out: Path
) -> None:
    """Write the page of an experiment.

    Args:
        result: on top.
        runs: finished run directories, all of them.
        drawn: those whose curves are shown.
        out: the HTML file.
    """
    table = _table([_opened(name) for name in runs])
    _write(out, page_of_experiment(result, [_opened(name) for name in drawn], table))


def _write(path: Path, html: str) -> None:
    page = html.encode()
    write_atomic(path, page)
    say(f"{path}: {filesize.decimal(len(page))}")


def report_at_end(run: Run, files: Files) -> None:
    """The page of a run that has just finished; rank 0 only.

    A run is complete without it: whatever fails here is said, and nothing else.

    Args:
        run: finished.
        files: its training file, and its test file if there is one.
    """
    if not dist.is_main():
        return
    try:
        _write(run.path / PAGE, page_of_run(run, gallery(run, files)))
    except Exception as error:  # of any library that draws, decodes or projects
        why = " ".join(str(error).split()) or type(error).__name__
        say(f"{run.path / PAGE} was not made ({why}); the run is complete without it")


def _opened(name: str) -> Run:
    """Raises: RunError if there is no finished run."""
    run = Run(Path(os.path.expanduser(name)))
    if not (run.path / "settings.yaml").exists():
        raise no_run(name)
    if not run.is_finished:
        raise RunError(
            f"{name} has no analysis yet, as it is not finished: let the command that started it go on to "
            "its end. Meanwhile `tensorboard --logdir` shows its curves"
        )
    return run


def _table(runs: Sequence[Run]) -> dict[str, Any]:
    """Settings that differ, results, and groups of runs that differ in their seed alone."""
    trees = [settings_leaves(run.settings.model_dump(mode="json")) for run in runs]
    keys = [
        key
        for key in dict.fromkeys(key for tree in trees for key in tree)
        if not key.startswith(FREE_ON_RESUME) and len({shown(tree.get(key)) for tree in trees}) > 1
    ]
    found = [
        (run, result(run.summary), [shown(tree.get(key)) for key in keys])
        for run, tree in zip(runs, trees, strict=True)
    ]
    groups = _groups(keys, trees)
    rows = [
        {
            "name": str(run.path),
            "group": group + 1,
            "values": values,
            "result": score,
            "seconds": run.summary["seconds"],
        }
        for (run, score, values), group in zip(found, groups, strict=True)
    ]
    return {"keys": keys, "rows": rows, "groups": [_mean(rows, group) for group in sorted(set(groups))]}


def _groups(keys: list[str], trees: list[dict[str, Any]]) -> list[int]:
    """The number of each run's group: the seed does not count, nor does that of the run it began from."""
    same = [
        tuple(
            group_of(tree[key]) if key == "init" and tree[key] else shown(tree.get(key))
            for key in keys
            if key != "seed"
        )
        for tree in trees
    ]
    order = list(dict.fromkeys(same))
    return [order.index(each) for each in same]


def _mean(rows: list[dict[str, Any]], group: int) -> dict[str, Any]:
    own = [row for row in rows if row["group"] == group + 1]
    scores = [row["result"] for row in own if row["result"] is not None]
    figures = [score["top1"] for score in scores]
    return {
        "group": group + 1,
        "runs": len(own),
        "what": ", ".join(dict.fromkeys(score["what"] for score in scores)) or "not evaluated",
        "mean": float(np.mean(figures)) if figures else None,
        "deviation": float(np.std(figures, ddof=1)) if len(figures) > 1 else None,
    }
