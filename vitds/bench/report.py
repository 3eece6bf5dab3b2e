"""Rows of a benchmark as a table, or as one JSON object {"rows": [...]}."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 120  # at least: in fewer columns numbers would be cut off


def print_rows(title: str, rows: Sequence[dict[str, Any]], *, as_json: bool) -> None:
    """Print rows that all have the keys of the first.

    A name without numbers, which says why there are none, stands below the table.
    """
    if as_json:
        print(json.dumps({"rows": list(rows)}))
        return
    table = Table(title=title, box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    for number, key in enumerate(rows[0]):
        table.add_column(key, justify="right" if number else "left", no_wrap=number > 0)
    below = []
    for name, *numbers in (row.values() for row in rows):
        if all(number is None for number in numbers):
            below.append(name)
        else:
            table.add_row(
                name,
                *(
                    f"{number:,}" if isinstance(number, int | float) else str(number or "-")
                    for number in numbers
                ),
            )
    console = Console(width=max(Console().width, WIDTH), markup=False, emoji=False)
    console.print(table, *below, sep="\n", highlight=False)
