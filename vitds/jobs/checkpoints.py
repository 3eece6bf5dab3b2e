"""`vitds checkpoint list|verify|prune RUN`: what a run could go on from, and what of it may go."""

from __future__ import annotations

import json
from pathlib import Path

from rich.table import Table

from vitds.errors import RunError, UsageError
from vitds.report.table import show
from vitds.runs.checkpoint import list_checkpoints, prune, verify_checkpoint
from vitds.runs.directory import Run, read_json
from vitds.runs.lock import RunLock
from vitds.terminal import say


def list_run(run: str, *, as_json: bool = False) -> list[dict[str, object]]:
    """Print each checkpoint's step, ranks' files and bytes, oldest first; what is wrong with its manifest.

    Args:
        run: the run directory.
        as_json: print one JSON object and nothing else.
    Raises: RunError if the run has none.
    """
    rows = [{"path": str(path), **_facts(path / "manifest.json")} for path in _checkpoints(run)]
    _print(rows, as_json)
    return rows


def prune_run(run: str, *, keep: int, as_json: bool = False) -> list[dict[str, object]]:
    """Remove a run's checkpoints but the newest sound ones, and print what stays and what went.

    Args:
        run: the run directory.
        keep: how many stay.
        as_json: print one JSON object and nothing else.
    Raises: UsageError for less than one; RunError if the run has no checkpoint or no sound one;
        RunLockedError while it trains.
    """
    if keep < 1:
        raise UsageError(f"--keep {keep}: must be 1 or more, for a run goes on from its newest checkpoint")
    sizes = {path: _bytes(path) for path in _checkpoints(run)}
    lock = RunLock(Path(run))
    try:
        kept, removed = prune(Run(Path(run)).checkpoints, keep)
    finally:
        lock.release()
    states = dict.fromkeys(kept, "kept") | dict.fromkeys(removed, "removed")
    rows = [{"path": str(path), "state": states[path], "bytes": size} for path, size in sizes.items()]
    _print(rows, as_json)
    return rows


def verify_run(run: str, *, as_json: bool = False) -> list[dict[str, object]]:
    """Hash every file of every checkpoint and print what is wrong.

    Args:
        run: the run directory.
        as_json: print one JSON object and nothing else.
    Raises: RunError if the run has no checkpoint, or one is damaged (after all were looked at; names the
        first).
    """
    rows, first = [], None
    for path in _checkpoints(run):
        try:
            verify_checkpoint(path)
            rows.append({"path": str(path), "state": "sound"})
        except RunError as error:
            rows.append({"path": str(path), "state": str(error)})
            first = first or error
    _print(rows, as_json)
    if first is not None:
        raise first
    return rows


def _checkpoints(run: str) -> list[Path]:
    found = list_checkpoints(Run(Path(run)).checkpoints)
    if not found:
        raise RunError(f"{run} has no checkpoints; is it a run directory?")
    return found


def _facts(path: Path) -> dict[str, object]:
    try:
        manifest = read_json(path)
        step, files = manifest["step"], manifest["files"].values()
        return {
            "step": step,
            "files": len(files),
            "bytes": sum(each["bytes"] for each in files),
            "problem": "",
        }
    except RunError as error:
        problem = str(error)
    except (KeyError, TypeError, AttributeError):
        problem = f"{path} lacks the step, or the files with their bytes: damaged"
    return {"step": None, "files": None, "bytes": None, "problem": problem}


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.iterdir())


def _print(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        say(json.dumps({"rows": rows}))
        return
    table = Table()
    keys = [key for key in rows[0] if any(row[key] not in (None, "") for row in rows)]
    for key in keys:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(
            *(f"{row[key]:,}" if isinstance(row[key], int) else str(row[key] or "") for key in keys)
        )
    show(table)
