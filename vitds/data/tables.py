"""A table of labels: a text file with a row an image, as spreadsheets and programs write it.

What separates the cells and which column names the files is found by trying: it is what matches the files
that are there. Everything that could be read in two ways is asked about, by an error that names both.
"""

from __future__ import annotations

import codecs
import csv
import encodings.aliases
import io
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from vitds.config.names import did_you_mean, nearest
from vitds.data.findings import shown
from vitds.data.folders import Parts
from vitds.data.formats import IMAGE_SUFFIXES
from vitds.errors import DataError, UsageError

DELIMITERS = (",", ";", "\t", "|", " ")
# What a column of labels is called, where it is not said.
LABEL_NAMES = frozenset(
    "label labels class classes class_name classname class_label category target species diagnosis dx".split()
)
FILE_NAMES = frozenset(
    "file files filename file_name filepath image images image_id image_name image_path img path".split()
)
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
COLUMNS_SHOWN = 12
SAMPLE = 2000  # rows that are tried


@dataclass(frozen=True)
class Table:
    """A table whose columns are known.

    Attributes:
        path: of its file.
        header: the columns' names; None where its first row is one of images.
        rows: (line of the file, cells), all of one length.
        file_column: the one that names the files.
        label_column: the one that names the classes.
        encoding: in which it was read.
    """

    path: Path
    header: tuple[str, ...] | None
    rows: list[tuple[int, list[str]]]
    file_column: int
    label_column: int
    encoding: str

    def name_of(self, column: int) -> str:
        return repr(self.header[column]) if self.header else f"number {column + 1}"

    def column(self, name: str) -> int | None:
        """The place of a column by its name in the header."""
        names = [each.casefold() for each in self.header or ()]
        return names.index(name.casefold()) if name.casefold() in names else None


class FileIndex:
    """Finds the images that a cell means.

    A cell is a path or its end, whatever its slashes and case, with or without the extension; or a longer
    path, of which an image's whole path below its source is the end.
    """

    def __init__(self, paths: Sequence[Parts]) -> None:
        """Args: paths: of the images, each beginning with its source's name."""
        self._ends: dict[Parts, list[int]] = defaultdict(list)
        self._wholes: dict[Parts, list[int]] = defaultdict(list)
        self._paths = [_normal("/".join(path)) for path in paths]
        for i, path in enumerate(self._paths):
            folded = tuple(part.casefold() for part in path)
            for spelt in {folded, (*folded[:-1], folded[-1].rpartition(".")[0] or folded[-1])}:
                for start in range(len(spelt)):
                    self._ends[spelt[start:]].append(i)
                self._wholes[spelt[1:]].append(i)

    @property
    def example(self) -> str:
        """One of the paths below their sources, for a message."""
        return shown("/".join(self._paths[0][1:]))

    def find(self, cell: str) -> list[int]:
        """The images of a cell: one, none, or several between which it does not decide."""
        parts = _normal(cell)
        folded = tuple(part.casefold() for part in parts)
        found = self._ends.get(folded, [])
        if not found:
            ends = (folded[start:] for start in range(1, len(folded)))
            found = next((self._wholes[end] for end in ends if end in self._wholes), [])
        exact = [i for i in found if self._paths[i][-len(parts) :] == parts]
        return exact if len(exact) == 1 else found


def read_table(path: Path, files: FileIndex, label_column: str | None, encoding: str | None = None) -> Table:
    """The table in `path`, with its columns.

    Args:
        files: the images that are there.
        label_column: by its name in the header or its number, from 1; None: by its name or as the only other.
        encoding: of the text; None: by its mark, else UTF-8, else Windows-1252.
    Raises: DataError if the file cannot be read or is no table, no column names the files, or the column of
        the labels is missing (near names) or not clear (names the columns).
    """
    text, encoding = _text(path, encoding)
    # Some rows decide, spread over the table; all of them where none of those is of an image.
    best, rows, file_column = _best_reading(path, text, files, SAMPLE)
    if not best:
        best, rows, file_column = _best_reading(path, text, files, len(text) + 1)
    if not best:
        first = text.splitlines()[0] if text.strip() else ""
        raise DataError(
            f"{path}: no column of it names the images that are there, such as {files.example}. Its first "
            f"line is {first[:80]!r}. It needs a column of file names or paths, and one of labels, with "
            "commas, semicolons or tabs between."
        )
    _check_lengths(path, rows, file_column)
    header = _header(rows, file_column, files)
    place = _label_column(path, rows, header, file_column, label_column)
    if header and _is_data(rows, place, header):
        header = None
    return Table(path, header, rows[1:] if header else rows, file_column, place, encoding)


def _best_reading(
    path: Path, text: str, files: FileIndex, sample: int
) -> tuple[int, list[tuple[int, list[str]]], int]:
    """The score of the column that names the files best, of about `sample` rows; all rows so read; it.

    Raises: DataError if the text is no table with one of the delimiters, and none with any other.
    """
    best, rows, file_column, failure = 0, [], 0, None
    for delimiter in DELIMITERS:
        try:
            tried = _rows(path, text, delimiter)
        except DataError as error:  # a quote after a blank is one to the delimiter " ", and to no other
            failure = error
            continue
        # Each cell once: labels 1 to 5 may be the names of five files. A row's number may be one as well, so
        # a cell with an extension counts twice, and so does a column that is called as files are.
        cells = {pair for _, row in tried[:: len(tried) // sample + 1] for pair in enumerate(row)}
        scores: Counter[int] = Counter()
        for column, cell in sorted(cells):
            if files.find(cell):
                scores[column] += 2 if _has_image_suffix(cell) else 1
        for column in scores:
            is_called_so = any(name.strip().casefold() in FILE_NAMES for name in tried[0][1][column:][:1])
            if (score := scores[column] * (2 if is_called_so else 1)) > best:
                best, rows, file_column = score, tried, column
    if failure and not best and sample > len(text):
        raise failure
    return best, rows, file_column


def _has_image_suffix(cell: str) -> bool:
    return PurePosixPath(cell.strip()).suffix.lower() in IMAGE_SUFFIXES


def _normal(text: str) -> Parts:
    text = unicodedata.normalize("NFC", text.strip().replace("\\", "/"))
    return tuple(part for part in text.split("/") if part not in ("", "."))


def _text(path: Path, stated: str | None) -> tuple[str, str]:
    """The file's text and its encoding: as stated, else by its mark, else UTF-8, else what Windows and
    Latin-1 have.

    Others are not guessed: in a short table a guess is wrong as often as right, and nobody sees it.
    """
    try:
        # Python's codecs that are no text's, as base64, fail when they decode.
        known = stated and b"a".decode(stated, "replace") and codecs.lookup(stated).name
    except LookupError:
        near = nearest(stated, encodings.aliases.aliases)
        meant = f"did you mean {near}?" if near else "examples are gb18030, shift_jis, euc_kr and cp1251."
        raise UsageError(f"`label_encoding={stated}`: there is no such encoding; {meant}") from None
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: the table of labels cannot be read ({error.strerror}).") from None
    if raw.startswith(b"PK\3\4"):
        raise DataError(f"{path}: a spreadsheet or zip, not a text. Save it as CSV, and give that.")
    marked = known or next((encoding for bom, encoding in BOMS if raw.startswith(bom)), None)
    if marked is None and b"\0" in raw[:200]:
        marked = "utf-16-le" if raw[1:2] == b"\0" else "utf-16-be"
    for encoding in (marked,) if marked else ("utf-8", "cp1252", "latin-1"):
        try:
            return raw.decode(encoding).removeprefix("\ufeff"), encoding  # a mark that `stated` leaves
        except UnicodeError as error:
            why = error
    raise DataError(
        f"{path}: not a text ({why}). Save it as CSV in UTF-8, or name its encoding with `label_encoding`."
    )


def _rows(path: Path, text: str, delimiter: str) -> list[tuple[int, list[str]]]:
    """The rows that are not empty, each with the line on which it ends."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True)
    try:
        return [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except csv.Error as error:
        raise DataError(f"{path}: line {reader.line_num}: not a row of a table ({error}).") from None


def _check_lengths(path: Path, rows: list[tuple[int, list[str]]], file_column: int) -> None:
    """Rows of one length; empty cells that a program left out at a row's end are put back."""
    usual = Counter(len(cells) for _, cells in rows).most_common(1)[0][0]
    if usual < 2:
        raise DataError(f"{path}: one column alone. It needs a column of file names and one of labels.")
    for line, cells in rows:
        while len(cells) > usual and not cells[-1].strip():
            cells.pop()
        # Not in the first row: a header without a name for the rows' numbers lacks its first cell.
        if file_column < len(cells) < usual and cells is not rows[0][1]:
            cells += [""] * (usual - len(cells))
        if len(cells) != usual:
            raise DataError(
                f"{path}: line {line} has {len(cells)} cells, most have {usual}: {' | '.join(cells)[:80]!r}. "
                "Put a cell that holds a separator between quotes."
            )


def _header(rows: list[tuple[int, list[str]]], file_column: int, files: FileIndex) -> tuple[str, ...] | None:
    """The first row, where it names no image, neither one that is there nor one that is missing."""
    first = rows[0][1]
    cell = first[file_column]
    if files.find(cell) or _has_image_suffix(cell):
        return None
    return tuple(name.strip() for name in first)


def _is_data(rows: list[tuple[int, list[str]]], label_column: int, header: tuple[str, ...]) -> bool:
    """Whether the first row is an image that is missing, its name being without an extension: its label is
    one that others have.
    """
    return any(cells[label_column].strip() == header[label_column] for _, cells in rows[1:])


def _label_column(
    path: Path,
    rows: list[tuple[int, list[str]]],
    header: tuple[str, ...] | None,
    file_column: int,
    wanted: str | None,
) -> int:
    columns = len(rows[0][1])
    others = [column for column in range(columns) if column != file_column]
    names = header or tuple(str(column + 1) for column in range(columns))
    if wanted is None:
        named = [column for column in others if names[column].casefold() in LABEL_NAMES]
        if len(named) == 1 or len(others) == 1:
            return (named or others)[0]
        listed = ", ".join(repr(name) for name in names[:COLUMNS_SHOWN]) + ", …" * (columns > COLUMNS_SHOWN)
        raise DataError(
            f"{path}: it is not clear which of its {columns} columns has the labels: {listed}. Say which "
            "with `label_column`, by its name or number."
        )
    folded = [name.casefold() for name in names]
    if wanted.casefold() in folded:
        place = folded.index(wanted.casefold())
    elif wanted.isdecimal() and 1 <= int(wanted) <= columns:
        place = int(wanted) - 1
    else:
        raise DataError(
            f"{path}: `label_column={wanted}`: there is no such column; {did_you_mean(wanted, names)}"
        )
    if place == file_column:
        raise DataError(f"{path}: `label_column={wanted}`: that column names the files. Choose another.")
    return place
