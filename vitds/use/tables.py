"""Rows to a file, one at a time: CSV, JSON, Parquet. A file that is being written is called NAME.part."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from io import TextIOBase
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from vitds.errors import ResourceError, UsageError

try:
    import pyarrow
    import pyarrow.parquet
except ImportError:
    pyarrow = None

ROWS_A_GROUP = 4096  # of a Parquet file, which are in memory
Row = dict[str, Any]


@runtime_checkable
class Table(Protocol):
    """What rows are written to."""

    def write(self, row: Row) -> None: ...
    def close(self) -> None: ...


class CsvTable:
    """Comma-separated values in UTF-8; text as no_formula has it, lists become columns NAME_0, NAME_1, ..."""

    def __init__(self, stream: TextIOBase, columns: Sequence[str]) -> None:
        self._writer = csv.DictWriter(stream, columns, restval="", lineterminator="\n")
        self._writer.writeheader()

    def write(self, row: Row) -> None:
        """One line; what the row lacks stays empty."""
        self._writer.writerow({name: _as_text(value) for name, value in row.items()})

    def close(self) -> None:
        """Nothing is left to write."""


class JsonTable:
    """A list of objects, one a line."""

    def __init__(self, stream: TextIOBase) -> None:
        self._stream = stream
        self._before = "[\n"

    def write(self, row: Row) -> None:
        """One object."""
        self._stream.write(self._before + json.dumps(row, ensure_ascii=False, allow_nan=False))
        self._before = ",\n"

    def close(self) -> None:
        """End the list."""
        self._stream.write("\n]\n" if self._before == ",\n" else "[]\n")


class ParquetTable:
    """A Parquet file, written in groups of rows."""

    def __init__(self, path: Path, schema: dict[str, str]) -> None:
        kinds = {
            "text": pyarrow.string(),
            "number": pyarrow.float64(),
            "floats": pyarrow.list_(pyarrow.float32()),
        }
        self._schema = pyarrow.schema([(name, kinds[kind]) for name, kind in schema.items()])
        self._writer = pyarrow.parquet.ParquetWriter(path, self._schema)
        self._rows: list[Row] = []

    def write(self, row: Row) -> None:
        """One row; what it lacks is null."""
        self._rows.append(row)
        if len(self._rows) == ROWS_A_GROUP:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_table(pyarrow.Table.from_pylist(self._rows, self._schema))
        self._rows = []

    def close(self) -> None:
        """Write the last group and the file's end."""
        if self._rows:
            self._flush()
        self._writer.close()


def check_out(out: str, endings: Sequence[str]) -> Path:
    """The path of a file to write, whose name's ending says its format.

    Raises: UsageError for another ending; ResourceError if the folder is missing, or Parquet has no library.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in endings:
        raise UsageError(f"`out={out}`: the name must end in {', '.join(endings[:-1])} or {endings[-1]}")
    if path.is_dir():
        raise UsageError(f"`out={out}`: is a folder; name a file in it")
    if not path.parent.is_dir():
        raise ResourceError(f"`out={out}`: there is no folder {path.parent}; make it first")
    if path.suffix.lower() == ".parquet" and pyarrow is None:
        raise ResourceError(
            f'`out={out}`: Parquet needs pyarrow: pip install "vitds[parquet]"; or end the name in .csv'
        )
    return path


@contextmanager
def open_table(path: Path, schema: dict[str, str], columns: Sequence[str] | None = None) -> Iterator[Table]:
    """A table that stands at `path` once all rows are written; before that it is called NAME.part.

    Args:
        path: its ending says the format.
        schema: name -> text, number or floats (a list of them), of every column.
        columns: of a CSV file, where they are not those of the schema.
    Raises: ResourceError if it cannot be written; what the rows' own source raises goes through.
    """
    part = path.with_name(f"{path.name}.part")
    with ExitStack() as stack:
        with writing(path, part):
            if path.suffix.lower() == ".parquet":
                table: Table = ParquetTable(part, schema)
            else:
                stream = part.open("w", encoding="utf-8", errors="backslashreplace", newline="")
                stack.enter_context(stream)
                is_csv = path.suffix.lower() == ".csv"
                table = CsvTable(stream, columns or list(schema)) if is_csv else JsonTable(stream)
        yield _Writing(table, path, part)
        with writing(path, part):
            table.close()
            stack.close()
            part.replace(path)


@contextmanager
def writing(path: Path, part: Path) -> Iterator[None]:
    """What is done here writes `part`, which is to become `path`. Raises: ResourceError where it cannot."""
    try:
        yield
    except OSError as error:
        raise ResourceError(
            f"{path} cannot be written ({error.strerror or error}); what was written is in {part}"
        ) from error


class _Writing:
    """A table whose failing writes name the file."""

    def __init__(self, table: Table, path: Path, part: Path) -> None:
        self._table, self._path, self._part = table, path, part

    def write(self, row: Row) -> None:
        with writing(self._path, self._part):
            self._table.write(row)

    def close(self) -> None:
        self._table.close()


def _as_text(value: object) -> object:
    """Numbers with as many digits as tell float32 numbers apart; text that is no formula."""
    return f"{value:.9g}" if isinstance(value, float) else no_formula(value)


def no_formula(value: object) -> object:
    """A CSV cell whose text no spreadsheet takes for a formula: with ' before it. Numbers as they are."""
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@")) else value
