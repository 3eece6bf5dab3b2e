"""`vitds data info` and `vitds data verify`: what is in a .beton, and whether all of it can be read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.table import Column, Table
from rich.text import Text

from vitds.data.beton import BetonFile, open_beton
from vitds.data.findings import TABLE_READ, TEXTS
from vitds.data.manifest import MANIFEST_JSON, Manifest
from vitds.data.verify import verify_beton
from vitds.errors import DataError
from vitds.report.table import show
from vitds.terminal import say

NAMES_SHOWN = 5
CLASSES_SHOWN = 40


def info(file: str, *, as_json: bool = False) -> dict[str, Any]:
    """Print what a .beton and its manifest say, as tables or one JSON object.

    Returns: the manifest's values without the names, and `file`, `images_per_class` ([] without labels).
    Raises: DataError if the file is not sound (open_beton).
    """
    beton = open_beton(file)
    facts = {
        "file": str(beton.path),
        **MANIFEST_JSON.dump_python(beton.manifest, mode="json", exclude={"names"}),
        "images_per_class": images_per_class(beton),
    }
    if as_json:
        print(json.dumps(facts))
        return facts
    show(_facts_table(facts))
    if facts["classes"]:
        show(_class_table(facts["classes"], facts["images_per_class"]))
    print_findings(beton.manifest)
    return facts


def images_per_class(beton: BetonFile) -> list[int]:
    """How many images each class has, in label order; [] without labels."""
    own = beton.labels[beton.labels >= 0]
    return np.bincount(own, minlength=len(beton.manifest.classes)).tolist() if beton.manifest.classes else []


def list_images(file: str, *, as_json: bool = False) -> list[dict[str, Any]]:
    """Print each image of a .beton: its number, its class, its photograph; tab-separated, or one JSON object.

    Returns: a row an image with index, class and name; None where there is no label or no name was kept.
    Raises: DataError if the file is not sound (open_beton).
    """
    beton = open_beton(file)
    classes, names = beton.manifest.classes, beton.names
    rows = [
        {
            "index": index,
            "class": classes[label] if label >= 0 else None,
            "name": names[index] if names else None,
        }
        for index, label in enumerate(beton.labels.tolist())
    ]
    if as_json:
        say(json.dumps({"file": file, "images": rows}))
    else:
        # One string: a million calls of print would take longer than the reading.
        say("\n".join(f"{row['index']}\t{row['class'] or '-'}\t{row['name'] or '-'}" for row in rows))
    return rows


def verify(file: str, *, as_json: bool = False, workers: int | None = None) -> dict[str, Any]:
    """Read every image of a .beton back and print the verdict, as a line or one JSON object.

    Returns: file, images, is_sound, content_hash, expected_hash, undecodable (index -> reason) and names
        (index -> photograph, of the undecodable ones).
    Raises: DataError if the file is not sound, after printing (names the images by index and photograph, or
        the two hashes).
    """
    verdict = verify_beton(file, workers=workers, show_progress=True)
    result = {
        "file": str(file),
        "images": verdict.images,
        "is_sound": verdict.is_sound,
        "content_hash": verdict.content_hash,
        "expected_hash": verdict.expected_hash,
        "undecodable": {str(index): reason for index, reason in verdict.undecodable.items()},
        "names": {str(index): name for index, name in verdict.names.items()},
    }
    if as_json:
        print(json.dumps(result))
    elif verdict.is_sound:
        line = f"{file}: sound. All {verdict.images:,} images were decoded; {verdict.content_hash} as built."
        say(line)
    if verdict.undecodable:
        listed = ", ".join(
            f"{index} ({verdict.names[index] + ': ' if index in verdict.names else ''}{reason})"
            for index, reason in list(verdict.undecodable.items())[:NAMES_SHOWN]
        )
        more = ", …" * (len(verdict.undecodable) > NAMES_SHOWN)
        raise DataError(
            f"{file}: {len(verdict.undecodable)} of {verdict.images} images cannot be decoded, by index: "
            f"{listed}{more}. Copy the file again, or build it again with `vitds data build`."
        )
    if not verdict.is_sound:
        raise DataError(
            f"{file}: the content is not what was built: {verdict.content_hash}, the manifest says "
            f"{verdict.expected_hash}. Copy the file again, or build it again with `vitds data build`."
        )
    return result


def print_findings(manifest: Manifest) -> None:
    """A table of what was odd about the images, with the first names of each kind, if there is any."""
    odd = {kind: found for kind, found in manifest.findings.items() if kind != TABLE_READ}
    if not odd:
        return
    table = Table(
        "what", "how many", Column("for example", overflow="fold"), title="odd images", title_justify="left"
    )
    for kind, found in odd.items():
        names = "\n".join(found.names[:NAMES_SHOWN]) + "\n…" * (found.count > NAMES_SHOWN)
        table.add_row(Text(TEXTS.get(kind, kind)), f"{found.count:,}", Text(names))
    show(table)


def _facts_table(facts: dict[str, Any]) -> Table:
    per_class = facts["images_per_class"]
    classes = facts["classes"]
    names = ", ".join(classes[:NAMES_SHOWN]) + ", …" * (len(classes) > NAMES_SHOWN)
    range_of = "{0[0]} to {0[1]}".format
    rows = {
        "images": f"{facts['images']:,}",
        "classes": f"{len(classes)}: {names}; {min(per_class)} to {max(per_class)} images each"
        if classes
        else "none (no labels)",
        "unlabelled": f"{facts['unlabelled']:,}" if facts["unlabelled"] else None,
        "groups": "{groups:,} by {by}".format(**facts["grouped"]) if facts["grouped"] else None,
        "storage": facts["storage"]
        if facts["storage"] == "raw"
        else f"jpg, quality {facts['quality']} where encoded",
        "size": f"{facts['file_bytes'] / 1e6:,.1f} MB",
        "pixels": f"width {range_of(facts['width_px'])}, height {range_of(facts['height_px'])}"
        + (f", short side reduced to {facts['side_px']}" if facts["side_px"] else ""),
        "mean, std": "  ".join(
            f"{mean:.4f}, {std:.4f}" for mean, std in zip(facts["mean"], facts["std"], strict=True)
        ),
        "content": facts["content_hash"],
        "sources": ", ".join(facts["sources"]),
        "split": facts["split"] or "all",
    }
    table = Table(
        "", Column("", overflow="fold"), show_header=False, title=Text(facts["file"]), title_justify="left"
    )
    for name, value in rows.items():
        if value is not None:
            table.add_row(name, Text(value))
    return table


def _class_table(classes: Sequence[str], per_class: Sequence[int]) -> Table:
    """How many images each class has, the largest first; of many classes the largest and the smallest."""
    table = Table("class", Column("images", justify="right"), title="images per class", title_justify="left")
    rows = sorted(zip(per_class, classes, strict=True), key=lambda row: (-row[0], row[1]))
    few = len(rows) <= CLASSES_SHOWN
    for count, name in rows if few else rows[: CLASSES_SHOWN // 2]:
        table.add_row(Text(name), f"{count:,}")
    if not few:
        table.add_row(f"… {len(rows) - CLASSES_SHOWN:,} classes between (all of them with --json) …", "")
        for count, name in rows[-CLASSES_SHOWN // 2 :]:
            table.add_row(Text(name), f"{count:,}")
    return table
