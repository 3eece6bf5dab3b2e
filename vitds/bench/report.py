"""Rows of a benchmark as a table, or as one JSON object {"rows": [...]}."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def print_rows(title: str, rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows that all have the keys of the first."""
    if as_json:
        print(json.dumps({"rows": list(rows)}))
        return
    table = Table(title=title)
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(f"{value:,}" if isinstance(value, int | float) else str(value) for value in row.values()))
    Console().print(table)
