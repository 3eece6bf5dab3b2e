"""`vitds checkpoint list|verify RUN`: what a run could go on from."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console
from rich.table import Table

from vitds.errors import RunError
from vitds.runs.checkpoint import list_checkpoints, verify_checkpoint
from vitds.runs.directory import Run, read_json


def list_run(run: str, *, as_json: bool = False) -> list[dict[str, object]]:
    """Print each checkpoint's step, ranks' files and bytes, oldest first.

    Raises: RunError if the run has none.
    """
    rows = []
    for path in _checkpoints(run):
        manifest = read_json(path / "manifest.json")
        size = sum(facts["bytes"] for facts in manifest["files"].values())
        rows.append(
            {"path": str(path), "step": manifest["step"], "files": len(manifest["files"]), "bytes": size}
        )
    _print(rows, as_json)
    return rows


def verify_run(run: str, *, as_json: bool = False) -> list[dict[str, object]]:
    """Hash every file of every checkpoint and print what is wrong.

    Raises: RunError if the run has no checkpoint, or one is damaged (after all were looked at; names the first).
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


def _print(rows: list[dict[str, object]], as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": rows}))
        return
    table = Table()
    for key in rows[0]:
        table.add_column(key, overflow="fold")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int) else str(value) for value in row.values()))
    Console().print(table)
