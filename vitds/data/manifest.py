"""The manifest of a .beton: x.beton.json beside x.beton says what the numbers in it mean to a person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass as checked_dataclass

from vitds.errors import DataError

MANIFEST_VERSION = 2
READ_VERSIONS = (1, 2)  # 1 lacks the fields that have defaults

_STRICT = ConfigDict(extra="forbid", allow_inf_nan=False)
Count = Annotated[int, Field(ge=0)]
Channels = tuple[float, float, float]


@checked_dataclass(frozen=True, config=_STRICT)
class Finding:
    """Images of one oddity: how many, and the names of the first thousand."""

    count: Count
    names: tuple[str, ...]


@checked_dataclass(frozen=True, config=_STRICT)
class Grouped:
    """Images that belong together (one patient, one video) and went to one side of the split.

    Attributes:
        by: the regular expression or the table's column that says which.
        groups: how many are in this file.
    """

    by: str
    groups: Count


@checked_dataclass(frozen=True, config=_STRICT)
class Manifest:
    """What x.beton.json says of x.beton.

    Attributes:
        version: of this record.
        images: N.
        file_bytes: size of the .beton it belongs to.
        classes: names in label order, () where the images have no labels.
        storage: "raw" pixels, or "jpg": a file's own bytes where they needed no change, else encoded.
        side_px: short side that larger images were reduced to.
        quality: of what was encoded.
        width_px: smallest and largest stored.
        height_px: likewise.
        mean: per channel over all stored pixels, 0..1.
        std: likewise.
        content_hash: SHA-256 over the decoded samples and labels in index order; neither the file's layout
            nor the number of workers enters.
        sources: as given to the build.
        split: which part of them.
        findings: what was odd, by kind (vitds/data/findings.py).
        unlabelled: how many images have the label -1 although there are classes.
        grouped: how the split kept groups whole, where it did.
        names: each image's path below its source, one a line in index order; None where they were not kept.
            One text, as a list of a million would take a second and 200 MB to read.
    """

    version: int
    images: Annotated[int, Field(ge=1)]
    file_bytes: Count
    classes: tuple[str, ...]
    storage: Literal["raw", "jpg"]
    side_px: int | None
    quality: int
    width_px: tuple[int, int]
    height_px: tuple[int, int]
    mean: Channels
    std: Channels
    content_hash: str
    sources: tuple[str, ...]
    split: str | None
    findings: dict[str, Finding]
    unlabelled: Count = 0
    grouped: Grouped | None = None
    names: str | None = None


MANIFEST_JSON = TypeAdapter(Manifest)


def manifest_path(path: Path) -> Path:
    """Where the manifest of a .beton lies: x.beton -> x.beton.json."""
    return path.with_name(path.name + ".json")


def load_manifest(path: str | Path) -> Manifest:
    """The manifest of the .beton at `path`.

    Raises: DataError if it is missing, unreadable, of another version, or lacks a field (names the file and
        the field).
    """
    sidecar = manifest_path(Path(path))
    try:
        text = sidecar.read_bytes()
    except OSError as error:
        raise DataError(
            f"{sidecar}: the manifest of {Path(path).name} cannot be read ({error.strerror}). "
            "Copy it along from where the file was built, or build the file again with `vitds data build`."
        ) from None
    try:
        manifest = MANIFEST_JSON.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise DataError(
            f"{sidecar}: {where}: {first['msg']}. Build the file again with `vitds data build`."
        ) from None
    if manifest.version not in READ_VERSIONS:
        raise DataError(
            f"{sidecar}: manifest version {manifest.version}, this vitds reads {MANIFEST_VERSION}. "
            "Build the file again with this vitds, or install the one that wrote it."
        )
    return manifest
