"""Labels that do not come from folders: from a table, or from the files' names. Which images are a group.

What could be meant in two ways is asked about, by an error that shows what would be done and names the
argument that says so.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from vitds.config.names import nearest
from vitds.data.findings import TABLE_READ, TABLE_TWICE, Findings, shown
from vitds.data.folders import Parts
from vitds.data.tables import FileIndex, Table, read_table
from vitds.data.trees import SourceImage
from vitds.errors import DataError, UsageError

SHOWN = 10
TRAILING_NUMBER = re.compile(r"(.*?)[\W_]*\(?\d+\)?", re.DOTALL)  # crazing_12, cat.0, dog (3), beetle12
LEADING_NUMBER = re.compile(r"\d+[\W_]+(.*)", re.DOTALL)  # 12_crazing


class Placed(NamedTuple):
    """An image of a set in the making.

    Attributes:
        parts: its path below its source, or below the split of it.
        source: the number of its source.
        image: where its bytes are.
    """

    parts: Parts
    source: int
    image: SourceImage


def label_by_table(
    found: Sequence[Placed],
    sources: Sequence[Path],
    path: Path,
    findings: Findings,
    *,
    label_column: str | None = None,
    encoding: str | None = None,
    alike: str | None = None,
    group: str | None = None,
) -> tuple[list[Placed], Table]:
    """The images that a table lists, with its classes; without one where the table's cell is empty.

    Args:
        found: all images of the sources.
        path: of the table.
        findings: gets the rows without an image, and the images without a row.
        label_column: as in tables.read_table.
        encoding: likewise.
        alike: what to do with labels that differ only by case or blanks; None: ask.
        group: a column that says which images belong together, if the table has one of that name.
    Returns: the images, with their groups if `group` is a column, and the table.
    Raises: DataError as tables.read_table; if two rows give an image two labels or groups, or a row means
        several images (names the lines and the files).
    """
    # A source's own name, also where it is given as `.`
    names = [os.path.basename(os.path.abspath(source)) or "/" for source in sources]
    files = FileIndex([(names[each.source], *each.parts) for each in found])
    table = read_table(path, files, label_column, encoding)
    group_column = table.column(group) if group is not None else None
    row_of = _rows_of_images(table, files, found, group_column, findings)
    classes = class_names([cells[table.label_column] for _, cells in table.rows], alike, str(path), "rows")
    listed = []
    for i, each in enumerate(found):
        if i not in row_of:
            findings.add("unlisted", each.image.name)
            continue
        cells = row_of[i][1]
        together = cells[group_column].strip() or None if group_column is not None else None
        class_name = classes[cells[table.label_column]]
        listed.append(each._replace(image=replace(each.image, class_name=class_name, group=together)))
    if not any(each.image.class_name for each in listed):
        raise DataError(f"{path}: column {table.name_of(table.label_column)} has no label for any image.")
    about = (
        f"{path}: labels from column {table.name_of(table.label_column)}, files from column "
        f"{table.name_of(table.file_column)}, {len(table.rows):,} rows, read as {table.encoding}"
    )
    findings.add(TABLE_READ, about)
    return listed, table


def label_by_name(
    found: Sequence[Placed], findings: Findings, *, source: Path, is_sure: bool, alike: str | None = None
) -> list[Placed]:
    """The images with the classes that their file names begin or end with: crazing_12.jpg is of `crazing`.

    Args:
        source: for messages.
        is_sure: a person has seen what it would do, and agreed.
        alike: as in label_by_table.
    Raises: DataError that shows the classes, unless `is_sure`; if there is none.
    """
    texts = [_class_in(each.parts[-1]) for each in found]
    names = class_names([text for text in texts if text], alike, str(source), "files")
    named = [
        each._replace(image=replace(each.image, class_name=names[text]))
        for each, text in zip(found, texts, strict=True)
        if text
    ]
    nameless = [each.image.name for each, text in zip(found, texts, strict=True) if not text]
    if not named:
        raise DataError(
            f"{source}: no file's name has a class and a number in it, as crazing_12.jpg has; the first is "
            f"{shown(found[0].parts[-1])}. Leave `label_from` out, or list the labels in a table (`labels`)."
        )
    if not is_sure:
        raise DataError(_what_names_would_give(source, named, nameless))
    for name in nameless:
        findings.add("nameless", name)
    return named


def group_by_pattern(found: Sequence[Placed], pattern: str, columns: Sequence[str] = ()) -> list[Placed]:
    """The images with their groups: what a regular expression finds in each path below the source.

    Where it has a group in brackets, that is taken, else all that it matches.

    Args:
        columns: of the table of labels, none of which is called `pattern`.
    Raises: UsageError if it is none; DataError if it matches no image (names a column that is near).
    """
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UsageError(f"`group={pattern}`: not a regular expression ({error}).") from None
    grouped = []
    for each in found:
        match = expression.search("/".join(each.parts))
        together = match[1] if match and expression.groups else match[0] if match else None
        grouped.append(each._replace(image=replace(each.image, group=together or None)))
    if all(each.image.group is None for each in grouped):
        near = nearest(pattern, columns)
        column = f"did you mean the column {near}?" if near else "or a column of the table in `labels`."
        raise DataError(
            f"`group={pattern}`: it matches no image's path; the first is {shown('/'.join(found[0].parts))}. "
            "It must be a regular expression that finds the patient, specimen or video in the path below the "
            f"source; {column}"
        )
    return grouped


def class_names(texts: Sequence[str], alike: str | None, where: str, unit: str) -> dict[str, str | None]:
    """The class of each text; None for one without letters.

    Args:
        texts: labels, or names of class folders, one an image.
        alike: as in label_by_table.
        where: for the message.
        unit: what there is a text for, for the message.
    Raises: DataError if texts differ only by case or blanks, and `alike` does not say what they are.
    """
    counts = Counter(texts)
    spelt: dict[str, list[str]] = defaultdict(list)
    for text, _ in counts.most_common():
        spelt["".join(text.split()).casefold()].append(text)
    spelt.pop("", None)
    names: dict[str, str | None] = dict.fromkeys(counts)
    for first, *others in spelt.values():
        if others and alike is None:
            spellings = ", ".join(f"{text!r} ({counts[text]} {unit})" for text in (first, *others[:SHOWN]))
            raise DataError(
                f"{where}: labels that differ only by case or blanks: {spellings}. Say with `alike=merge` "
                "that they are one class, or with `alike=keep` that each is one."
            )
        for text in (first, *others):
            name = text if alike == "keep" else first.strip()
            names[text] = unicodedata.normalize("NFC", shown(name))
    return names


def _rows_of_images(
    table: Table, files: FileIndex, found: Sequence[Placed], group_column: int | None, findings: Findings
) -> dict[int, tuple[int, list[str]]]:
    """The row (line, cells) of each image that has one."""
    kinds = {table.label_column: "label"}
    if group_column is not None:
        kinds[group_column] = "group"
    row_of: dict[int, tuple[int, list[str]]] = {}
    for line, cells in table.rows:
        cell = cells[table.file_column]
        meant = files.find(cell)
        if not meant:
            findings.add("table_missing", f"{table.path}: line {line}: {cell or 'no file'}")
            continue
        if len(meant) > 1:
            some = ", ".join(found[i].image.name for i in meant[:3])
            raise DataError(
                f"{table.path}: line {line}: {cell!r} may be any of {len(meant)} files: {some}. Write more "
                "of the path."
            )
        before = row_of.setdefault(meant[0], (line, cells))
        for column, kind in kinds.items():
            if before[1][column].strip() != cells[column].strip():
                raise DataError(
                    f"{table.path}: two rows for {cell}: line {before[0]} says {before[1][column]!r}, line "
                    f"{line} {cells[column]!r}. Leave one: an image has one {kind}."
                )
        if before[0] != line:
            findings.add(TABLE_TWICE, f"{table.path}: line {line}: {cell}")
    return row_of


def _class_in(file_name: str) -> str | None:
    """The class in a file's name; None where there are no letters beside a number."""
    stem = file_name.rpartition(".")[0] or file_name
    match = TRAILING_NUMBER.fullmatch(stem) or LEADING_NUMBER.fullmatch(stem)
    name = match[1].strip(" _-.") if match else ""
    return name if any(letter.isalpha() for letter in name) else None


def _what_names_would_give(source: Path, named: Sequence[Placed], nameless: Sequence[str]) -> str:
    counts = Counter(each.image.class_name for each in named)
    example = {each.image.class_name: shown(each.parts[-1]) for each in reversed(named)}
    some = ", ".join(f"{name} ({count}, as {example[name]})" for name, count in counts.most_common(SHOWN))
    rest = f" Without a class: {len(nameless)} (first: {nameless[0]})." if nameless else ""
    return (
        f"{source}: `label_from=name` would make {len(counts)} classes of {len(named)} files: {some}"
        f"{', …' * (len(counts) > SHOWN)}.{rest} If that is right, say so with `yes`. Nothing was written."
    )
